"""SamplingParams: how one request's tokens are chosen and shown. Names, defaults and limits are vLLM's.

Knows every field of vLLM's class; those that Headrace does not have are refused as soon as they are set,
never ignored. What the engine needs of it goes over the wire as `messages.Sampling`: see `sampling_wire.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..ipc.errors import RequestError
from .checks import INT32_MAX, integer, real, refusal, texts, token_ids
from .names import nearest
from .repetition import RepetitionDetectionParams
from .structured_outputs import StructuredOutputsParams

logger = logging.getLogger("headrace")

MAX_N = 16384
MAX_STRINGS = 1024
"""Stop strings, or bad words."""
MAX_STRING_LENGTH = 4096
MAX_BAD_CHARACTERS = 1 << 18
"""Of all bad words: they are tokenized while the event loop waits."""
MAX_TOKEN_IDS = 1 << 18
"""In one list: as many as the largest vocabularies have."""
MAX_LOGPROB_TOKEN_IDS = 128
_MAX_BIAS = 100.0
_FLOAT32_MAX = 3.4028234663852886e38
_MIN_TEMPERATURE = 0.01
"""A lower one (but 0) overflows the logits in half precision."""
_MAX_SEED = 2**63 - MAX_N


class RequestOutputKind(Enum):
    """What each output of a stream holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the output before."""
    FINAL_ONLY = 2
    """Everything, once, at the end."""


@dataclass
class SamplingParams:
    """Sampling parameters of one request.

    May be changed between requests: the engine checks and copies it whenever a request is made.
    Raises RequestError, a ValueError, that names the parameter, the value and the limit.
    """

    n: int = 1
    """Completions of the same prompt; completion i is seeded with `seed + i`."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1 is off."""
    min_p: float = 0.0
    seed: int | None = None
    """None or -1 draws one."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None is as many as the context length leaves."""
    min_tokens: int = 0
    """No end-of-sequence token, stop token or stop string ends the request before that many."""
    logprobs: int | None = None
    """With each token its logprob and those of so many of the likeliest; True is 1, -1 is all."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, which are then computed without reading the prefix cache."""
    logprob_token_ids: list[int] | None = None
    """Instead of the likeliest tokens these; `logprobs`, if it is given, must be their number."""
    flat_logprobs: bool = False
    """Logprobs as `FlatLogprobs`, not as a list of dicts."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility: fast tokenizers put no spaces there."""
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False
    """Accepted for compatibility: the engine never keeps this object."""
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these token ids; whole tokens only, so -100 all but forbids one."""
    allowed_token_ids: list[int] | None = None
    """Only these may come."""
    extra_args: dict[str, Any] | None = None
    routed_experts_prompt_start: int = 0
    bad_words: list[str] | None = None
    """Texts that the output must not contain; matched token by token, as they are tokenized at the start of a
    text and after a space."""
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    """Tokens after which the end-of-thinking token is forced; None or -1 is off."""
    repetition_detection: RepetitionDetectionParams | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        for name in kwargs:
            if name not in _FIELDS:
                message = f"SamplingParams has no parameter {name!r}{nearest(name, _FIELDS)}"
                raise RequestError(message, parameter=name, value=kwargs[name])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.verify()

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """Make one from keywords of which those that are None mean the default, but for `max_tokens`.

        As in vLLM `max_tokens=None` is no limit, and `logit_bias` may have its token ids as text and is
        clamped to [-100, 100].
        """
        given = {name: value for name, value in kwargs.items() if value is not None or name == "max_tokens"}
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = _clamped(given["logit_bias"])
        return cls(**given)

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def verify(self) -> None:
        """Check every field and bring it to its plain form.

        What depends on the model (its vocabulary, its tokenizer) is checked when the request is made.
        """
        self._refuse_unsupported()
        self._verify_numbers()
        self._verify_lengths()
        self._verify_stops()
        self._verify_rules()
        self._verify_logprobs()
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise refusal(name, getattr(self, name), "True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise refusal("output_kind", self.output_kind, "a RequestOutputKind")
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputsParams
        ):
            raise refusal("structured_outputs", self.structured_outputs, "a StructuredOutputsParams")
        if self.stop and not self.detokenize:
            message = "stop strings are only supported when detokenize is True, got detokenize=False"
            raise RequestError(message, parameter="stop", value=self.stop, limit="detokenize=True")

    def _refuse_unsupported(self) -> None:
        for name, (default, reason) in _UNSUPPORTED.items():
            value = getattr(self, name)
            # False is not 0 here, nor 0 False.
            if value is default or (value == default and type(value) is type(default)) or value == {}:
                continue
            message = f"{name} is not supported: {reason}; got {value!r:.200}"
            raise RequestError(message, parameter=name, value=f"{value!r:.200}", limit=f"{name}={default!r}")

    def _verify_numbers(self) -> None:
        for name, (low, high, limit) in _RANGES.items():
            value = real(name, getattr(self, name), limit)
            if not low <= value <= high:
                raise refusal(name, value, limit)
            setattr(self, name, value)
        if self.top_p == 0:
            raise refusal("top_p", self.top_p, _RANGES["top_p"][2])
        if 0 < self.temperature < _MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s", self.temperature, _MIN_TEMPERATURE)
            self.temperature = _MIN_TEMPERATURE
        if self.repetition_penalty == 0:
            raise refusal("repetition_penalty", self.repetition_penalty, _RANGES["repetition_penalty"][2])
        self.top_k = integer("top_k", self.top_k, -1, INT32_MAX, "0 or -1 (off), or at least 1")
        if self.seed is not None:
            limit = f"None, or an integer in [0, {_MAX_SEED}]"
            seed = integer("seed", self.seed, -1, _MAX_SEED, limit)
            self.seed = None if seed == -1 else seed

    def _verify_lengths(self) -> None:
        self.n = integer("n", self.n, 1, MAX_N, f"an integer from 1 to {MAX_N}")
        if self.is_greedy and self.n > 1:
            message = f"n must be 1 when using greedy sampling, got {self.n}"
            raise RequestError(message, parameter="n", value=self.n, limit=1)
        if self.max_tokens is not None:
            self.max_tokens = integer("max_tokens", self.max_tokens, 1, INT32_MAX, "at least 1, or None")
        most = INT32_MAX if self.max_tokens is None else self.max_tokens
        limit = "at least 0" if self.max_tokens is None else f"in [0, max_tokens={most}]"
        self.min_tokens = integer("min_tokens", self.min_tokens, 0, most, limit)

    def _verify_stops(self) -> None:
        self.stop = texts("stop", self.stop, MAX_STRINGS, MAX_STRING_LENGTH)
        ids = [] if self.stop_token_ids is None else self.stop_token_ids
        self.stop_token_ids = token_ids("stop_token_ids", ids, MAX_TOKEN_IDS)

    def _verify_logprobs(self) -> None:
        """What depends on the engine's max_logprobs is checked when the request is made."""
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                setattr(self, name, 1 if value else None)
            elif value is not None:
                limit = "None, True, -1 (the whole vocabulary), or an integer of at least 0"
                setattr(self, name, integer(name, value, -1, INT32_MAX, limit))
        if self.logprob_token_ids is None:
            return
        name = "logprob_token_ids"
        ids = self.logprob_token_ids = token_ids(name, self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS)
        if self.logprobs is not None and self.logprobs != len(ids):
            message = f"logprobs must be the number of {name}, {len(ids)}, or None, got {self.logprobs}"
            raise RequestError(message, parameter="logprobs", value=self.logprobs, limit=len(ids))

    def _verify_rules(self) -> None:
        """The fields that say which tokens may come."""
        self.bad_words = texts("bad_words", self.bad_words, MAX_STRINGS, MAX_STRING_LENGTH)
        if (count := sum(map(len, self.bad_words))) > MAX_BAD_CHARACTERS:
            raise refusal(
                "bad_words", f"{count} characters", f"at most {MAX_BAD_CHARACTERS} characters in all"
            )
        if self.logit_bias is not None:
            self.logit_bias = _checked_bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            if self.allowed_token_ids == []:
                raise refusal("allowed_token_ids", [], "None or a list of at least one token id")
            self.allowed_token_ids = token_ids("allowed_token_ids", self.allowed_token_ids, MAX_TOKEN_IDS)
        if self.thinking_token_budget is not None:
            limit = "None, -1 (no limit), or an integer of at least 0"
            budget = integer("thinking_token_budget", self.thinking_token_budget, -1, INT32_MAX, limit)
            self.thinking_token_budget = None if budget == -1 else budget
        if self.skip_reading_prefix_cache is not None and not isinstance(
            self.skip_reading_prefix_cache, bool
        ):
            raise refusal("skip_reading_prefix_cache", self.skip_reading_prefix_cache, "True, False or None")
        wanted = self.repetition_detection
        if wanted is not None:
            if not isinstance(wanted, RepetitionDetectionParams):
                raise refusal("repetition_detection", wanted, "a RepetitionDetectionParams or None")
            wanted.verify()


_FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "extra_args": (None, "it carries arguments of KV connectors and plugins, and there are none"),
    "routed_experts_prompt_start": (0, "no output tells the experts that tokens were routed to"),
}
"""Name to the value that asks for nothing, and why any other is refused."""
_FLAGS = (
    "ignore_eos",
    "flat_logprobs",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_clone",
)
_RANGES = {
    "presence_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": (0.0, 1e30, "finite and greater than zero"),
    "temperature": (0.0, 2.0, "in [0, 2]"),
    "top_p": (0.0, 1.0, "in (0, 1]"),
    "min_p": (0.0, 1.0, "in [0, 1]"),
}


def _clamped(bias: Mapping[Any, Any]) -> dict[Any, Any]:
    """`logit_bias` as `from_optional` takes it; what is not a number is left for the check."""
    clamped: dict[Any, Any] = {}
    for token, value in bias.items():
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        plain = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        clamped[plain] = min(max(value, -_MAX_BIAS), _MAX_BIAS) if is_number else value
    return clamped


def _checked_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise refusal("logit_bias", bias, "a dict of token id to number")
    if len(bias) > MAX_TOKEN_IDS:
        raise refusal("logit_bias", f"{len(bias)} token ids", f"at most {MAX_TOKEN_IDS} token ids")
    limit = "a dict of token id, an integer in [0, 2**31), to number"
    return {integer("logit_bias", token, 0, INT32_MAX, limit): _bias(value) for token, value in bias.items()}


def _bias(value: object) -> float:
    bias = real("logit_bias", value, "for each token id, finite in float32")
    if abs(bias) > _FLOAT32_MAX:
        raise refusal("logit_bias", value, "a number for each token id, finite in float32")
    return bias
