"""From logits to tokens: the stages of sampling in their order, each skipped when no row asks for it.

Order: constraints -> allowed_token_ids, bad_words, logit_bias -> min_tokens -> repetition, frequency,
presence penalty -> (greedy: argmax) temperature -> min_p -> top_k, top_p -> draw. Rows are independent: a
row's token is a function of its logits, its parameters and the noise of (seed, position, token id). Knows the
slot table; does not know models.

Logits that are not numbers do not stop the engine. A greedy row takes its first NaN (as torch.argmax does);
for a random row NaN counts as -inf, and a row without a finite logit draws evenly from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ipc.config import LogprobsMode
from ..kernels.sampling import gumbel_argmax
from .constraints import Constraints
from .logprobs import Entries, LogprobStage, scores_to_show
from .mask_stage import MaskStage
from .nucleus import Nucleus, keep_likeliest, keep_of_all
from .slots import F64, I32, I64, Batch, SamplingColumns
from .staging import upload
from .token_rules import TokenRuleStage

_HUGE = 3e38
"""Stands for infinity where infinities would subtract to NaN; below float32's largest by a margin."""


class Requests(Protocol):
    """What the sampler asks of the slot table. Columns have a row per slot."""

    sampling: SamplingColumns
    num_prompt: I64
    num_tokens: I64
    """The token that is drawn now is not counted."""
    constraints: Constraints

    def history(self, slots: I64, length: int) -> I32 | Tensor:
        """int32 [len(slots), length], the first tokens of these slots."""


@dataclass(slots=True)
class _Random:
    """The random rows of a batch and their parameters, on the device."""

    rows: Tensor | None
    """int64 [r], their rows of the logits; None: all rows."""
    host_rows: I64
    seeds: Tensor
    """int64 [r]"""
    temperature: Tensor
    """float32 [r, 1]"""
    log_min_p: Tensor | None
    """float32 [r, 1], -inf where off; None: off for all rows."""
    filtered: Tensor | None
    """int64 [f], those among the r rows that top_k or top_p filters; None: no row."""
    unfiltered: Tensor | None
    """int64 [r - f], the others; None: no row."""
    nucleus: Nucleus | None
    """Of the filtered rows; None when there are none."""


@dataclass(slots=True)
class _Shown:
    """The rows that want logprobs."""

    stage: LogprobStage
    random: _Random | None
    """With processed scores: those among them that are random; None: none."""


class Sampled(NamedTuple):
    """What the sampling rows of a batch got."""

    tokens: Tensor
    """int64 [rows]"""
    logprobs: list[Entries]
    """Of the rows that want them."""


@dataclass(slots=True)
class _Rows:
    """What a batch's sampling rows ask for; valid as long as the same rows sample."""

    slots: I64
    penalized: I64
    """Rows with a penalty."""
    token_rules: TokenRuleStage | None
    """Of the rows that have some."""
    held_back: I64
    """Rows with a min_tokens that has stop tokens to hold back."""
    greedy: Tensor | None
    """int64, the greedy rows; None: no row. Not used when all are."""
    random: _Random | None
    """None: all rows are greedy."""
    shown: _Shown | None
    """None: no row wants logprobs."""


