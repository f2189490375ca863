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
from typing import Any

from ..ipc.errors import RequestError
from .async_llm import AsyncLLM
from .checks import INT32_MAX, integer, real, refusal
from .logprobs import LogprobsOnePosition
from .prompts import Prompt, parse_prompt
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
    if not 0 < len(ids) < engine.max_model_len:
        limit = f"1 to {engine.max_model_len - 1} tokens"
        raise RequestError(
            f"prompt must be {limit}, got {len(ids)}", parameter="prompt", value=len(ids), limit=limit
        )
    stops = frozenset() if params.ignore_eos else frozenset(engine.config.eos_token_ids)
    beams, done = [BeamSearchSequence(list(ids))], list[BeamSearchSequence]()

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in stops)
        return beam.cum_logprob / float(length**params.length_penalty)

    why_ended = "length"
    for _ in range(min(params.max_tokens, engine.max_model_len - len(ids))):
        if time.monotonic() >= deadline:
            why_ended = "timeout"
            break
        positions = await _ask(engine, beams, params, parsed.cache_salt, priority, num_logprobs)
        grown = _grow(beams, positions, 2 * params.beam_width, stops)
        done += [beam for beam in grown if beam.finish_reason is not None]
        going = [beam for beam in grown if beam.finish_reason is None]
        beams = heapq.nlargest(params.beam_width, going, key=score)
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = why_ended
    best = heapq.nlargest(params.beam_width, done + beams, key=score)
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


def _grow(
    beams: Sequence[BeamSearchSequence],
    positions: Sequence[LogprobsOnePosition],
    width: int,
    stops: frozenset[int],
) -> list[BeamSearchSequence]:
    """Each beam with each of its likeliest next tokens: twice as many as beams, for as many may end."""
    grown: list[BeamSearchSequence] = []
    for beam, position in zip(beams, positions, strict=True):
        # The token that was sampled is told too, likely or not.
        for token, entry in heapq.nlargest(width, position.items(), key=lambda item: item[1].logprob):
            is_end = token in stops
            grown.append(
                BeamSearchSequence(
                    [*beam.tokens, token],
                    [*beam.logprobs, position],
                    beam.cum_logprob + entry.logprob,
                    finish_reason="stop" if is_end else None,
                    stop_reason=token if is_end else None,
                )
            )
    return grown


def _show(engine: AsyncLLM, sequences: Sequence[BeamSearchSequence], params: BeamSearchParams) -> None:
    if engine.tokenizer is None:
        return
    for beam in sequences:
        hides_last = beam.finish_reason == "stop" and not params.include_stop_str_in_output
        beam.text = engine.tokenizer.decode(beam.tokens[:-1] if hides_last else beam.tokens)
