"""SamplingParams: how one request's tokens are chosen and shown. Names, defaults and limits are vLLM's.

Knows every field of vLLM's class; those that Headrace does not have yet are refused as soon as they are set,
never ignored. What the sampler needs of it goes over the wire as `messages.Sampling`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..ipc.errors import RequestError
from ..ipc.messages import Sampling
from .names import nearest

logger = logging.getLogger("headrace")

MAX_N = 16384
_GREEDY_BELOW = 1e-5
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
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility: fast tokenizers put no spaces there."""
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False
    """Accepted for compatibility: the engine never keeps this object."""
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    routed_experts_prompt_start: int = 0
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        for name in kwargs:
            if name not in _FIELDS:
                message = f"SamplingParams has no parameter {name!r}{nearest(name, _FIELDS)}"
                raise RequestError(message, parameter=name, value=kwargs[name])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.verify()
        if _GREEDY_BELOW <= self.temperature < _MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s", self.temperature, _MIN_TEMPERATURE)
            self.temperature = _MIN_TEMPERATURE

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """Make one from keywords of which those that are None mean the default."""
        return cls(**{name: value for name, value in kwargs.items() if value is not None})

    def clone(self) -> SamplingParams:
        return copy.deepcopy(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    def verify(self) -> None:
        """Check every field and bring `seed`, `stop` and `stop_token_ids` to their plain form."""
        self._refuse_unsupported()
        self._verify_numbers()
        self._verify_lengths()
        self._verify_stops()
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _refusal("output_kind", self.output_kind, "a RequestOutputKind")
        if self.stop and not self.detokenize:
            message = "stop strings are only supported when detokenize is True, got detokenize=False"
            raise RequestError(message, parameter="stop", value=self.stop, limit="detokenize=True")

    def to_wire(self, eos_token_ids: Sequence[int], seed: int) -> Sampling:
        """The sampler's part.

        The first of `eos_token_ids` ends the request silently, the others are stop tokens; none does with
        `ignore_eos`. `seed` is used when the parameters name none.
        """
        greedy = self.is_greedy
        stops = list(self.stop_token_ids or ())
        eos = None
        if not self.ignore_eos and eos_token_ids:
            eos = eos_token_ids[0]
            stops += [token for token in eos_token_ids[1:] if token not in stops]
        return Sampling(
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else max(self.top_k, 0),
            min_p=0.0 if greedy else self.min_p,
            seed=seed if self.seed is None else self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            eos_token_id=eos,
            stop_token_ids=stops,
        )

    def _refuse_unsupported(self) -> None:
        for name, default in _UNSUPPORTED.items():
            value = getattr(self, name)
            # An empty list of bad words says the same as none; False is not 0 here, nor 0 False.
            if value is default or (value == default and type(value) is type(default)) or value == []:
                continue
            message = f"{name} is not supported yet, got {value!r}"
            raise RequestError(message, parameter=name, value=value, limit=f"{name}={default!r}")

    def _verify_numbers(self) -> None:
        for name, (low, high, limit) in _RANGES.items():
            value = _real(name, getattr(self, name), limit)
            if not low <= value <= high:
                raise _refusal(name, value, limit)
            setattr(self, name, value)
        if self.top_p == 0:
            raise _refusal("top_p", self.top_p, _RANGES["top_p"][2])
        if self.repetition_penalty == 0:
            raise _refusal("repetition_penalty", self.repetition_penalty, _RANGES["repetition_penalty"][2])
        self.top_k = _integer("top_k", self.top_k, -1, 2**31 - 1, "0 or -1 (off), or at least 1")
        if self.seed is not None:
            limit = f"None, or an integer in [0, {_MAX_SEED}]"
            seed = _integer("seed", self.seed, -1, _MAX_SEED, limit)
            self.seed = None if seed == -1 else seed

    def _verify_lengths(self) -> None:
        self.n = _integer("n", self.n, 1, MAX_N, f"an integer from 1 to {MAX_N}")
        if self.is_greedy and self.n > 1:
            message = f"n must be 1 when using greedy sampling, got {self.n}"
            raise RequestError(message, parameter="n", value=self.n, limit=1)
        if self.max_tokens is not None:
            self.max_tokens = _integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "at least 1, or None")
        most = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        limit = "at least 0" if self.max_tokens is None else f"in [0, max_tokens={most}]"
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0, most, limit)

    def _verify_stops(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is None:
            stop = []
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) for text in stop):
            raise _refusal("stop", self.stop, "a string or a list of strings")
        if "" in stop:
            message = "stop cannot contain an empty string"
            raise RequestError(message, parameter="stop", value=self.stop, limit="strings of length >= 1")
        self.stop = list(stop)
        ids = [] if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, (list, tuple)):
            raise _refusal("stop_token_ids", ids, "a list of token ids")
        limit = "a list of token ids, integers in [0, 2**31)"
        self.stop_token_ids = [_integer("stop_token_ids", item, 0, 2**31 - 1, limit) for item in ids]


_FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
_UNSUPPORTED: dict[str, Any] = {
    name: _FIELDS[name]
    for name in (
        "logprobs",
        "prompt_logprobs",
        "logprob_token_ids",
        "flat_logprobs",
        "structured_outputs",
        "logit_bias",
        "allowed_token_ids",
        "extra_args",
        "routed_experts_prompt_start",
        "bad_words",
        "skip_reading_prefix_cache",
        "thinking_token_budget",
        "repetition_detection",
    )
}
_FLAGS = (
    "ignore_eos",
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


def _refusal(name: str, value: object, limit: str) -> RequestError:
    return RequestError(f"{name} must be {limit}, got {value!r}", parameter=name, value=value, limit=limit)


def _real(name: str, value: object, limit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise _refusal(name, value, f"a number {limit}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int, limit: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refusal(name, value, limit)
    return int(value)
