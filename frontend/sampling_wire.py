"""From SamplingParams to what goes over the wire; what depends on model and tokenizer is settled here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..ipc.config import EngineConfig
from ..ipc.errors import RequestError
from ..ipc.messages import Sampling, ThinkingBudget, pack
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

MAX_BAD_TOKENS = 1 << 16
"""Tokens of all bad words of a request, in all their spellings."""
THINKING_TOKENS = ("<think>", "</think>")
"""The tokens that open and close a model's thinking, where its tokenizer has them."""


def to_wire(
    params: SamplingParams,
    config: EngineConfig,
    tokenizer: Tokenizer | None,
    seed: int,
    grammar: str | None = None,
) -> Sampling:
    """The engine's part of verified parameters; `seed` is used when they name none.

    `grammar` is what has become of `structured_outputs`.

    The model's first end-of-sequence id ends the request silently, its others are stop tokens; none does with
    `ignore_eos`. Raises RequestError for what this model cannot do.
    """
    greedy = params.is_greedy
    stops = list(params.stop_token_ids or ())
    _check_ids("stop_token_ids", stops, config.vocab_size)
    eos = None
    if not params.ignore_eos and config.eos_token_ids:
        eos = config.eos_token_ids[0]
        stops += [token for token in config.eos_token_ids[1:] if token not in stops]
    bias = params.logit_bias or {}
    _check_ids("logit_bias", list(bias), config.vocab_size)
    allowed = params.allowed_token_ids or []
    _check_ids("allowed_token_ids", allowed, config.vocab_size)
    if allowed and params.min_tokens and set(allowed) <= {*stops, eos}:
        message = f"allowed_token_ids leaves only tokens that min_tokens={params.min_tokens} holds back"
        raise RequestError(message, parameter="allowed_token_ids", value=allowed[:5], limit="another token")
    shown = params.logprob_token_ids or []
    _check_ids("logprob_token_ids", shown, config.vocab_size)
    return Sampling(
        temperature=params.temperature,
        top_p=1.0 if greedy else params.top_p,
        top_k=0 if greedy else max(params.top_k, 0),
        min_p=0.0 if greedy else params.min_p,
        seed=seed if params.seed is None else params.seed,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        eos_token_id=eos,
        stop_token_ids=stops,
        bias_tokens=pack(bias),
        bias_values=array("f", bias.values()).tobytes(),
        allowed_token_ids=pack(allowed),
        bad_words=_tokenized_bad_words(params, config.vocab_size, tokenizer),
        thinking=_thinking(params, tokenizer),
        skip_reading_prefix_cache=bool(params.skip_reading_prefix_cache),
        grammar=grammar,
        logprobs=None if shown else _num_logprobs("sample", params.logprobs, config),
        prompt_logprobs=_num_logprobs("prompt", params.prompt_logprobs, config),
        logprob_token_ids=shown,
    )


def _num_logprobs(what: str, wanted: int | None, config: EngineConfig) -> int | None:
    """How many of the likeliest tokens the engine is asked for."""
    if wanted is None:
        return None
    most = config.vocab_size if config.max_logprobs < 0 else config.max_logprobs
    number = config.vocab_size if wanted == -1 else wanted
    if number > most:
        message = (
            f"Requested {what} logprobs of {number}, which is greater than max allowed: {most} "
            "(the engine argument max_logprobs)"
        )
        name = "logprobs" if what == "sample" else "prompt_logprobs"
        raise RequestError(message, parameter=name, value=wanted, limit=most)
    return min(number, config.vocab_size)


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    beyond = [token for token in ids if not 0 <= token < vocab_size]
    if beyond:
        message = f"{name} must be in the vocabulary of {vocab_size} tokens, got {beyond[:5]}"
        raise RequestError(message, parameter=name, value=beyond[:5], limit=f"[0, {vocab_size})")


def _tokenized_bad_words(
    params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None
) -> list[list[int]]:
    """Each word's tokens, as they are at the start of a text and after a space."""
    if not params.bad_words:
        return []
    if tokenizer is None:
        message = "bad_words need a tokenizer, but the engine was made with skip_tokenizer_init=True"
        raise RequestError(message, parameter="bad_words", value=params.bad_words, limit="a tokenizer")
    found: dict[tuple[int, ...], None] = {}
    count = 0
    for word in dict.fromkeys(params.bad_words):
        text = word.lstrip()
        for spelled in (text, f" {text}") if text else (word,):
            tokens = tokenizer.encode(spelled, add_special_tokens=False)
            _check_ids("bad_words", tokens, vocab_size)
            if not tokens or tuple(tokens) in found:
                continue
            found[tuple(tokens)] = None
            count += len(tokens)
            if count > MAX_BAD_TOKENS:  # at once: the event loop waits
                message = f"bad_words must be at most {MAX_BAD_TOKENS} tokens, got {count} and more"
                raise RequestError(message, parameter="bad_words", value=count, limit=MAX_BAD_TOKENS)
    return [list(tokens) for tokens in found]


def _thinking(params: SamplingParams, tokenizer: Tokenizer | None) -> ThinkingBudget | None:
    if params.thinking_token_budget is None:
        return None
    ids = [None, None] if tokenizer is None else tokenizer.convert_tokens_to_ids(THINKING_TOKENS)
    assert isinstance(ids, list)
    begin, end = ids
    if begin is None or end is None:
        message = (
            "thinking_token_budget needs a tokenizer with the tokens "
            f"{' and '.join(THINKING_TOKENS)}; this model's has none"
        )
        value, limit = params.thinking_token_budget, " and ".join(THINKING_TOKENS)
        raise RequestError(message, parameter="thinking_token_budget", value=value, limit=limit)
    return ThinkingBudget(params.thinking_token_budget, begin, end)
