"""Headrace, vLLM and transformers behind one interface: requests in, times of their tokens out.

Knows how each engine is started and fed; which requests, and what their times mean, is the benchmarks' part.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvloop

ENGINES = ("headrace", "vllm", "transformers")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_ENGINE_FLAGS: dict[str, type] = {
    "dtype": str,
    "load_format": str,
    "max_model_len": int,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "tensor_parallel_size": int,
    "gpu_memory_utilization": float,
    "kv_cache_memory_bytes": int,
}
_SWITCHES = ("enforce_eager", "batch_invariant")


@dataclass(frozen=True)
class Request:
    """One request of a workload; it always generates `output_len` tokens."""

    prompt: list[int]
    output_len: int
    temperature: float = 1.0
    arrival: float = 0.0
    """Seconds after the start of the run."""


@dataclass(frozen=True)
class Trace:
    """What came back, and when."""

    begun: float
    """When the request was handed over; all times are of one monotonic clock, in seconds."""
    outputs: list[tuple[float, int]]
    """(time, number of new tokens) of each output"""

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.outputs)

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.outputs[0][0] - self.begun

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.outputs[-1][0] - self.begun

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.e2e - self.ttft) / max(self.num_tokens - self.outputs[0][1], 1)

    @property
    def gaps(self) -> list[float]:
        """Time from each output to the next."""
        return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(self.outputs)]


class Engine(Protocol):
    """A running engine."""

    def run(self, requests: Sequence[Request]) -> list[Trace]:
        """Serve all of them, each handed over at its arrival; traces in the order of the requests."""

    def shutdown(self) -> None: ...


def random_prompt(rng: random.Random, length: int, vocab: int = 10_000) -> list[int]:
    """Token ids below `vocab`, never seen before: no prefix cache can help."""
    return [rng.randrange(vocab) for _ in range(length)]


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default="demo", help="a path, or `demo` (default)")
    for name in _SWITCHES:
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None)
    for name, kind in _ENGINE_FLAGS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind)


@contextmanager
def started(args: argparse.Namespace, **engine_args: Any) -> Iterator[Engine]:
    """The engine that `--engine` and the engine flags describe; `engine_args` are the workload's own."""
    names = (*_SWITCHES, *_ENGINE_FLAGS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    engine: Engine
    if args.engine == "transformers":
        engine = importlib.import_module("benchlib.transformers_engine").TransformersEngine(
            model_path(args.model), **given
        )
    else:
        engine = StreamingEngine(args.engine, args.model, {**given, **engine_args})
    try:
        yield engine
    finally:
        engine.shutdown()


def model_path(model: str) -> Path:
    """A folder or a GGUF file."""
    if model == "demo":
        return Path(importlib.import_module("headrace.frontend.demo").demo_model_path())
    return Path(model)


class StreamingEngine:
    """AsyncLLM of Headrace or of vLLM: the same interface, so the same driver, on uvloop for both."""

    def __init__(self, package: str, model: str, engine_args: dict[str, Any]) -> None:
        if package == "vllm":
            engine_args = _without_multicast(engine_args)
            api = importlib.import_module("vllm")
            self._kind = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
            llm = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
            path = model_path(model)
            if path.is_file():  # its CPU build reads no GGUF
                path = importlib.import_module("benchlib.transformers_engine").as_folder(path)
            model = str(path)
        else:
            api = importlib.import_module("headrace")
            self._kind, llm = api.RequestOutputKind.DELTA, api.AsyncLLM
        folder = Path(model)
        if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            engine_args = {**engine_args, "skip_tokenizer_init": True}
        self._detokenize = not engine_args.get("skip_tokenizer_init", False)
        self._params = api.SamplingParams
        self._numbers = itertools.count()
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        wanted = api.AsyncEngineArgs(model=model, **engine_args)
        self._llm: Any = self._runner.run(_call(llm.from_engine_args, wanted))

    def run(self, requests: Sequence[Request]) -> list[Trace]:
        return self._runner.run(self.serve(requests))

    async def serve(self, requests: Sequence[Request]) -> list[Trace]:
        """`run`, for who has the loop in hand."""
        start = time.perf_counter()
        return await asyncio.gather(*(self._trace(request, start) for request in requests))

    def shutdown(self) -> None:
        self._runner.run(_call(self._llm.shutdown))
        self._runner.close()

    async def _trace(self, request: Request, start: float) -> Trace:
        if request.arrival:
            await asyncio.sleep(start + request.arrival - time.perf_counter())
        params = self._params(
            temperature=request.temperature,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=self._detokenize,
            output_kind=self._kind,
        )
        outputs: list[tuple[float, int]] = []
        begun = time.perf_counter()
        prompt = {"prompt_token_ids": request.prompt}
        async for output in self._llm.generate(prompt, params, f"bench-{next(self._numbers)}"):
            outputs.append((time.perf_counter(), len(output.outputs[0].token_ids)))
        trace = Trace(begun, outputs)
        if trace.num_tokens != request.output_len:
            raise RuntimeError(f"{trace.num_tokens} tokens came, {request.output_len} were asked for")
        return trace


def _without_multicast(engine_args: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for several GPUs: a fault in NVLink's multicast takes the whole host along."""
    if engine_args.get("tensor_parallel_size", 1) == 1:
        return engine_args
    os.environ.update(
        NCCL_NVLS_ENABLE="0",
        TORCH_SYMM_MEM_DISABLE_MULTICAST="1",
        NVSHMEM_DISABLE_NVLS="1",
        VLLM_ALLREDUCE_USE_SYMM_MEM="0",
    )
    return {**engine_args, "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}


async def _call(function: Any, *args: Any) -> Any:
    """Inside the loop, where both engines want to be started and stopped."""
    return function(*args)
