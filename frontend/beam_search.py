"""Beam search: the likeliest continuations, found by keeping the best few at each length. Names are vLLM's.

A frontend's affair: each step asks the engine for one token's logprobs after every beam, and the prefix cache
makes that one token's work.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..ipc.errors import RequestError
from .async_llm import AsyncLLM
from .checks import INT32_MAX, integer, real, refusal
from .logprobs import LogprobsOnePosition
from .prompts import Prompt, check_token_ids, parse_prompt
from .sampling_params import RequestOutputKind, SamplingParams

MAX_BEAM_WIDTH = 1024


@dataclass
class BeamSearchParams:
    """What to search for. Raises RequestError, as `SamplingParams` does."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Changes the order only with the engine's logprobs_mode="processed_logprobs"."""
    length_penalty: float = 1.0
    """A sequence's score is its logprob divided by its length, prompt and all, to this power."""
    include_stop_str_in_output: bool = False
    """Whether the text shows the end-of-sequence token."""
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH, f"an integer in [1, {MAX_BEAM_WIDTH}]")
        integer("max_tokens", self.max_tokens, 1, INT32_MAX, "an integer of at least 1")
        if not 0 <= real("temperature", self.temperature, "in [0, 2]") <= 2:
            raise refusal("temperature", self.temperature, "in [0, 2]")
        if abs(real("length_penalty", self.length_penalty, "in [-10, 10]")) > 10:
            raise refusal("length_penalty", self.length_penalty, "in [-10, 10]")
        if self.structured_outputs is not None:
            message = "structured_outputs is not supported with beam search"
            raise RequestError(message, parameter="structured_outputs", value=self.structured_outputs)


@dataclass
class BeamSearchSequence:
    """One of the sequences found."""

    tokens: list[int]
    """The prompt's, then the generated ones."""
    logprobs: list[LogprobsOnePosition] = field(default_factory=list)
    """Of each generated token."""
    cum_logprob: float = 0.0
    text: str | None = None
    """Of all tokens; None without a tokenizer."""
    finish_reason: str | None = None
    """"stop" at an end-of-sequence token, "timeout" when there was no time for more, else "length"."""
    stop_reason: int | None = None
    """That token."""
    lora_request: None = None


@dataclass
class BeamSearchOutput:
    """What was found for one prompt, best first."""

    sequences: list[BeamSearchSequence]


class _Candidate(NamedTuple):
    """A sequence and one more token. Most are dropped, so that nothing is copied yet."""

    beam: BeamSearchSequence
    position: LogprobsOnePosition
    token: int
    cum_logprob: float

    def sequence(self, finish_reason: str | None) -> BeamSearchSequence:
        return BeamSearchSequence(
            [*self.beam.tokens, self.token],
            [*self.beam.logprobs, self.position],
            self.cum_logprob,
            finish_reason=finish_reason,
            stop_reason=None if finish_reason is None else self.token,
        )


async def beam_search(
    engine: AsyncLLM,
    prompt: Prompt,
    params: BeamSearchParams,
    *,
    priority: int = 0,
    timeout: float | None = None,  # noqa: ASYNC109 (it ends the search, not the call)
    num_logprobs: int = 0,
) -> BeamSearchOutput:
    """The `beam_width` best continuations of one prompt. Raises RequestError.

    Args:
        priority: of the requests for each step.
        timeout: seconds after which the best so far are returned.
        num_logprobs: at least so many of the likeliest tokens are told at each position.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    parsed = parse_prompt(prompt)
    ids = parsed.token_ids
    if ids is None:
        ids = engine.get_tokenizer().encode(parsed.text or "")
    check_token_ids(ids, engine.config.vocab_size, engine.max_model_len)
    stops = frozenset() if params.ignore_eos else frozenset(engine.config.eos_token_ids)
    beams, done = [BeamSearchSequence(list(ids))], list[BeamSearchSequence]()

    def score(candidate: _Candidate) -> float:
        length = len(candidate.beam.tokens) + (candidate.token not in stops)
        return candidate.cum_logprob / float(length**params.length_penalty)

    def final_score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in stops)
        return beam.cum_logprob / float(length**params.length_penalty)

    width, why_ended = params.beam_width, "length"
    for _ in range(min(params.max_tokens, engine.max_model_len - len(ids))):
        if time.monotonic() >= deadline:
            why_ended = "timeout"
            break
        positions = await _ask(engine, beams, params, parsed.cache_salt, priority, num_logprobs)
        candidates = _candidates(beams, positions, 2 * width)
        ended = heapq.nlargest(width, (one for one in candidates if one.token in stops), key=score)
        going = heapq.nlargest(width, (one for one in candidates if one.token not in stops), key=score)
        done = heapq.nlargest(width, done + [one.sequence("stop") for one in ended], key=final_score)
        beams = [one.sequence(None) for one in going]
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = why_ended
    best = heapq.nlargest(width, done + beams, key=final_score)
    _show(engine, best, params)
    return BeamSearchOutput(best)


async def _ask(
    engine: AsyncLLM,
    beams: Sequence[BeamSearchSequence],
    params: BeamSearchParams,
    cache_salt: str,
    priority: int,
    num_logprobs: int,
) -> list[LogprobsOnePosition]:
    """What may follow each beam."""
    sampling = SamplingParams(
        max_tokens=1,
        logprobs=max(2 * params.beam_width, num_logprobs),
        temperature=params.temperature,
        seed=0,  # the token that is drawn is not looked at
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def candidates(beam: BeamSearchSequence) -> LogprobsOnePosition:
        prompt = {"prompt_token_ids": beam.tokens, "cache_salt": cache_salt or None}
        output = await anext(engine.generate(prompt, sampling, priority=priority))
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        return logprobs[0]

    return await asyncio.gather(*map(candidates, beams))


def _candidates(
    beams: Sequence[BeamSearchSequence], positions: Sequence[LogprobsOnePosition], count: int
) -> list[_Candidate]:
    """Each beam with each of its likeliest next tokens: twice as many as beams, for as many may end."""
    return [
        _Candidate(beam, position, token, beam.cum_logprob + entry.logprob)
        for beam, position in zip(beams, positions, strict=True)
        # The token that was sampled is told too, likely or not.
        for token, entry in heapq.nlargest(count, position.items(), key=lambda item: item[1].logprob)
    ]


def _show(engine: AsyncLLM, sequences: Sequence[BeamSearchSequence], params: BeamSearchParams) -> None:
    if engine.tokenizer is None:
        return
    for beam in sequences:
        hides_last = beam.finish_reason == "stop" and not params.include_stop_str_in_output
        beam.text = engine.tokenizer.decode(beam.tokens[:-1] if hides_last else beam.tokens)
