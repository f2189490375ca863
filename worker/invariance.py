"""`batch_invariant`: does this device give a token the same bits, whatever is computed beside it?

On CPUs: matrix libraries multiply few rows in another order than many. From some number of rows on, or in
multiples of one, every row's result is the same wherever it stands; which number that is depends on the CPU
and the type, so it is looked for when the model is loaded, with matrices of the model's shapes.

On GPUs: kernels that sum in a fixed order rest on matrix instructions of different shapes adding alike. They
are compared in every tiling.

The trials' sums cancel, so that another order of summation shows in most results, not in one of a thousand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ipc.errors import ConfigError
from ..kernels import fixed_order_attention, fixed_order_linear
from ..kernels.invariant_attention import LONG, invariant_attention, plan_invariant

_MULTIPLES = (1, 2, 4, 16, 32)
_COUNTS = (1, 2, 3, 5, 7, 8, 9, 11, 12, 16, 17, 31, 33, 48, 64, 65, 97, 300, 512, 1000)
"""Of rows that are multiplied together in a trial."""
_TRIALS = 64
"""Different rows."""
_LONGEST = 1 << 31
"""Multiplications in a trial: about a second's."""
_MAGNIFIED = 2.0**12
"""A scale of attention at which rounding errors alone decide what is attended to."""
_CUTS = [
    *((begin, begin + 1) for begin in range(0, 700, 13)),
    *((257, 257 + length) for length in range(2, 70)),
    *((0, 101), (101, 130), (255, 257), (510, 513), (512, 700)),
]
"""Of a prompt of 700 tokens."""


def find_row_multiple(model: nn.Module) -> int:
    """The smallest multiple of rows with which matrices of the model's shapes multiply each row alike.

    Raises ConfigError when none does.
    """
    shapes = {tuple(p.shape): p.dtype for p in model.parameters() if p.dim() == 2}
    for multiple in _MULTIPLES:
        if all(_is_invariant(shape, dtype, multiple) for shape, dtype in shapes.items()):
            return multiple
    message = "batch_invariant=True: this CPU's matrix library gives a row other results beside other rows"
    raise ConfigError(message, parameter="batch_invariant", value=True, limit=False)