class Sampler:
    """Samples for the slots of one worker; on every rank alike, given the same logits."""

    def __init__(self, device: torch.device, logprobs_mode: LogprobsMode = "raw_logprobs") -> None:
        self._device = device
        self._masks = MaskStage(device)
        self._logprobs_mode: LogprobsMode = logprobs_mode
        self._rows: _Rows | None = None
        self._sampling: I64 | None = None

    def sample(self, logits: Tensor, slots: Requests, batch: Batch) -> Sampled:
        """The next tokens.

        Args:
            logits: float32 [rows, vocab], of `batch.sampling`'s rows in order; overwritten.
        """
        rows = self._rows
        if rows is None or batch.changed or batch.sampling is not self._sampling:
            rows = self._rows = self._describe(slots, batch, logits.shape[1])
            self._sampling = batch.sampling
        raw = None
        if rows.shown is not None and self._logprobs_mode.startswith("raw"):
            raw = logits[rows.shown.stage.rows]
        self._change(logits, slots, rows)
        processed = None if rows.shown is None or raw is not None else _final(logits, rows.shown)
        tokens = self._choose(logits, rows, batch)
        if rows.shown is None:
            return Sampled(tokens, [])
        stage, scores = rows.shown.stage, raw if processed is None else processed
        assert scores is not None
        return Sampled(tokens, stage.gather(scores_to_show(scores, self._logprobs_mode), tokens[stage.rows]))

    def _change(self, logits: Tensor, slots: Requests, rows: _Rows) -> None:
        """The stages that change logits, whether a row is greedy or not."""
        self._masks.apply(logits, slots.constraints, rows.slots, logits.shape[1])
        if rows.token_rules is not None:
            rows.token_rules.apply(logits)
        if len(rows.held_back):
            _hold_back(logits, slots, rows)
        if len(rows.penalized):
            _penalize(logits, slots, rows)

    def _choose(self, logits: Tensor, rows: _Rows, batch: Batch) -> Tensor:
        if rows.random is None:
            return logits.argmax(dim=-1)
        tokens = self._draw(logits, rows.random, batch.ends[batch.sampling])
        if rows.greedy is None:
            return tokens
        mixed = torch.empty(len(rows.slots), dtype=torch.int64, device=self._device)
        mixed[rows.greedy] = logits[rows.greedy].argmax(dim=-1)
        mixed[rows.random.rows] = tokens
        return mixed

    def _draw(self, logits: Tensor, random: _Random, ends: I64) -> Tensor:
        scores = _warm(logits if random.rows is None else logits[random.rows], random)
        positions = self._tensor(ends[random.host_rows])
        if random.nucleus is None or random.filtered is None:
            return gumbel_argmax(scores, random.seeds, positions)
        if random.unfiltered is None:
            return _draw_filtered(scores, random.nucleus, random.seeds, positions)
        tokens = torch.empty_like(positions)
        for rows, nucleus in ((random.unfiltered, None), (random.filtered, random.nucleus)):
            part = scores[rows], random.seeds[rows], positions[rows]
            tokens[rows] = (
                gumbel_argmax(*part) if nucleus is None else _draw_filtered(part[0], nucleus, *part[1:])
            )
        return tokens

    def _describe(self, slots: Requests, batch: Batch, vocab_size: int) -> _Rows:
        sampled = batch.slots[batch.sampling]
        columns = slots.sampling
        penalized = (
            (columns.repetition_penalty[sampled] != 1)
            | (columns.frequency_penalty[sampled] != 0)
            | (columns.presence_penalty[sampled] != 0)
        )
        held_back = columns.min_tokens[sampled] > 0
        greedy = columns.temperature[sampled] == 0
        known = columns.token_rules
        rules = (
            {row: known[slot] for row, slot in enumerate(sampled.tolist()) if slot in known} if known else {}
        )
        return _Rows(
            slots=sampled,
            penalized=np.flatnonzero(penalized),
            token_rules=TokenRuleStage(rules, vocab_size, self._tensor) if rules else None,
            held_back=np.flatnonzero(held_back),
            greedy=self._tensor(np.flatnonzero(greedy)) if greedy.any() else None,
            random=None if greedy.all() else self._describe_random(columns, sampled, ~greedy),
            shown=self._describe_shown(columns, sampled, greedy),
        )

    def _describe_shown(
        self, columns: SamplingColumns, sampled: I64, greedy: NDArray[np.bool_]
    ) -> _Shown | None:
        wishes = columns.wishes
        wanted = (
            {row: wishes[slot] for row, slot in enumerate(sampled.tolist()) if slot in wishes}
            if wishes
            else {}
        )
        if not wanted:
            return None
        rows = list(wanted)
        is_random = ~greedy[rows]
        processed = self._logprobs_mode.startswith("processed") and is_random.any()
        random = self._describe_random(columns, sampled[rows], is_random) if processed else None
        return _Shown(LogprobStage(wanted, self._tensor), random)

    def _describe_random(self, columns: SamplingColumns, sampled: I64, random: NDArray[np.bool_]) -> _Random:
        host_rows = np.flatnonzero(random)
        mine = sampled[host_rows]
        min_p, top_k, top_p = columns.min_p[mine], columns.top_k[mine], columns.top_p[mine]
        with np.errstate(divide="ignore"):
            log_min_p = np.log(min_p)[:, None]
        filtered = (top_k > 0) | (top_p < 1)
        some, others = np.flatnonzero(filtered), np.flatnonzero(~filtered)
        return _Random(
            rows=None if random.all() else self._tensor(host_rows),
            host_rows=host_rows,
            seeds=self._tensor(columns.seed[mine].view(np.int64)),
            temperature=self._floats(columns.temperature[mine][:, None]),
            log_min_p=self._floats(log_min_p) if (min_p > 0).any() else None,
            filtered=self._tensor(some) if len(some) else None,
            unfiltered=self._tensor(others) if len(others) else None,
            nucleus=Nucleus.of(top_k[some], top_p[some], self._device) if len(some) else None,
        )

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return upload(values, self._device)

    def _floats(self, values: F64) -> Tensor:
        return self._tensor(values.astype(np.float32))


