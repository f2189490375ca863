"""Draw a token per row from its logits at the row's temperature: for rows that want nothing else of sampling.

    token = argmax(logit / temperature + Gumbel(seed, position, token)),  temperature 0: argmax(logit)

The noise is that of `sampling`. Logits are read once, in the dtype that the model left them in, and nothing
of their size is written: a program finds the winner of a block of columns, a second launch the winner of a
row's blocks. Where every rank has the logits of some tokens, the second launch also finds the winner of the
ranks: they exchange a word per row, and each takes the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .jit import INTERPRETED, tl, triton
from .mailbox import Layout, Mailbox, box_pointers, clear, own_pointer, receive, send
from .pdl import allow_next, pdl_options, wait_previous
from .sampling import gumbel_argmax_reference

_BLOCK = 4096
"""Columns per program with many rows: enough loads under way in each."""
_SMALL_BLOCK = 1024
"""With few rows: 126 programs for a row of 128256 columns."""


class Share(NamedTuple):
    """Which tokens this rank has the logits of."""

    first: int
    """The token of column 0."""
    columns: int
    """How many tokens; further columns are padding."""
    mailbox: Mailbox
    """Of `winners_layout`."""
    live: bool = True
    """False launches the same kernels without exchanging anything."""


def winners_layout(size: int, rows: int) -> Layout:
    """For draws of up to `rows` rows."""
    return Layout(rows, size, 1, torch.int64)


def draw_tokens(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
    *,
    share: Share | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """The tokens drawn, int64 [rows]. Of equal scores the first wins.

    Args:
        logits: [rows, vocab], any float dtype, columns adjacent, no NaN; -inf never wins unless all are.
        temperatures: float32 [slots], seeds: int64 [slots]; both may be columns of tables.
        positions: [rows], index of the drawn token in its sequence.
        slots: integer [rows], where row i finds temperature and seed; None: at i.
        share: the columns are those of one rank; the result is the same on all.
        thresholds: float32 [rows], below which logits are out of the race; None: none are.
    """
    if logits.is_cuda:
        return draw_tokens_triton(
            logits, temperatures, seeds, positions, slots, share=share, thresholds=thresholds
        )
    assert share is None
    return draw_tokens_reference(logits, temperatures, seeds, positions, slots, thresholds)


def draw_tokens_reference(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """`draw_tokens` in torch."""
    if thresholds is not None:
        logits = logits.masked_fill(logits.float() < thresholds[:, None], -torch.inf)
    if slots is not None:
        temperatures, seeds = temperatures[slots.long()], seeds[slots.long()]
    greedy = temperatures == 0
    scores = logits.float() / torch.where(greedy, 1.0, temperatures)[:, None]
    drawn = gumbel_argmax_reference(scores, seeds, positions.long())
    return torch.where(greedy, logits.argmax(dim=-1), drawn)


# --- Triton ------------------------------------------------------------------------------------------


def draw_tokens_triton(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
    *,
    share: Share | None = None,
    thresholds: Tensor | None = None,
) -> Tensor:
    """`draw_tokens` in two launches."""
    rows, columns = logits.shape
    if share is not None:
        columns = share.columns
    assert logits.stride(1) == 1
    block = _SMALL_BLOCK if rows <= 4 else _BLOCK
    blocks = max(triton.cdiv(columns, block), 1)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    winner = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    options = pdl_options(logits)
    _draw_block_kernel[blocks, rows](
        logits,
        temperatures,
        seeds,
        positions,
        positions if slots is None else slots,
        temperatures if thresholds is None else thresholds,
        best,
        winner,
        columns,
        logits.stride(0),
        temperatures.stride(0),
        seeds.stride(0),
        0 if share is None else share.first,
        HAS_SLOTS=slots is not None,
        HAS_THRESHOLDS=thresholds is not None,
        BLOCK=block,
        **options,
    )
    size = 1 if share is None else share.mailbox.layout.sources
    _draw_row_kernel[(rows,)](
        best,
        winner,
        tokens,
        tokens if share is None else share.mailbox.addresses,
        winner if share is None else share.mailbox.turns,
        blocks,
        0 if share is None else int(share.live),
        BLOCKS=triton.next_power_of_2(blocks),
        RANK=0 if share is None else share.mailbox.rank,
        SIZE=size,
        WIDTH=triton.next_power_of_2(size),
        num_warps=1,
        **options,
    )
    return tokens


@triton.jit
def _mix(bits, shift: tl.constexpr):
    return bits ^ (bits >> shift)


@triton.jit
def _noise(column, seed, position):
    """Gumbel noise: see `sampling.noise_keys` and `exponential_noise`."""
    key = seed.to(tl.uint64, bitcast=True) * 0xBF58476D1CE4E5B9
    key += (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    key = _mix(key, 30) * 0xBF58476D1CE4E5B9
    key = _mix(key, 27) * 0x94D049BB133111EB
    key = _mix(key, 31)
    bits = (column.to(tl.uint32) * 0x9E3779B1) ^ key.to(tl.uint32)
    bits = _mix(bits, 16) * 0x85EBCA6B
    bits = (_mix(bits, 13) + (key >> 32).to(tl.uint32)) * 0xC2B2AE35
    bits = _mix(bits, 16) & 0x7FFFFFFF
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.999999940395355224609375)
    # -log1p(-uniform): small values by their series, which is exact to 1e-6 there and needs no division.
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.03125, series, -0.6931471805599453 * _log2(1.0 - uniform))
    return -0.6931471805599453 * _log2(exponential)


@triton.jit
def _log2(x):
    """The hardware's logarithm, 3e-7 off at most: an exact one is 25 instructions, half of this kernel's."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _draw_block_kernel(
    logits_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    slots_ptr,
    thresholds_ptr,
    best_ptr,
    winner_ptr,
    columns,
    row_stride,
    temperature_stride,
    seed_stride,
    first_token,
    HAS_SLOTS: tl.constexpr,
    HAS_THRESHOLDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    allow_next(PDL)
    wait_previous(PDL)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperatures_ptr + slot * temperature_stride)
    seed = tl.load(seeds_ptr + slot * seed_stride)
    position = tl.load(positions_ptr + row)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    score = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_THRESHOLDS:
        inside &= score >= tl.load(thresholds_ptr + row)
        score = tl.where(inside, score, -float("inf"))
    if temperature > 0:
        score = tl.where(
            inside, score * (1.0 / temperature) + _noise(first_token + column, seed, position), -float("inf")
        )
    best, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(0) + block
    tl.store(best_ptr + at, best)
    tl.store(winner_ptr + at, first_token + block * BLOCK + place)


