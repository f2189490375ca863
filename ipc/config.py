"""EngineConfig: resolved once, by whoever starts the core, and read-only everywhere after.

What is only known once the weights are on the device (number of KV blocks, the context length that fits)
is not written back here: it travels in `messages.EngineInfo`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Device: TypeAlias = Literal["cpu", "cuda"]
LoadFormat: TypeAlias = Literal["safetensors", "gguf", "dummy", "oracle"]
SchedulingPolicy: TypeAlias = Literal["fcfs", "priority"]
LogprobsMode: TypeAlias = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]


class StructuredOutputsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for every request with `structured_outputs`."""

    backend: Literal["auto", "guidance"] = "auto"
    """llguidance either way: there is no other."""
    disable_any_whitespace: bool = False
    """JSON comes without whitespace between its tokens."""
    disable_additional_properties: bool = False
    """JSON objects have no properties but those that their schema names."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that core and workers need to know; names as in vLLM's `EngineArgs`."""

    model: str
    """The model as the user named it."""
    model_path: str
    """A folder with `config.json`, or a GGUF file; absolute."""
    served_model_name: str
    tokenizer: str | None
    """A folder or GGUF file that holds the tokenizer; None with `skip_tokenizer_init`."""
    hf_config: dict[str, Any]
    """The model's `config.json` (made from the header for a GGUF file)."""
    architecture: str
    """The entry of `hf_config["architectures"]` that selects the model file."""
    vocab_size: int
    eos_token_ids: list[int]
    """The model's end-of-sequence ids; the first is the primary one."""
    default_sampling: dict[str, float | int]
    """Sampling defaults from `generation_config.json`, under `SamplingParams` names."""

    dtype: Dtype
    device: Device
    load_format: LoadFormat
    seed: int
    tensor_parallel_size: int
    enforce_eager: bool

    max_model_len: int
    """Longest prompt + output, tokens."""
    max_model_len_is_explicit: bool
    """False lets the core lower `max_model_len` to what the KV cache holds, instead of refusing."""
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    scheduling_policy: SchedulingPolicy
    max_queued_requests: int = 65_536
    """Requests that may wait for a slot."""
    max_queued_tokens: int = 1 << 28
    """Prompt tokens of those."""

    block_size: int
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None

    poison_blocks: bool = False
    """For debugging: overwrite a KV block's old content when it is given out anew."""
    torch_profiler_dir: str | None = None
    """Absolute; None refuses profiles."""

    log_stats: bool
    hang_seconds: float = 8.0
    """Workers without a sign of progress for so long are taken down and started again."""
    max_replays: int = 1
    """How often a request is run again that was running when the workers or the core crashed, and has got no
    further since."""
    max_logprobs: int
    """Most logprobs beside the chosen token's that a request may ask for; -1: the whole vocabulary."""
    logprobs_mode: LogprobsMode
    """What logprobs tell: the scores before or after all that changes them, and whether normalized."""
    batch_invariant: bool = False
    """Logits are the same bits whatever runs beside a request."""

    tokenizer_json: str | None = None
    """The tokenizer in a file of the `tokenizers` package, to match grammars with; None: no grammars."""
    structured_outputs_config: StructuredOutputsConfig = StructuredOutputsConfig()

    def why_no_grammars(self) -> str | None:
        """Why this engine can serve no `structured_outputs`; None when it can."""
        if self.load_format == "oracle":
            return "the oracle chooses its tokens without logits"
        if self.tokenizer_json is None:
            return "the engine has no tokenizer to match text with"
        if not self.eos_token_ids:
            return "the model has no end-of-sequence token"
        return None
