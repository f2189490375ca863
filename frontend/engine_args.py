"""AsyncEngineArgs: what a caller may say about an engine, and its one resolution into an EngineConfig.

The same defaults through every door: library, command line, daemon, server. Nothing after `resolve` looks at
the environment, at defaults or at "auto".
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ..ipc.config import (
    Device,
    Dtype,
    EngineConfig,
    LoadFormat,
    LogprobsMode,
    SchedulingPolicy,
    StructuredOutputsConfig,
)
from ..ipc.curve import ClientKeys, client_keys
from ..ipc.errors import ConfigError
from . import model_files
from .checks import is_unicode
from .model_files import ModelFiles
from .names import nearest
from .tokenizer_json import tokenizer_json
from .vllm_arguments import NEUTRAL, translated

if TYPE_CHECKING:
    import argparse

_DTYPES: dict[str, Dtype] = {
    "float": "float32",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "half": "float16",
    "float16": "float16",
}
_CHOICES = {
    "dtype": ("auto", *_DTYPES),
    "load_format": ("auto", "safetensors", "gguf", "dummy", "oracle"),
    "scheduling_policy": ("fcfs", "priority"),
    "logprobs_mode": ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
}
_NO_WEIGHTS = ("dummy", "oracle")
_BATCHED_TOKENS: dict[Device, int] = {"cuda": 8192, "cpu": 2048}
_MAX_SEED = 2**63 - 1
_MAX_INT = 2**31 - 1


class _NamedArguments(type):
    """Makes objects of keywords that may be vLLM's; one that nobody knows is told the nearest."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        said = translated(kwargs)
        for name in said:
            if name not in FIELDS:
                message = f"unknown engine argument {name!r}{nearest(name, FIELDS)}"
                raise ConfigError(message, parameter=name, value=said[name])
        return super().__call__(*args, **said)


@dataclass
class AsyncEngineArgs(metaclass=_NamedArguments):
    """Arguments of an engine: vLLM's names and meanings. None means: find out or take the default.

    Those that only vLLM has may be given where they ask for nothing: see `vllm_arguments.py`.
    """

    model: str = "Qwen/Qwen3-0.6B"
    """A folder, a .gguf file, a Hugging Face id, or "demo"."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out."""
    dtype: str = "auto"
    """"auto": the checkpoint's, but bfloat16 for float32 ones."""
    seed: int = 0
    max_model_len: int | None = None
    """Longest prompt + output; None: the model's, lowered to what the KV cache holds."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    """Tokens of one step; None: 8192 on a GPU, 2048 on a CPU."""
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache on each rank; overrides `gpu_memory_utilization`."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    load_format: str = "auto"
    served_model_name: str | None = None
    generation_config: str = "auto"
    """Where sampling defaults come from: "auto" (the model), "vllm" (none), or a folder."""
    override_generation_config: dict[str, Any] | None = None
    """What holds instead of those, in generation_config.json's names: `{"temperature": 0.6}`."""
    hf_overrides: dict[str, Any] | None = None
    """What holds instead of what config.json says: `{"rope_scaling": {"rope_type": "yarn", ...}}`."""
    scheduling_policy: str = "fcfs"
    """"fcfs", or "priority": requests may name one, and the more urgent displace the less."""
    max_queued_requests: int = 65_536
    """Requests that may wait for a slot; beyond, they are refused with OverloadedError."""
    max_queued_tokens: int = 1 << 28
    """Prompt tokens of those."""
    max_logprobs: int = 20
    """Most logprobs that a request may ask for; -1: the whole vocabulary."""
    batch_invariant: bool = False
    """Logits are the same bits whatever runs beside a request; on CPUs and one GPU, not on several ranks."""
    logprobs_mode: str = "raw_logprobs"
    """"raw_logprobs" or "raw_logits": as the model gives them; "processed_...": as the draw sees them."""
    hang_seconds: float = 8.0
    """Workers that make no progress for so long have hung and are started again; with the time until it is
    noticed, health turns false within 10 seconds."""
    max_replays: int = 1
    """How often a request is run again that was running when a worker or the core crashed, and has got no
    further since; then it ends with a RequestCrashedError."""
    poison_blocks: bool = False
    """For debugging: overwrite a KV block's old content when it is given out anew."""
    torch_profiler_dir: str | None = None
    """Where `start_profile` leaves its traces; without it profiles are refused."""
    disable_log_stats: bool = False
    structured_outputs_config: StructuredOutputsConfig | dict[str, Any] | None = None
    """Defaults of `structured_outputs`: `{"backend": "guidance", "disable_any_whitespace": true, ...}`."""
    engine_core_address: str | None = None
    """Attach to the engine core that listens there instead of starting one."""
    engine_core_reconnect_seconds: float = 60.0
    """How long to wait for that core: to load its model, if it has just started, and to come back when it is
    gone; then the engine is dead."""
    engine_core_curve_server_key: str | None = None
    """File with that core's public CURVE key."""
    engine_core_curve_secret_key: str | None = None
    """File with this program's own secret CURVE key."""

    @staticmethod
    def add_cli_args(
        parser: argparse.ArgumentParser, async_args_only: bool = False
    ) -> argparse.ArgumentParser:
        """Add a flag for each argument; returns the parser. With `async_args_only` there are none."""
        from .flags import add_flags, add_hidden_flags  # noqa: PLC0415 - few programs make a parser of it

        if not async_args_only:
            add_flags(parser, "engine arguments", AsyncEngineArgs, fills=True)
            add_hidden_flags(parser, NEUTRAL, fills=True)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> AsyncEngineArgs:
        """What such a parser has read; whatever else `args` holds is the program's own."""
        return cls(**known_arguments(vars(args)))


