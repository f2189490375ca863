"""Beam search: the likeliest continuations, found by keeping the best few at each length. Names are vLLM's.

A frontend's affair: each step asks the engine for one token's logprobs after every beam, and the prefix cache
makes that one token's work.
"""

from __future__ import annotations

import asyncio
import heapq
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
    """"stop" at an end-of-sequence token, "length" otherwise."""
    stop_reason: int | None = None
    """That token."""
    lora_request: None = None


@dataclass
class BeamSearchOutput:
    """What was found for one prompt, best first."""

    sequences: list[BeamSearchSequence]


async def beam_search(engine: AsyncLLM, prompt: Prompt, params: BeamSearchParams) -> BeamSearchOutput:
    """The `beam_width` best continuations of one prompt. Raises RequestError."""
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

    for _ in range(min(params.max_tokens, engine.max_model_len - len(ids))):
        grown = await _grow(engine, beams, params, stops)
        done += [beam for beam in grown if beam.finish_reason is not None]
        going = [beam for beam in grown if beam.finish_reason is None]
        beams = heapq.nlargest(params.beam_width, going, key=score)
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = "length"
    best = heapq.nlargest(params.beam_width, done + beams, key=score)
    _show(engine, best, params)
    return BeamSearchOutput(best)


async def _grow(
    engine: AsyncLLM, beams: Sequence[BeamSearchSequence], params: BeamSearchParams, stops: frozenset[int]
) -> list[BeamSearchSequence]:
    """Each beam with each of its likeliest next tokens: twice the width, for as many may end."""
    sampling = SamplingParams(
        max_tokens=1,
        logprobs=2 * params.beam_width,
        temperature=params.temperature,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def candidates(beam: BeamSearchSequence) -> LogprobsOnePosition:
        output = await anext(engine.generate({"prompt_token_ids": beam.tokens}, sampling))
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        return logprobs[0]

    positions = await asyncio.gather(*map(candidates, beams))
    grown: list[BeamSearchSequence] = []
    for beam, position in zip(beams, positions, strict=True):
        for token, entry in position.items():
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