def find_query_multiple(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """The smallest multiple of query rows with which attention does not depend on how a prompt is cut up.

    Raises ConfigError when there is none.
    """
    generator = torch.Generator().manual_seed(0)
    length, size = LONG + 188, 4
    blocks = length // size
    q, keys = _vanishing(length * heads, blocks * size * kv_heads, head_dim, dtype, generator)
    q, keys = q.view(length, heads, head_dim), keys.view(blocks, size, kv_heads, head_dim)
    values = torch.randn(keys.shape, generator=generator).to(dtype)
    tables = torch.arange(blocks, dtype=torch.int32)[None]

    def attend(begin: int, end: int, multiple: int) -> Tensor:
        decodes = int(end - begin == 1)
        tiles = plan_invariant(tables, [end - begin], [end], decodes, size, heads // kv_heads, multiple)
        return invariant_attention(q[begin:end], keys, values, tiles, _MAGNIFIED)

    for multiple in _MULTIPLES:
        whole = attend(0, length, multiple)
        if all(torch.equal(attend(begin, end, multiple), whole[begin:end]) for begin, end in _CUTS):
            return multiple
    message = "batch_invariant=True: on this CPU attention depends on how a prompt is cut into chunks"
    raise ConfigError(message, parameter="batch_invariant", value=True, limit=False)


_GPU_ROWS = (1, 16, 17, 40, 65, 129, 300, 700)
"""That are multiplied together: some for every way and tiling."""
_GPU_SHAPES = ((128, 1024), (8192, 256))
"""Matrices whose columns are cut into runs, and not."""


def check_fixed_order(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ConfigError if kernels that sum in a fixed order give a row other results beside other rows."""
    if not all(_multiplies_alike(shape, dtype, device) for shape in _GPU_SHAPES):
        message = "batch_invariant=True: this GPU's matrix instructions add differently for few rows and many"
        raise ConfigError(message, parameter="batch_invariant", value=True, limit=False)
    if not _attends_alike(heads, kv_heads, head_dim, dtype, device):
        message = "batch_invariant=True: on this GPU attention depends on how a prompt is cut into chunks"
        raise ConfigError(message, parameter="batch_invariant", value=True, limit=False)


def _multiplies_alike(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, matrix = (part.to(device) for part in _cancelling(_GPU_ROWS[-1], *shape, dtype, generator))
    workspace = fixed_order_linear.Workspace.empty(device)
    whole = fixed_order_linear.fixed_order_linear(rows, matrix, workspace=workspace)
    return all(
        torch.equal(
            fixed_order_linear.fixed_order_linear(rows[-count:], matrix, workspace=workspace), whole[-count:]
        )
        for count in _GPU_ROWS
    )


def _attends_alike(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """A prompt in one piece and in two, and its tokens one by one: alone and many at once."""
    generator = torch.Generator().manual_seed(0)
    length, size = 2 * fixed_order_attention.CHUNK + 88, 8
    sequence = _sequence(length, size, heads, kv_heads, head_dim, dtype, generator)
    q, keys, values = (part.to(device) for part in sequence)
    workspace = fixed_order_attention.Workspace.empty(heads, kv_heads, head_dim, 8, length, device)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}

    def attend(queries: Tensor, ends: list[int], per_tile: int) -> Tensor:
        """Of tokens that are one row, or of one row each."""
        rows, each = len(ends), len(queries) // len(ends)
        tiles = [[row, first] for row in range(rows) for first in range(0, each, per_tile)]
        return fixed_order_attention.fixed_order_attention(
            queries,
            keys,
            values,
            block_tables=torch.arange(len(keys), **ints)[None],
            table_rows=torch.zeros(rows, **ints),
            query_start=torch.arange(rows + 1, **ints) * each,
            seq_lens=torch.tensor(ends, **ints),
            tiles=torch.tensor(tiles, **ints),
            tile_tokens=per_tile,
            scale=head_dim**-0.5,
            workspace=workspace,
        )

    tokens = fixed_order_attention.tile_tokens(heads, kv_heads)
    whole = attend(q, [length], tokens)
    cut = fixed_order_attention.CHUNK + 17
    pieces = [attend(q[:cut], [cut], tokens), attend(q[cut:], [length], tokens)]
    ends = list(range(1, length + 1))
    few = [attend(q[end - 3 : end], ends[end - 3 : end], 1) for end in (cut, length)]
    return (
        torch.equal(torch.cat(pieces), whole)
        and torch.equal(attend(q, ends, 1), whole)
        and torch.equal(torch.cat(few), torch.cat((whole[cut - 3 : cut], whole[-3:])))
    )


def _is_invariant(shape: tuple[int, ...], dtype: torch.dtype, multiple: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, matrix = _vanishing(_TRIALS, shape[0], shape[1], dtype, generator)
    expected = F.linear(rows, matrix)
    for count in sorted({-(-count // multiple) * multiple for count in _COUNTS}):
        if count * matrix.numel() > _LONGEST:
            break
        chosen = torch.randint(_TRIALS, (count,), generator=generator)
        if not torch.equal(F.linear(rows[chosen], matrix), expected[chosen]):
            return False
    return True


def _vanishing(
    rows: int, others: int, size: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[rows, size] and [others, size] whose products are 0 but for what was rounded on the way.

    That is another number for nearly every order of summation, and its first digits show it in any type.
    """
    half = size // 2

    def wide(count: int) -> Tensor:
        magnitudes = torch.exp2(16 * torch.rand(count, half, generator=generator) - 8)
        return (torch.randn(count, half, generator=generator) * magnitudes).to(dtype)

    left, right = wide(rows), wide(others)
    order = torch.randperm(half, generator=generator)
    odd = size - 2 * half
    return (
        torch.cat((left, left[:, order], torch.zeros(rows, odd, dtype=dtype)), dim=1),
        torch.cat((right, -right[:, order], torch.zeros(others, odd, dtype=dtype)), dim=1),
    )


def _cancelling(
    rows: int, others: int, size: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[rows, size] and [others, size] whose products are small differences of large sums."""
    half = size // 2
    right = torch.randn(others, half, generator=generator).to(dtype)
    left = torch.randn(rows, half, generator=generator).to(dtype)
    noise = 1 + 2**-8 * torch.randn(rows, half, generator=generator)
    odd = size - 2 * half
    return (
        torch.cat((left, (left * noise).to(dtype), torch.zeros(rows, odd, dtype=dtype)), dim=1),
        torch.cat((right, -right, torch.zeros(others, odd, dtype=dtype)), dim=1),
    )


def _sequence(
    length: int,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries; keys and values in blocks, of which neighbours are equally likely and nearly cancel."""
    blocks = length // block_size
    q, keys = _cancelling(length * heads, blocks * block_size * kv_heads, head_dim, dtype, generator)
    q, keys = q.view(length, heads, head_dim), keys.view(blocks, block_size, kv_heads, head_dim)
    keys[:, 1::2] = keys[:, ::2]
    values = torch.randn(keys.shape, generator=generator).to(dtype)
    values[:, 1::2] = (values[:, ::2].float() * -1.01).to(dtype)
    return q, keys, values