@triton.jit(do_not_specialize=["live"])
def _draw_row_kernel(
    best_ptr,
    winner_ptr,
    tokens_ptr,
    addresses_ptr,
    turns_ptr,
    blocks,
    live,
    BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    allow_next(PDL)
    wait_previous(PDL)
    block = tl.arange(0, BLOCKS)
    score = tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=-float("inf"))
    place = tl.argmax(score, axis=0, tie_break_left=True)
    token = tl.load(winner_ptr + row * blocks + place).to(tl.int64)
    if SIZE > 1:
        boxes = box_pointers(addresses_ptr, tl.int64, SIZE, WIDTH)
        own = own_pointer(addresses_ptr, tl.int64, RANK)
        turn = tl.load(turns_ptr + row)
        first = row * (3 * SIZE)
        whole = tl.arange(0, 1)[None, :] >= 0
        word = tl.full([1, 1], 0, tl.int64) + _word(tl.max(score, 0), token)
        send(boxes, first + turn * SIZE + RANK, word, whole, live, SIZE, WIDTH)
        clear(own, first + (turn + 2) % 3 * SIZE, whole, 1, SIZE, WIDTH)
        tl.store(turns_ptr + row, (turn + live) % 3)
        words = receive(own, first + turn * SIZE, whole, live, 1, SIZE, WIDTH)
        exists = tl.arange(0, WIDTH)[:, None] < SIZE
        best = tl.max(tl.max(tl.where(exists, words, -9223372036854775808), 1), 0)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(tokens_ptr + row, token)


@triton.jit
def _word(score, token):
    """A word that is the larger the better the score, and of equal scores the lower the token."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token)
