"""From a message to requests: what a client sends is checked here, once, before anything believes it.

The frontend has checked it too, for better messages; but a core serves any program that speaks its protocol.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

import msgspec
import numpy as np

from ..ipc.config import EngineConfig
from ..ipc.errors import RequestError
from ..ipc.messages import MAX_GRAMMAR, AddRequest, Sampling, unpack
from .request import Deadlines, Request

MAX_N = 16384
MAX_SALT = 1024
MAX_TIMEOUT = 1e9
MAX_LOGPROB_TOKEN_IDS = 128
MAX_STOP_TOKEN_IDS = 1 << 18
_INT32 = 2**31 - 1
_MAX_BAD_WORDS = 1 << 16
"""Tokens of all bad words of a request."""
_SEEDS = 2**63
_LARGEST = sys.float_info.max
_SMALLEST = sys.float_info.min

# name: (lowest, highest, how to say it); NaN is in no range
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, _LARGEST, "a finite number >= 0"),
    "top_p": (_SMALLEST, 1.0, "> 0 and <= 1"),
    "top_k": (0, _INT32, f">= 0 and <= {_INT32}"),
    "min_p": (0.0, 1.0, ">= 0 and <= 1"),
    "seed": (0, _SEEDS - 1, ">= 0 and < 2**63"),
    "presence_penalty": (-2.0, 2.0, ">= -2 and <= 2"),
    "frequency_penalty": (-2.0, 2.0, ">= -2 and <= 2"),
    "repetition_penalty": (_SMALLEST, _LARGEST, "a finite number > 0"),
}


def make_requests(client: bytes, message: AddRequest, config: EngineConfig, now: float) -> Iterator[Request]:
    """The `n` requests of a message, made as they are asked for. The first may raise RequestError."""
    last = _INT32 - message.n + 1
    _check(1 <= message.n <= MAX_N, "n", message.n, f">= 1 and <= {MAX_N}")
    _check(0 <= message.request <= last, "request", message.request, f">= 0 and <= {last}")
    _check(1 <= message.max_tokens <= _INT32, "max_tokens", message.max_tokens, f">= 1 and <= {_INT32}")
    most = _INT32 if config.scheduling_policy == "priority" else 0
    _check(-most <= message.priority <= most, "priority", message.priority, f">= {-most} and <= {most}")
    sampling, vocab_size = message.sampling, config.vocab_size
    _check_sampling(sampling, message.max_tokens, vocab_size)
    length = len(message.cache_salt)
    _check(length <= MAX_SALT, "cache_salt", f"{length} characters", f"at most {MAX_SALT} characters")
    deadlines = _deadlines(message, now)
    _check_logprobs(sampling, config)
    prompt = _read_ids("prompt", message.prompt, vocab_size)
    _check(len(prompt) > 0, "prompt", 0, ">= 1 tokens")
    generated = _read_ids("generated", message.generated, vocab_size)
    _check(
        len(generated) < message.max_tokens,
        "generated",
        f"{len(generated)} tokens",
        f"< {message.max_tokens}",
    )
    _check(not generated or message.n == 1, "generated", f"n={message.n}", "used with n=1 only")
    stop_ids = frozenset[int]()
    for i in range(message.n):
        request = Request(
            client=client,
            number=message.request + i,
            tokens=prompt + generated,
            num_prompt_tokens=len(prompt),
            sampling=_of_child(sampling, i) if i else sampling,
            max_tokens=message.max_tokens,
            priority=message.priority,
            arrival_time=now,
            deadlines=deadlines,
            cache_salt=message.cache_salt,
            stop_ids=stop_ids,
        )
        stop_ids = request.stop_ids
        yield request


def _deadlines(message: AddRequest, now: float) -> Deadlines:
    moments: list[float | None] = []
    for name in ("queue_timeout", "first_token_timeout", "total_timeout"):
        seconds: float | None = getattr(message, name)
        _check(
            seconds is None or 0 <= seconds <= MAX_TIMEOUT, name, seconds, f"seconds, 0 .. {MAX_TIMEOUT:g}"
        )
        moments.append(None if seconds is None else now + seconds)
    return Deadlines(*moments)


def _read_ids(name: str, column: bytes, vocab_size: int) -> array[int]:
    _check(len(column) % 4 == 0, name, f"{len(column)} bytes", "int32 values")
    if column:
        _check_ids(name, np.frombuffer(column, np.int32), vocab_size)
    return unpack(column)


def _check_sampling(sampling: Sampling, max_tokens: int, vocab_size: int) -> None:
    for name, (low, high, limit) in _RANGES.items():
        value = getattr(sampling, name)
        _check(low <= value <= high, name, value, limit)
    _check(0 <= sampling.min_tokens <= max_tokens, "min_tokens", sampling.min_tokens, f"0 .. {max_tokens}")
    if sampling.grammar is not None:
        limit = f"1 .. {MAX_GRAMMAR} characters"
        _check(1 <= len(sampling.grammar) <= MAX_GRAMMAR, "grammar", len(sampling.grammar), limit)
    eos = sampling.eos_token_id
    _check(eos is None or 0 <= eos < vocab_size, "eos_token_id", eos, f"0 .. {vocab_size - 1}")
    stops, limit = sampling.stop_token_ids, f"at most {MAX_STOP_TOKEN_IDS} token ids"
    _check(len(stops) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"{len(stops)} token ids", limit)
    for token in (min(stops, default=0), max(stops, default=0)):
        _check(0 <= token < vocab_size, "stop_token_ids", token, f"0 .. {vocab_size - 1}")
    _check_rules(sampling, vocab_size)


def _of_child(sampling: Sampling, number: int) -> Sampling:
    """The parameters of generation `number` > 0: noise of its own, and the prompt is told of once."""
    seed = (sampling.seed + number) % _SEEDS
    return msgspec.structs.replace(sampling, seed=seed, prompt_logprobs=None)


def _check_logprobs(sampling: Sampling, config: EngineConfig) -> None:
    most = config.vocab_size
    if config.max_logprobs >= 0:
        most = min(most, config.max_logprobs)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(sampling, name)
        _check(value is None or 0 <= value <= most, name, value, f"0 .. {most}")
    ids = sampling.logprob_token_ids
    _check(len(ids) <= MAX_LOGPROB_TOKEN_IDS, "logprob_token_ids", len(ids), f"<= {MAX_LOGPROB_TOKEN_IDS}")
    for token in ids:
        _check(0 <= token < config.vocab_size, "logprob_token_ids", token, f"0 .. {config.vocab_size - 1}")


def _check_rules(sampling: Sampling, vocab_size: int) -> None:
    """The fields that say which tokens may come."""
    _check_column("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    _check_column("logit_bias", sampling.bias_tokens, vocab_size)
    sizes = len(sampling.bias_tokens), len(sampling.bias_values)
    _check(sizes[0] == sizes[1], "logit_bias", f"{sizes[0]} and {sizes[1]} bytes", "a value for each token")
    values = np.frombuffer(sampling.bias_values, np.float32)
    _check(bool(np.isfinite(values).all()), "logit_bias", "infinity or NaN", "finite numbers")
    count = sum(map(len, sampling.bad_words))
    _check(count <= _MAX_BAD_WORDS, "bad_words", f"{count} tokens", f"at most {_MAX_BAD_WORDS} tokens")
    for word in sampling.bad_words:
        _check(len(word) > 0, "bad_words", word, "lists of at least one token id")
        for token in word:
            _check(0 <= token < vocab_size, "bad_words", token, f"0 .. {vocab_size - 1}")
    if (thinking := sampling.thinking) is not None:
        _check(0 <= thinking.budget <= _INT32, "thinking", thinking.budget, f">= 0 and <= {_INT32}")
        for token in (thinking.begin, thinking.end):
            _check(0 <= token < vocab_size, "thinking", token, f"0 .. {vocab_size - 1}")


def _check_column(name: str, column: bytes, vocab_size: int) -> None:
    """A column of token ids, each once; empty is good."""
    _check(len(column) % 4 == 0, name, f"{len(column)} bytes", "int32 values")
    if column:
        ids = np.frombuffer(column, np.int32)
        _check_ids(name, ids, vocab_size)
        _check(len(np.unique(ids)) == len(ids), name, f"{len(ids)} token ids", "each token id once")


def _check_ids(name: str, ids: np.ndarray[tuple[int], np.dtype[np.int32]], vocab_size: int) -> None:
    for token in (int(ids.min()), int(ids.max())):
        _check(0 <= token < vocab_size, name, f"token id {token}", f"token ids 0 .. {vocab_size - 1}")


def _check(good: bool, name: str, value: object, limit: str) -> None:
    if not good:
        raise RequestError(f"{name} must be {limit}, got {value}", parameter=name, value=value, limit=limit)
