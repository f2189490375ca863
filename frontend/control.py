"""What can be asked of an engine beside requests: pauses, sleep, its workers' state, profiles.

The core carries these out, one after the other; with several frontends they hold for all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Sequence
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, TypeVar, get_args

from ..ipc.errors import RequestError
from ..ipc.messages import Argument, RpcMethod
from .call_forms import refuse_set
from .core_client import CoreClient

PauseMode: TypeAlias = Literal["abort", "wait", "keep"]
_TAGS = ("weights", "kv_cache", "scheduling")
Result = TypeVar("Result")


def _refusal(name: str, why: str) -> RequestError:
    return RequestError(f"{name} is not supported: {why}", parameter=name)


def _refused(name: str, why: str) -> Callable[..., Coroutine[Any, Any, NoReturn]]:
    """A coroutine method of vLLM's for something that is not here."""

    async def method(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal(name, why)

    method.__doc__ = f"Not supported: {why}."
    return method


def _refused_stream(name: str, why: str) -> Callable[..., AsyncGenerator[NoReturn, None]]:
    """The same for a method whose outputs are iterated over."""

    async def method(self: object, *args: Any, **kwargs: Any) -> AsyncGenerator[NoReturn, None]:
        raise _refusal(name, why)
        yield

    method.__doc__ = f"Not supported: {why}."
    return method


def _refused_at_once(name: str, why: str) -> Callable[..., NoReturn]:
    """The same for a method that is not awaited."""

    def method(self: object, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal(name, why)

    method.__doc__ = f"Not supported: {why}."
    return method


_NO_LORA = "there are no LoRA adapters yet"
_NO_POOLING = "there are no pooling models"
_NO_TRANSFER = "weights come from files only; sleep(level=2) and wake_up() read them again"


class EngineControl:
    """The part of `AsyncLLM` that controls its engine. Raises RequestError, and EngineDeadError."""

    _client: CoreClient

    async def pause_generation(
        self,
        *,
        mode: PauseMode = "abort",
        wait_for_inflight_requests: bool | None = None,
        clear_cache: bool = True,
    ) -> None:
        """Let nothing run until `resume_generation`; returns when all is still. New requests wait.

        Args:
            mode: what becomes of requests: "abort" ends all; "wait" lets those that have started run to their
                end; "keep" stops them where they are, to go on later.
            wait_for_inflight_requests: True says the same as mode "wait", for vLLM's sake.
            clear_cache: forget all KV, so that requests that go on are computed again from their tokens.
        """
        if wait_for_inflight_requests:
            mode = "wait"
        _check_choice("mode", mode, get_args(PauseMode))
        _check_bool("clear_cache", clear_cache)
        await self._client.call("pause_generation", arguments={"mode": mode, "clear_cache": clear_cache})

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`. Raises RequestError while the weights or the cache sleep."""
        await self._client.call("resume_generation")

    async def is_paused(self) -> bool:
        return (await self._client.call("is_paused")).ok

    async def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None:
        """Pause, and give memory back; requests that come meanwhile wait. Nothing when it sleeps already.

        Args:
            level: 0 pauses only; 1 gives up the KV cache and keeps the weights in the host's memory; 2 gives
                up both, so that `wake_up` reads the weights from their files again.
            mode: what becomes of requests, as in `pause_generation`; those that are kept are computed again.
        """
        _check_choice("level", level, (0, 1, 2))
        _check_choice("mode", mode, get_args(PauseMode))
        await self._client.call("sleep", arguments={"level": level, "mode": mode})

    async def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Take back what sleeps: "weights", then "kv_cache"; None is everything.

        Requests run again once both are awake. "scheduling" alone ends a sleep of level 0.
        """
        wanted = None if tags is None else [tags] if isinstance(tags, str) else list(tags)
        for tag in wanted or ():
            _check_choice("tags", tag, _TAGS)
        await self._client.call("wake_up", arguments={"tags": wanted})

    async def is_sleeping(self) -> bool:
        return (await self._client.call("is_sleeping")).ok

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget all cached prefixes; False when blocks are in use, so that nothing was reset.

        With `reset_running_requests` these are given up, and the requests computed again from their tokens.
        """
        refuse_set({"reset_connector": reset_connector})
        _check_bool("reset_running_requests", reset_running_requests)
        arguments: dict[str, Argument] = {"reset_running_requests": reset_running_requests}
        return (await self._client.call("reset_prefix_cache", arguments=arguments)).ok

    async def reset_mm_cache(self) -> None:
        """Forget cached images, sounds and the like: there are none."""

    async def reset_encoder_cache(self) -> None:
        """Forget what encoders have made of them: there are none."""

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,  # noqa: ASYNC109 (vLLM's name)
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Argument]]:
        """Ask every worker something; returns their answers, by rank.

        Args:
            method: "rank" (size, device, pid), "memory_stats" (bytes by use) or "weights_checksum" (SHA-256
                of the rank's weights). No code is sent: these are all that there are.
            timeout: seconds; then TimeoutError.
            args, kwargs: must be empty: none of them takes any.
        """
        _check_choice("method", method, get_args(RpcMethod))
        if args or kwargs:
            message = f"{method} takes no arguments, got args={args!r:.50}, kwargs={kwargs!r:.50}"
            raise RequestError(message, parameter="args", limit="no arguments")
        return (await self._client.call("collective_rpc", timeout, {"method": method})).results

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begin to profile the workers with torch's profiler. Needs `torch_profiler_dir`.

        The traces' names begin with `profile_prefix`: letters, digits, "_", "-" and ".".
        """
        if profile_prefix is not None and not isinstance(profile_prefix, str):
            message = f"profile_prefix must be a string, got {profile_prefix!r:.100}"
            raise RequestError(message, parameter="profile_prefix", limit="a string")
        await self._client.call("start_profile", arguments={"prefix": profile_prefix or ""})

    async def stop_profile(self) -> list[str]:
        """End it; returns the paths of the traces (Chrome's format), by rank, on the workers' machine."""
        results = (await self._client.call("stop_profile")).results
        return [str(result["path"]) for result in results]

    @property
    def world_size(self) -> int:
        """How many workers there are."""
        return self._client.config.tensor_parallel_size

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def list_loras(self) -> set[int]:
        """The ids of loaded adapters: none."""
        return set()

    add_lora = _refused("add_lora", _NO_LORA)
    remove_lora = _refused("remove_lora", _NO_LORA)
    pin_lora = _refused("pin_lora", _NO_LORA)
    encode = _refused_stream("encode", _NO_POOLING)
    scale_elastic_ep = _refused("scale_elastic_ep", "there is no expert parallelism")
    init_weight_transfer_engine = _refused("init_weight_transfer_engine", _NO_TRANSFER)
    start_weight_update = _refused("start_weight_update", _NO_TRANSFER)
    start_draft_weight_update = _refused("start_draft_weight_update", _NO_TRANSFER)
    update_weights = _refused("update_weights", _NO_TRANSFER)
    finish_weight_update = _refused("finish_weight_update", _NO_TRANSFER)
    notify_kv_transfer_request_rejected = _refused(
        "notify_kv_transfer_request_rejected", "KV caches are not transferred between engines"
    )


class _Runs(Protocol):
    def __call__(self, work: Coroutine[Any, Any, Result]) -> Result: ...


class BlockingControl:
    """The same for `LLM`: each call returns when it is done."""

    _engine: EngineControl
    _run: _Runs

    def sleep(self, level: int = 1, mode: PauseMode = "abort") -> None:
        """See `AsyncLLM.sleep`; until `wake_up`, calls of `generate` wait for ever."""
        self._run(self._engine.sleep(level, mode))

    def wake_up(self, tags: Collection[str] | None = None) -> None:
        """See `AsyncLLM.wake_up`."""
        self._run(self._engine.wake_up(tags))

    def is_sleeping(self) -> bool:
        return self._run(self._engine.is_sleeping())

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """See `AsyncLLM.reset_prefix_cache`."""
        return self._run(self._engine.reset_prefix_cache(reset_running_requests, reset_connector))

    def get_world_size(self, include_dp: bool = True) -> int:
        """How many workers there are; `include_dp` changes nothing, for nothing is replicated."""
        return self._engine.world_size

    def reset_mm_cache(self) -> None:
        self._run(self._engine.reset_mm_cache())

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Argument]]:
        """See `AsyncLLM.collective_rpc`."""
        return self._run(self._engine.collective_rpc(method, timeout, args, kwargs))

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """See `AsyncLLM.start_profile`."""
        self._run(self._engine.start_profile(profile_prefix))

    def stop_profile(self) -> list[str]:
        """See `AsyncLLM.stop_profile`."""
        return self._run(self._engine.stop_profile())

    apply_model = _refused_at_once("apply_model", "no code is sent to the workers; see collective_rpc")
    encode = _refused_at_once("encode", _NO_POOLING)
    embed = _refused_at_once("embed", _NO_POOLING)
    classify = _refused_at_once("classify", _NO_POOLING)
    reward = _refused_at_once("reward", _NO_POOLING)
    score = _refused_at_once("score", _NO_POOLING)
    init_weight_transfer_engine = _refused_at_once("init_weight_transfer_engine", _NO_TRANSFER)
    start_weight_update = _refused_at_once("start_weight_update", _NO_TRANSFER)
    start_draft_weight_update = _refused_at_once("start_draft_weight_update", _NO_TRANSFER)
    update_weights = _refused_at_once("update_weights", _NO_TRANSFER)
    finish_weight_update = _refused_at_once("finish_weight_update", _NO_TRANSFER)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if isinstance(value, bool) or value not in choices:
        limit = "one of " + ", ".join(map(repr, choices))
        raise RequestError(
            f"{name} must be {limit}, got {value!r:.100}",
            parameter=name,
            value=f"{value!s:.100}",
            limit=limit,
        )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        message = f"{name} must be True or False, got {value!r:.100}"
        raise RequestError(message, parameter=name, value=f"{value!s:.100}", limit="True or False")