EngineArgs = AsyncEngineArgs
FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(AsyncEngineArgs)}

ATTACHING = tuple(name for name in FIELDS if name.startswith("engine_core_"))
"""Arguments that lead to a core which runs already."""


def known_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are arguments of an engine, here or in vLLM."""
    return {name: value for name, value in given.items() if name in FIELDS or name in NEUTRAL}


def attach_keys(args: AsyncEngineArgs) -> ClientKeys | None:
    """The CURVE keys for `engine_core_address`, both or none. Raises ConfigError."""
    names = ("engine_core_curve_server_key", "engine_core_curve_secret_key")
    keys = client_keys(args.engine_core_curve_server_key, args.engine_core_curve_secret_key, *names)
    if keys is not None and args.engine_core_address is None:
        message = f"{names[0]} and {names[1]} are for an engine_core_address"
        raise ConfigError(message, parameter=names[0], limit="engine_core_address")
    return keys


def resolve(args: AsyncEngineArgs) -> EngineConfig:
    """Check every argument, find the model's files and settle every default. Raises ConfigError."""
    args = dataclasses.replace(args)
    _check(args)
    attach_keys(args)
    load_format = args.load_format
    files = model_files.read_model(
        args.model, args.generation_config, with_weights=load_format not in _NO_WEIGHTS
    )
    files = model_files.overridden(files, args.hf_overrides or {}, args.override_generation_config or {})
    device = _device()
    max_model_len = _max_model_len(args, files.hf_config)
    tokenizer = _tokenizer(args, files)
    return EngineConfig(
        model=args.model,
        model_path=str(files.path),
        served_model_name=args.served_model_name or args.model,
        tokenizer=tokenizer,
        hf_config=files.hf_config,
        architecture=_architecture(files),
        vocab_size=_from_model(files, "vocab_size"),
        eos_token_ids=model_files.eos_token_ids(files),
        default_sampling=model_files.default_sampling(files),
        dtype=_dtype(args.dtype, files.hf_config, device),
        device=device,
        load_format=_load_format(load_format, files),
        seed=args.seed,
        tensor_parallel_size=args.tensor_parallel_size,
        enforce_eager=args.enforce_eager,
        max_model_len=max_model_len,
        max_model_len_is_explicit=args.max_model_len is not None,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=_max_num_batched_tokens(args, device, max_model_len),
        enable_chunked_prefill=args.enable_chunked_prefill,
        enable_prefix_caching=args.enable_prefix_caching,
        scheduling_policy=cast(SchedulingPolicy, args.scheduling_policy),
        max_queued_requests=args.max_queued_requests,
        max_queued_tokens=args.max_queued_tokens,
        block_size=args.block_size,
        num_gpu_blocks_override=args.num_gpu_blocks_override,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        hang_seconds=args.hang_seconds,
        max_replays=args.max_replays,
        poison_blocks=args.poison_blocks,
        torch_profiler_dir=args.torch_profiler_dir,
        log_stats=not args.disable_log_stats,
        tokenizer_json=_tokenizer_json(tokenizer, load_format),
        structured_outputs_config=_structured_outputs(args) or StructuredOutputsConfig(),
        max_logprobs=args.max_logprobs,
        logprobs_mode=cast(LogprobsMode, args.logprobs_mode),
        batch_invariant=_batch_invariant(args, device),
    )


