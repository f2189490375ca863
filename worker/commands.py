"""What the core asks of a worker besides steps: to sleep and wake up, to tell of itself, to be profiled.

Every rank carries out every command, in the order of its pipe, and answers each once. One that cannot be done
is answered with an error; what goes wrong in doing it is the worker's end, as in a step.
"""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, RefusedError, RequestError
from ..ipc.messages import Argument, Command, CommandResult

if TYPE_CHECKING:
    from torch.profiler import profile


class Sleeper(Protocol):
    """The part of a runner that gives its memory back and takes it again."""

    def release(self, keep_weights: bool) -> None:
        """Give up the KV cache, the slots and the device's copy of the weights; may keep one on the host."""

    def restore_weights(self) -> None:
        """Have the weights on the device again, from the host's copy or else from the files."""

    def restore_cache(self) -> None:
        """Have an empty KV cache again, of the same size."""

    def memory(self) -> dict[str, Argument]:
        """Bytes, by what they hold."""

    def weights_checksum(self) -> str:
        """SHA-256 of this rank's weights, hexadecimal. Raises RequestError when there are none."""


class Commands:
    """Carries out commands for one rank."""

    def __init__(self, config: EngineConfig, rank: int, runner: Sleeper) -> None:
        self._config = config
        self._rank = rank
        self._runner = runner
        self._asleep: set[str] = set()
        self._profiler: profile | None = None
        self._profile_path = ""

    @property
    def is_asleep(self) -> bool:
        return bool(self._asleep)

    def run(self, command: Command) -> CommandResult:
        """Do it; returns the answer."""
        try:
            result = self._run(command)
        except RefusedError as error:
            return CommandResult(self._rank, command.number, error=ErrorInfo.of(error))
        return CommandResult(self._rank, command.number, {"rank": self._rank, **result})

    def _run(self, command: Command) -> dict[str, Argument]:
        match command.name:
            case "sleep":
                self._sleep(keep_weights=command.arguments["level"] == 1)
            case "wake_up":
                tags = command.arguments["tags"]
                assert isinstance(tags, list)
                self._wake_up(tags)
            case "start_profile":
                self._start_profile(str(command.arguments["prefix"]))
            case "stop_profile":
                return self._stop_profile()
            case "rank":
                size = self._config.tensor_parallel_size
                return {"size": size, "device": self._config.device, "pid": os.getpid()}
            case "memory_stats":
                return self._runner.memory()
            case "weights_checksum":
                if "weights" in self._asleep:
                    raise RequestError("the weights are asleep: wake_up first", parameter="method")
                return {"sha256": self._runner.weights_checksum()}
            case _:
                raise AssertionError(f"unknown command {command.name}")
        return {}

    def _sleep(self, keep_weights: bool) -> None:
        self._runner.release(keep_weights)
        self._asleep = {"weights", "kv_cache"}
        gc.unfreeze()
        gc.collect()

    def _wake_up(self, tags: list[str]) -> None:
        waking = self._asleep.intersection(tags)
        if "weights" in waking:
            self._runner.restore_weights()
        if "kv_cache" in waking:
            self._runner.restore_cache()
        self._asleep -= waking
        gc.collect()
        gc.freeze()

    def _start_profile(self, prefix: str) -> None:
        folder = self._config.torch_profiler_dir
        if folder is None:
            message = "there is no folder for profiles: the engine was made without torch_profiler_dir"
            raise RequestError(message, parameter="torch_profiler_dir", value=None, limit="a folder")
        if self._config.load_format == "oracle":
            raise RequestError(
                "the oracle runs without torch, which makes the profiles", parameter="load_format"
            )
        if self._profiler is not None:
            raise RequestError("a profile is being made already: stop_profile ends it")
        from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 (half a second, for this alone)

        activities = [ProfilerActivity.CPU]
        if self._config.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"{prefix}{'-' if prefix else ''}rank{self._rank}-{time.time_ns()}.json"
        self._profile_path = str(Path(folder, name))
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _stop_profile(self) -> dict[str, Argument]:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            raise RequestError("no profile is being made: start_profile begins one")
        profiler.stop()
        profiler.export_chrome_trace(self._profile_path)
        return {"path": self._profile_path}
