"""What a request gives back: vLLM's two classes, with its field names and their order.

Immutable: an output that has been handed out never changes, whatever the request does next.
Fields of features that do not exist yet are always None.
"""

from __future__ import annotations

import msgspec

from .logprobs import PromptLogprobs, SampleLogprobs


class CompletionOutput(msgspec.Struct, frozen=True, gc=False):
    """One completion of a prompt: all of it so far, or with DELTA what is new."""

    index: int
    """0 .. n-1"""
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Of all tokens so far, with DELTA too; None when no logprobs were asked for."""
    logprobs: SampleLogprobs | None = None
    """One position for each of `token_ids`; None when no logprobs were asked for."""
    routed_experts: None = None
    finish_reason: str | None = None
    """"stop", "length", "repetition", "abort" or "timeout"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it, or "repetition_detected"; None for end of sequence."""
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct, frozen=True, gc=False):
    """When things happened to a request, as this process saw them; vLLM's `RequestStateStats`.

    All `_ts` are `time.monotonic()` seconds of this process; 0.0 is "not yet". With n > 1 the first and the
    last token are those of all completions together.
    """

    num_generation_tokens: int
    arrival_time: float
    """Wall clock, seconds since the epoch."""
    queued_ts: float
    """It arrived; tokenizing its prompt comes next."""
    scheduled_ts: float
    """It left the core's queue for the first time."""
    first_token_ts: float
    last_token_ts: float
    is_corrupted: None = None

    @property
    def queued_seconds(self) -> float | None:
        """Tokenized and queued, until it ran; None until then."""
        return self.scheduled_ts - self.queued_ts if self.scheduled_ts else None

    @property
    def prefill_seconds(self) -> float | None:
        """From leaving the queue to the first token."""
        return self.first_token_ts - self.scheduled_ts if self.first_token_ts else None

    @property
    def first_token_latency(self) -> float | None:
        """From its arrival to the first token (TTFT), seconds."""
        return self.first_token_ts - self.queued_ts if self.first_token_ts else None

    @property
    def mean_inter_token_latency(self) -> float | None:
        """Seconds per token after the first; None with fewer than two tokens."""
        if self.num_generation_tokens < 2:
            return None
        return (self.last_token_ts - self.first_token_ts) / (self.num_generation_tokens - 1)

    @property
    def total_seconds(self) -> float | None:
        """From its arrival to the last token so far."""
        return self.last_token_ts - self.queued_ts if self.last_token_ts else None


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """The state of a request, or with DELTA what changed in it."""

    request_id: str
    prompt: str | None
    """None when the prompt was token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    """One position for each of `prompt_token_ids`, the first without any; with DELTA in the first output."""
    outputs: list[CompletionOutput]
    """CUMULATIVE and FINAL_ONLY: all n, by index. DELTA: those with news."""
    finished: bool
    """All n completions have ended; nothing follows."""
    metrics: RequestMetrics | None = None
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; None before the request has started."""
    num_cache_creation_tokens: None = None
    kv_transfer_params: None = None
    ec_transfer_params: None = None