def check_attached(args: AsyncEngineArgs, config: EngineConfig) -> None:
    """Refuse arguments that contradict the engine core at `args.engine_core_address`.

    Arguments left at their default say nothing. Raises ConfigError.
    """
    args = dataclasses.replace(args)
    _check(args)
    names = {config.model, config.model_path, config.served_model_name}
    for name, default in FIELDS.items():
        wanted = getattr(args, name)
        if wanted == default or name in ("tokenizer", "skip_tokenizer_init", *ATTACHING):
            continue
        running = getattr(config, "log_stats" if name == "disable_log_stats" else name, None)
        if name == "model":
            agrees = wanted in names
        elif name == "dtype":
            agrees = _DTYPES.get(wanted) == running
        elif name == "disable_log_stats":
            agrees = wanted is not running
        elif name == "hf_overrides":
            running = {key: config.hf_config.get(key) for key in wanted}
            agrees = wanted == running
        elif name == "override_generation_config":
            running = {"eos_token_id": config.eos_token_ids, **config.default_sampling}
            agrees = model_files.has_generation(config, wanted)
        else:
            agrees = wanted == running or name == "generation_config"
        if not agrees:
            message = (
                f"{name}={wanted!r}, but the engine core at {args.engine_core_address!r} has {running!r}"
            )
            raise ConfigError(message, parameter=name, value=wanted, limit=running)


# --- checks ----------------------------------------------------------------------------------------------

_INTEGERS = {
    "seed": (0, _MAX_SEED),
    "max_model_len": (1, _MAX_INT),
    "max_num_seqs": (1, 65536),
    "max_num_batched_tokens": (1, _MAX_INT),
    "max_queued_requests": (0, _MAX_INT),
    "max_queued_tokens": (0, _MAX_SEED),
    "block_size": (1, 256),
    "num_gpu_blocks_override": (1, _MAX_INT),
    "kv_cache_memory_bytes": (1, _MAX_SEED),
    "tensor_parallel_size": (1, 64),
    "max_logprobs": (-1, 1 << 20),
    "max_replays": (0, 100),
}
_TEXTS = (
    "model",
    "tokenizer",
    "dtype",
    "load_format",
    "served_model_name",
    "generation_config",
    "scheduling_policy",
    "logprobs_mode",
    "torch_profiler_dir",
    "engine_core_address",
    "engine_core_curve_server_key",
    "engine_core_curve_secret_key",
)
_SAYS_NOTHING = ("disable_fallback", "reasoning_parser", "reasoning_parser_plugin", "enable_in_reasoning")
_FLAGS = (
    "skip_tokenizer_init",
    "batch_invariant",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "enforce_eager",
    "poison_blocks",
    "disable_log_stats",
)


def _check(args: AsyncEngineArgs) -> None:
    """Types, ranges and choices, brought to plain `str`, `int` and `float`."""
    for name in _TEXTS:
        _check_text(args, name)
    for name, choices in _CHOICES.items():
        value = getattr(args, name)
        if value not in choices:
            raise _refusal(name, value, "one of " + ", ".join(choices) + nearest(value, choices))
    for name in _FLAGS:
        if not isinstance(getattr(args, name), bool):
            raise _refusal(name, getattr(args, name), "True or False")
    for name, (low, high) in _INTEGERS.items():
        _check_integer(args, name, low, high)
    if args.torch_profiler_dir is not None:
        args.torch_profiler_dir = os.path.abspath(args.torch_profiler_dir)
    if args.block_size & (args.block_size - 1):
        raise _refusal("block_size", args.block_size, "a power of two from 1 to 256")
    args.structured_outputs_config = _structured_outputs(args)
    _check_json(args, "hf_overrides")
    _check_json(args, "override_generation_config")
    model_files.check_generation(args.override_generation_config or {}, "override_generation_config")
    _check_number(args, "gpu_memory_utilization", 1.0, "a number in (0, 1]")
    _check_number(args, "hang_seconds", math.inf, "a number of seconds > 0")
    _check_number(args, "engine_core_reconnect_seconds", math.inf, "a number of seconds > 0")


