"""Draw one token per row with noise that is a function of (seed, position, token id) and of nothing else.

Gumbel-max: argmax over tokens of score + Gumbel noise is a draw from softmax(score). A token's noise depends
neither on the batch nor on which other tokens are in the race, so filtering only removes competitors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .jit import tl, triton

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_TOKEN = 0x9E3779B1 - (1 << 32)
_FINAL_1 = 0x85EBCA6B - (1 << 32)
_FINAL_2 = 0xC2B2AE35 - (1 << 32)
_LARGEST = 1 - 2**-24
"""Largest float32 below 1: keeps log1p(-uniform) finite."""


def gumbel_argmax(
    scores: Tensor, seeds: Tensor, positions: Tensor, token_ids: Tensor | None = None
) -> Tensor:
    """The column of each row that wins with its noise added.

    Args:
        scores: float32 [rows, columns], natural logarithms up to a constant per row; -inf never wins unless
            all are. No NaN.
        seeds, positions: int64 [rows]
        token_ids: int64 [rows, columns], whose noise a column gets; None: column i is token i.

    Returns: int64 [rows]. Of columns that tie the first wins.
    """
    if scores.is_cuda and token_ids is None:
        return gumbel_argmax_triton(scores, seeds, positions)
    return gumbel_argmax_reference(scores, seeds, positions, token_ids)


def gumbel_argmax_reference(
    scores: Tensor, seeds: Tensor, positions: Tensor, token_ids: Tensor | None = None
) -> Tensor:
    """`gumbel_argmax` in torch."""
    if token_ids is None:
        token_ids = _all_tokens(scores.shape[1], scores.device)
    race = exponential_noise(noise_keys(seeds, positions), token_ids).log_()
    return torch.sub(scores, race, out=race).argmax(dim=-1)


@cache
def _all_tokens(columns: int, device: torch.device) -> Tensor:
    """int32 [1, columns], kept: counting to 49152 takes a CPU a third of the time of all the noise."""
    return torch.arange(columns, dtype=torch.int32, device=device)[None]


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """int32 [rows, 2]: a row's 64 bit key, halved."""
    key = seeds * _MIX_1 + (positions + 1) * _GOLDEN  # + 1: the mixing leaves 0 as it is
    key = (key ^ (key >> 30 & (1 << 34) - 1)) * _MIX_1
    key = (key ^ (key >> 27 & (1 << 37) - 1)) * _MIX_2
    key = key ^ (key >> 31 & (1 << 33) - 1)
    return key.view(torch.int32).view(-1, 2)


def exponential_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Exponential variates (positive float32), whose negative logarithm is the Gumbel noise.

    Args:
        keys: int32 [rows, 2] of `noise_keys`
        token_ids: [rows or 1, columns]

    The hash is a 32 bit finalizer of token id and key. Small variates, which win races, are the precise ones:
    the uniform is taken near 0, where float32 is dense.
    """
    bits = (token_ids.to(torch.int32) * _TOKEN) ^ keys[:, :1]
    spare = torch.empty_like(bits)
    _fold(bits, 16, spare).mul_(_FINAL_1)
    _fold(bits, 13, spare).add_(keys[:, 1:]).mul_(_FINAL_2)
    _fold(bits, 16, spare).bitwise_and_(0x7FFFFFFF)
    uniform = spare.view(torch.float32).copy_(bits).add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST)
    return uniform.neg_().log1p_().neg_()


def _fold(bits: Tensor, shift: int, spare: Tensor) -> Tensor:
    """bits ^= bits >> shift, the shift being of unsigned integers."""
    torch.bitwise_right_shift(bits, shift, out=spare)
    return bits.bitwise_xor_(spare.bitwise_and_((1 << 32 - shift) - 1))


# --- Triton ------------------------------------------------------------------------------------------

_BLOCK = 2048
"""Columns per program: 24 programs a row for 49152 tokens, so that one row already spreads over a GPU."""


@triton.jit  # type: ignore[untyped-decorator]
def _gumbel_kernel(
    scores_ptr,  # float32 [rows, columns]
    keys_ptr,  # int32 [rows, 2]
    best_ptr,  # float32 [rows, blocks]
    winner_ptr,  # int64 [rows, blocks]
    columns,
    row_stride,
    largest,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    first = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)

    bits = (column.to(tl.uint32) * 0x9E3779B1) ^ first
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = ((bits ^ (bits >> 13)) + second) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) & 0x7FFFFFFF
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 4.656612873077393e-10, largest)
    # -log1p(-uniform): what rounding loses in 1 - uniform cancels in the quotient.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / (1.0 - rest)))

    score = tl.load(scores_ptr + row * row_stride + column, mask=inside, other=-float("inf"))
    score = tl.where(inside, score - tl.log(exponential), -float("inf"))
    best, place = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + block
    tl.store(best_ptr + at, best)
    tl.store(winner_ptr + at, (block * BLOCK + place).to(tl.int64))


def gumbel_argmax_triton(scores: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """`gumbel_argmax` without token ids: the noise is made in registers, each score is read once."""
    rows, columns = scores.shape
    blocks = triton.cdiv(columns, _BLOCK)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=scores.device)
    winner = torch.empty(rows, blocks, dtype=torch.int64, device=scores.device)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    keys = noise_keys(seeds, positions)
    _gumbel_kernel[rows, blocks](
        scores, keys, best, winner, columns, scores.stride(0), _LARGEST, BLOCK=_BLOCK
    )
    return winner.gather(1, best.argmax(dim=-1, keepdim=True)).squeeze(1)
