"""Engine arguments that only vLLM has: the values that ask for nothing here, and why any other is refused.

So a program may go on saying what vLLM takes for granted: `pipeline_parallel_size=1`, `quantization=None`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ipc.errors import ConfigError

_FOLDER = "give model (or tokenizer) the folder that holds what is wanted"
_GRAPHS = "the engine chooses its CUDA graphs itself; enforce_eager=True is without them"
_ONE_NODE = "an engine is tensor_parallel_size workers on one machine"
_NO_REPLICAS = "there are no replicas in one engine"
_NO_LORA = "there are no LoRA adapters yet"
_NO_DRAFTS = "there is no speculative decoding"
_NO_TRANSFER = "KV caches are not transferred between engines"
_TEXT_ONLY = "text is all that there is here"

NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    # the model and its files
    "tokenizer_mode": (
        ("auto", "hf"),
        "tokenizers are read from tokenizer.json, or vocab.json and merges.txt",
    ),
    # True is only a permission, and nobody takes it.
    "trust_remote_code": ((False, True), "no code of models is run"),
    "revision": ((None,), _FOLDER),
    "code_revision": ((None,), "no code of models is run"),
    "tokenizer_revision": ((None,), _FOLDER),
    "hf_token": ((None,), "HF_TOKEN in the environment is taken"),
    "hf_config_path": ((None,), _FOLDER),
    "download_dir": ((None,), "HF_HOME in the environment says where files are kept"),
    "config_format": (("auto", "hf"), "the configuration is config.json, or a GGUF file's own"),
    "runner": (("auto", "generate"), "models generate; there are no others"),
    "convert": (("auto", "none"), "models generate; there are no others"),
    "model_impl": (("auto",), "there is one implementation of each model"),
    "model_loader_extra_config": ((None, {}), "the loaders have no options"),
    "safetensors_load_strategy": ((None,), "the loaders have no options"),
    "quantization": ((None,), "weights are not quantized"),
    "quantization_config": ((None,), "weights are not quantized"),
    "cpu_offload_gb": ((0,), "weights stay on the device"),
    "logits_processors": ((None, []), "no code is sent to the workers"),
    # how steps are run
    "optimization_level": ((2,), _GRAPHS),
    "performance_mode": (("balanced",), "max_num_batched_tokens says it more exactly"),
    "compilation_config": ((None, {}), _GRAPHS),
    "cudagraph_capture_sizes": ((None,), _GRAPHS),
    "max_cudagraph_capture_size": ((None,), _GRAPHS),
    "attention_backend": ((None,), "there is one for each device"),
    "attention_config": ((None, {}), "there is one attention for each device"),
    "disable_sliding_window": ((False,), "windows are the model's"),
    "disable_cascade_attn": ((True,), "there is no cascade attention"),
    # the KV cache
    "kv_cache_dtype": (("auto",), "the KV cache has the model's dtype"),
    "prefix_caching_hash_algo": (("sha256",), "blocks are found by SHA-256"),
    "kv_offloading_size": ((None,), "KV blocks stay on the device"),
    "kv_transfer_config": ((None,), _NO_TRANSFER),
    "kv_events_config": ((None,), _NO_TRANSFER),
    "ec_transfer_config": ((None,), _NO_TRANSFER),
    # scheduling
    "async_scheduling": ((None, True), "the core always plans ahead of the device"),
    "stream_interval": ((1,), "every token is streamed; a reader that lags gets them merged"),
    "long_prefill_token_threshold": ((0,), "beside decoding requests prompts get a quarter of each step"),
    "max_num_partial_prefills": ((1,), "a step takes as many prompts as its budget holds"),
    "max_long_partial_prefills": ((1,), "a step takes as many prompts as its budget holds"),
    "scheduler_cls": ((None,), "there is one scheduler"),
    # processes
    "pipeline_parallel_size": ((1,), _ONE_NODE),
    "data_parallel_size": ((1,), _NO_REPLICAS),
    "data_parallel_rank": ((None, 0), _NO_REPLICAS),
    "data_parallel_backend": (("mp",), _NO_REPLICAS),
    "decode_context_parallel_size": ((1,), _ONE_NODE),
    "prefill_context_parallel_size": ((1,), _ONE_NODE),
    "enable_expert_parallel": ((False,), "there are no models with experts"),
    "distributed_executor_backend": ((None, "mp"), "workers are processes of this machine"),
    "disable_custom_all_reduce": ((False,), "ranks on GPUs always sum in kernels of their own"),
    "nnodes": ((1,), _ONE_NODE),
    "node_rank": ((0,), _ONE_NODE),
    "worker_cls": (("auto",), "no code is sent to the workers"),
    "worker_extension_cls": (("",), "no code is sent to the workers"),
    # features
    "enable_lora": ((False,), _NO_LORA),
    "max_loras": ((1,), _NO_LORA),
    "max_lora_rank": ((16,), _NO_LORA),
    "speculative_config": ((None,), _NO_DRAFTS),
    "spec_method": ((None,), _NO_DRAFTS),
    "spec_model": ((None,), _NO_DRAFTS),
    "spec_tokens": ((None,), _NO_DRAFTS),
    "enable_prompt_embeds": ((False,), "prompts are text or token ids"),
    "limit_mm_per_prompt": ((None, {}), _TEXT_ONLY),
    "mm_processor_kwargs": ((None, {}), _TEXT_ONLY),
    "reasoning_parser": (("", None), "the server has it: `headrace serve --reasoning-parser`"),
    "enable_sleep_mode": ((False, True), "sleep() always works"),
    "weight_transfer_config": ((None,), "weights come from files only"),
    # logs and measurements
    "enable_log_requests": ((False,), "requests are not logged; the server has an access log"),
    "aggregate_engine_logging": ((False,), "there is one engine"),
    "otlp_traces_endpoint": ((None,), "the server has it: `headrace serve --otlp-traces-endpoint`"),
    "collect_detailed_traces": ((None,), "there are no traces below requests"),
    "profiler_config": ((None,), "see torch_profiler_dir"),
    "shutdown_timeout": ((0,), "wait_for_requests_to_drain() before shutdown() lets requests end"),
    "additional_config": ((None, {}), "there are no plugins"),
}
"""Name -> values that ask for nothing, the first of them vLLM's own default, and why others are refused."""

_NONE_IS_DEFAULT = ("block_size", "enable_chunked_prefill", "enable_prefix_caching", "max_num_seqs")
"""Ours, whose default in vLLM is None."""


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say something here, of those that `EngineArgs` takes in vLLM.

    Raises ConfigError for a value that asks for what is not here. Names that vLLM does not know either stay.
    """
    said: dict[str, Any] = {}
    for name, value in given.items():
        if name in NEUTRAL:
            _check_neutral(name, value)
        elif value is not None or name not in _NONE_IS_DEFAULT:
            said[name] = _in_our_words(name, value)
    return said


def _in_our_words(name: str, value: Any) -> Any:
    """An argument of ours in the forms that vLLM takes beside our own."""
    match name, value:
        case "max_model_len", -1 | "auto":
            return None  # as long as the KV cache allows, either way
        case "served_model_name", [str(only)]:
            return only
        case "dtype", _ if str(value).startswith("torch."):
            return str(value).removeprefix("torch.")
    return value


def _check_neutral(name: str, value: object) -> None:
    neutral, why = NEUTRAL[name]
    # 1 is not True here, nor 0 False.
    if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
        return
    limit = " or ".join(map(repr, neutral))
    message = f"{name} is not supported: {why}; it must be {limit}, got {value!r:.200}"
    raise ConfigError(message, parameter=name, value=value, limit=limit)