def _check_text(args: AsyncEngineArgs, name: str) -> None:
    value = getattr(args, name)
    if isinstance(value, Path):
        setattr(args, name, str(value))
    elif not (isinstance(value, str) and value) and not (value is None and FIELDS[name] is None):
        raise _refusal(name, value, "a string" if value != "" else "a string of at least one character")
    text = getattr(args, name)
    if text is not None and not is_unicode(text):  # a path of other bytes, or in a locale that lacks them
        raise _refusal(name, text, "text in UTF-8")


def _check_integer(args: AsyncEngineArgs, name: str, low: int, high: int) -> None:
    value = getattr(args, name)
    if value is None and FIELDS[name] is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refusal(name, value, f"an integer from {low} to {high}")
    setattr(args, name, int(value))


def _structured_outputs(args: AsyncEngineArgs) -> StructuredOutputsConfig | None:
    """None when nothing is said."""
    given = args.structured_outputs_config
    if given is None or isinstance(given, StructuredOutputsConfig):
        return given
    try:
        # vLLM's other fields are refused when they say something.
        said = {name: value for name, value in given.items() if name not in _SAYS_NOTHING or value}
        return msgspec.convert(said, StructuredOutputsConfig)
    except (msgspec.ValidationError, AttributeError) as error:
        limit = "backend 'auto' or 'guidance', disable_any_whitespace, disable_additional_properties"
        message = f"structured_outputs_config: {error}, got {given!r:.200} (known are {limit})"
        raise ConfigError(message, parameter="structured_outputs_config", value=given, limit=limit) from error