def _warm(scores: Tensor, random: _Random) -> Tensor:
    """Temperature and min_p, in place; finite."""
    scores.div_(random.temperature).nan_to_num_(nan=-_HUGE, posinf=_HUGE, neginf=-_HUGE)
    if random.log_min_p is not None:
        floor = scores.amax(dim=-1, keepdim=True) + random.log_min_p
        scores.masked_fill_(scores < floor, -_HUGE)
    return scores


def _final(logits: Tensor, shown: _Shown) -> Tensor:
    """The scores that the rows of `shown` are drawn from, -inf for tokens that are out."""
    scores, random = logits[shown.stage.rows], shown.random
    if random is None:
        return scores
    drawn = _warm(scores if random.rows is None else scores[random.rows], random)
    if random.nucleus is not None and random.filtered is not None:
        drawn[random.filtered] = keep_of_all(drawn[random.filtered], random.nucleus)
    drawn.masked_fill_(drawn <= -_HUGE, -torch.inf)
    if random.rows is None:
        return drawn
    scores[random.rows] = drawn
    return scores


def _draw_filtered(scores: Tensor, nucleus: Nucleus, seeds: Tensor, positions: Tensor) -> Tensor:
    if scores.is_cuda:
        return gumbel_argmax(keep_of_all(scores, nucleus), seeds, positions)
    likeliest, token_ids, complete = keep_likeliest(scores, nucleus)
    columns = gumbel_argmax(likeliest, seeds, positions, token_ids)
    tokens = token_ids.gather(1, columns[:, None]).squeeze(1)
    if not complete.all():
        rest = (~complete).nonzero().squeeze(1)
        stay = keep_of_all(scores[rest], nucleus.take(rest))
        tokens[rest] = gumbel_argmax(stay, seeds[rest], positions[rest])
    return tokens


def _hold_back(logits: Tensor, slots: Requests, rows: _Rows) -> None:
    """-inf for the stop tokens of rows that have not generated their min_tokens yet."""
    held = rows.slots[rows.held_back]
    early = slots.num_tokens[held] - slots.num_prompt[held] < slots.sampling.min_tokens[held]
    index: list[int] = []
    tokens: list[int] = []
    for row, slot in zip(rows.held_back[early].tolist(), held[early].tolist(), strict=True):
        ids: Sequence[int] = [i for i in slots.sampling.stop_ids[slot] if 0 <= i < logits.shape[1]]
        index += [row] * len(ids)
        tokens += ids
    if tokens:
        places = upload(np.array([index, tokens], np.int64), logits.device)
        logits.index_put_((places[0], places[1]), upload(np.full(1, -np.inf, np.float32), logits.device))


def _penalize(logits: Tensor, slots: Requests, rows: _Rows) -> None:
    """Repetition (prompt and output), frequency and presence (output only) penalties.

    Only the logits of tokens that occur are visited. A token that occurs twice is visited twice, both times
    with the same outcome.
    """
    penalized = rows.slots[rows.penalized]
    lengths = slots.num_tokens[penalized]
    place = np.arange(lengths.max())
    known = place < lengths[:, None]
    generated = (place >= slots.num_prompt[penalized][:, None]) & known

    device, columns = logits.device, slots.sampling
    tokens = torch.as_tensor(slots.history(penalized, len(place))).to(device, torch.int64)
    tokens = torch.where(upload(known, device), tokens, tokens[:, :1])
    counts = torch.zeros(len(penalized), logits.shape[1], device=device)
    counts.scatter_add_(1, tokens, upload(generated.astype(np.float32), device))
    count = counts.gather(1, tokens)
    repetition, frequency, presence = (
        upload(column[penalized][:, None].astype(np.float32), device)
        for column in (columns.repetition_penalty, columns.frequency_penalty, columns.presence_penalty)
    )
    index = upload(rows.penalized, device)[:, None]
    values = logits[index, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index, tokens] = values - frequency * count - presence * (count > 0)