def _check_json(args: AsyncEngineArgs, name: str) -> None:
    """An object as it may stand in a JSON file, or None."""
    value = getattr(args, name)
    try:
        read = None if value is None else msgspec.json.decode(msgspec.json.encode(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        read = ...
    if read is not None and not isinstance(read, dict):
        raise _refusal(name, value, "a dict that JSON can hold")
    setattr(args, name, read)


def _check_number(args: AsyncEngineArgs, name: str, high: float, limit: str) -> None:
    """A finite number > 0 and at most `high`."""
    value = getattr(args, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _refusal(name, value, limit)
    setattr(args, name, float(value))
    if not 0 < float(value) <= high:
        raise _refusal(name, value, limit)


def _refusal(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(f"{name} must be {limit}, got {value!r}", parameter=name, value=value, limit=limit)


# --- defaults --------------------------------------------------------------------------------------------


def _device() -> Device:
    """A GPU when there is one and it is not hidden: asking the driver would need torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return "cuda" if Path("/dev/nvidiactl").exists() and not hidden else "cpu"


def _dtype(wanted: str, hf_config: dict[str, Any], device: Device) -> Dtype:
    if wanted != "auto":
        return _DTYPES[wanted]
    stored = str(hf_config.get("dtype") or hf_config.get("torch_dtype")).removeprefix("torch.")
    # float16 on a CPU is emulated, several times slower than bfloat16.
    return "float16" if stored == "float16" and device == "cuda" else "bfloat16"


def _load_format(wanted: str, files: ModelFiles) -> LoadFormat:
    if wanted in _NO_WEIGHTS:
        return cast(LoadFormat, wanted)
    found: LoadFormat = "gguf" if files.is_gguf else "safetensors"
    if wanted not in ("auto", found):
        message = f"load_format={wanted!r}, but {str(files.path)!r} holds {found}"
        raise ConfigError(message, parameter="load_format", value=wanted, limit=found)
    if found == "safetensors" and not any(files.path.glob("*.safetensors")):
        message = f"model: no *.safetensors in {str(files.path)!r} (load_format='dummy' needs none)"
        raise ConfigError(message, parameter="model", value=files.path, limit="*.safetensors")
    return found


def _architecture(files: ModelFiles) -> str:
    names = files.hf_config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        message = f"model: the config.json of {str(files.path)!r} names no 'architectures'"
        raise ConfigError(message, parameter="model", value=files.path, limit="architectures")
    return names[0]


def _from_model(files: ModelFiles, key: str) -> int:
    value = files.hf_config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        message = f"model: the config.json of {str(files.path)!r} has {key}={value!r}, not a positive integer"
        raise ConfigError(message, parameter="model", value=files.path, limit=key)
    return value


def _max_model_len(args: AsyncEngineArgs, hf_config: dict[str, Any]) -> int:
    trained = hf_config.get("max_position_embeddings")
    if not isinstance(trained, int):
        return args.max_model_len or 2048
    limit = max(trained, _scaled_length(hf_config, trained))
    if args.max_model_len is None:
        return limit if limit > 0 else 2048
    if args.max_model_len > limit:
        reach = f"max_position_embeddings={trained}" + (f", scaled {limit}" if limit > trained else "")
        message = f"max_model_len={args.max_model_len} is beyond the model's {reach}"
        raise ConfigError(message, parameter="max_model_len", value=args.max_model_len, limit=limit)
    return args.max_model_len


def _scaled_length(hf_config: dict[str, Any], trained: int) -> int:
    """Tokens that linear and YaRN scaling stretch the trained length to; 0: neither, or nonsense, which the
    worker refuses by name.
    """
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters")
    if not isinstance(rope, dict):
        return 0
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    start = rope.get("original_max_position_embeddings") if kind == "yarn" else trained
    start = trained if start is None else start
    if kind not in ("linear", "yarn") or not isinstance(start, int) or not isinstance(factor, int | float):
        return 0
    return int(start * factor) if start * factor < 1 << 31 else 0


def _batch_invariant(args: AsyncEngineArgs, device: Device) -> bool:
    if not args.batch_invariant:
        return False
    reason = limit = None
    if args.tensor_parallel_size > 1:
        reason, limit = (
            "NCCL and gloo sum the ranks in an order that depends on the batch",
            "tensor_parallel_size=1",
        )
    elif device == "cpu" and args.block_size > 64:
        reason, limit = "on CPUs it needs block_size <= 64", "block_size <= 64"
    if reason is not None:
        message = f"batch_invariant=True is not supported here: {reason}"
        raise ConfigError(message, parameter="batch_invariant", value=True, limit=limit)
    return True


def _max_num_batched_tokens(args: AsyncEngineArgs, device: Device, max_model_len: int) -> int:
    wanted = args.max_num_batched_tokens
    if args.enable_chunked_prefill:
        return wanted or _BATCHED_TOKENS[device]
    if wanted is not None and wanted < max_model_len:
        message = (
            f"max_num_batched_tokens={wanted} cannot hold a prompt of max_model_len={max_model_len} tokens; "
            "raise it, lower max_model_len or leave enable_chunked_prefill on"
        )
        raise ConfigError(message, parameter="max_num_batched_tokens", value=wanted, limit=max_model_len)
    return wanted or max(_BATCHED_TOKENS[device], max_model_len)


def _tokenizer(args: AsyncEngineArgs, files: ModelFiles) -> str | None:
    if args.skip_tokenizer_init:
        return None
    if args.tokenizer is not None:
        return str(model_files.find_model(args.tokenizer, with_weights=False, parameter="tokenizer"))
    if not files.has_tokenizer:
        names = ", ".join(model_files.TOKENIZER_FILES)
        message = (
            f"tokenizer: {str(files.path)!r} has none of {names}; name another folder with tokenizer=..., or "
            "set skip_tokenizer_init=True to work with token ids"
        )
        raise ConfigError(message, parameter="tokenizer", value=files.path, limit=names)
    return str(files.path)


def _tokenizer_json(tokenizer: str | None, load_format: str) -> str | None:
    if tokenizer is None or load_format == "oracle":
        return None
    path = tokenizer_json(Path(tokenizer))
    return None if path is None else str(path)
