"""The ends of an engine step that touch the slot table: inputs are read from there, tokens written back.

A slot's tokens, lengths and blocks stay on the device. With these kernels around the model a decode step
takes nothing from the host but its launch, and gives it nothing but the sampled tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_TOKENS = 256
"""Tokens of a row that one program lays out."""


class StepInputs(NamedTuple):
    """A step as model and attention take it."""

    input_ids: Tensor
    """int64 [tokens]"""
    positions: Tensor
    """int64 [tokens]"""
    slot_mapping: Tensor
    """int64 [tokens]: block * block_size + offset of each token's keys and values."""
    seq_lens: Tensor
    """int32 [rows]: tokens of each row's sequence after the step."""


def decode_inputs(
    slots: Tensor, lengths: Tensor, tokens: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    """The step in which row i computes the next token of slot `slots[i]`.

    Args:
        slots: int32 [rows]
        lengths: int32 [slots]: how many tokens of each slot are computed. May be a column of a table.
        tokens: int32 [slots, max_tokens]
        block_tables: int32 [slots, max_blocks]
    """
    if slots.is_cuda:
        return decode_inputs_triton(slots, lengths, tokens, block_tables, block_size)
    return decode_inputs_reference(slots, lengths, tokens, block_tables, block_size)


def decode_inputs_triton(
    slots: Tensor, lengths: Tensor, tokens: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    """`decode_inputs` in one launch."""
    rows = len(slots)
    ids, positions, places = torch.empty(3, rows, dtype=torch.int64, device=slots.device)
    seq_lens = torch.empty(rows, dtype=torch.int32, device=slots.device)
    _decode_inputs_kernel[(triton.cdiv(rows, 32),)](
        slots,
        lengths,
        tokens,
        block_tables,
        ids,
        positions,
        places,
        seq_lens,
        rows,
        lengths.stride(0),
        tokens.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=32,
        num_warps=1,
        **pdl_options(slots),
    )
    return StepInputs(ids, positions, places, seq_lens)


def decode_inputs_reference(
    slots: Tensor, lengths: Tensor, tokens: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    """`decode_inputs` in torch."""
    index = slots.long()
    positions = lengths[index].long()
    blocks = block_tables[index, positions // block_size].long()
    return StepInputs(
        tokens[index, positions].long(),
        positions,
        blocks * block_size + positions % block_size,
        (positions + 1).int(),
    )


def packed_inputs(
    slots: Tensor,
    query_start: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_tokens: int,
    longest: int,
) -> StepInputs:
    """The step in which row i computes tokens `starts[i]`, `starts[i] + 1`, ... of slot `slots[i]`.

    Sets `lengths` of these slots to what is computed after the step, but not that of the table's last slot,
    which is padding.

    Args:
        query_start: int32 [rows + 1]: each row's first token in the step; the last is `num_tokens`.
        starts: int32 [rows]
        longest: at least the largest number of tokens of a row.
        slots, lengths, tokens, block_tables: as for `decode_inputs`.
    """
    inputs = packed_inputs_triton if slots.is_cuda else packed_inputs_reference
    return inputs(slots, query_start, starts, lengths, tokens, block_tables, block_size, num_tokens, longest)


def packed_inputs_triton(
    slots: Tensor,
    query_start: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_tokens: int,
    longest: int,
) -> StepInputs:
    """`packed_inputs` in one launch."""
    ids, positions, places = torch.empty(3, num_tokens, dtype=torch.int64, device=slots.device)
    seq_lens = torch.empty(len(slots), dtype=torch.int32, device=slots.device)
    _packed_inputs_kernel[len(slots), triton.cdiv(longest, _TOKENS)](
        slots,
        query_start,
        starts,
        lengths,
        tokens,
        block_tables,
        ids,
        positions,
        places,
        seq_lens,
        len(tokens) - 1,
        lengths.stride(0),
        tokens.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=_TOKENS,
        **pdl_options(slots),
    )
    return StepInputs(ids, positions, places, seq_lens)


def packed_inputs_reference(
    slots: Tensor,
    query_start: Tensor,
    starts: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_tokens: int,
    longest: int,
) -> StepInputs:
    """`packed_inputs` in torch."""
    counts = query_start.diff().long()
    row = torch.arange(len(slots), device=slots.device).repeat_interleave(counts, output_size=num_tokens)
    positions = (starts - query_start[:-1])[row] + torch.arange(num_tokens, device=slots.device)
    index = slots.long()[row]
    blocks = block_tables[index, positions // block_size].long()
    seq_lens = (starts + counts).int()
    real = slots != len(tokens) - 1
    lengths[slots[real].long()] = seq_lens[real]
    return StepInputs(
        tokens[index, positions].long(),
        positions,
        blocks * block_size + positions % block_size,
        seq_lens,
    )


def append_tokens(
    sampled: Tensor,
    slots: Tensor,
    ends: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    results: Tensor,
    counter: Tensor,
) -> None:
    """Append each row's sampled token to its slot, report it, and go on to the next row of results.

    Args:
        sampled: int64 [rows]
        slots: int32 [rows]; the last slot of the table is padding and stays as it is.
        ends: int32 [rows]: where the token stands in its slot; also the slot's new length.
        results: int32 [steps, max_rows]: row `counter` gets the tokens. May be pinned host memory.
        counter: int32 [1]: goes up by one, and from the last row back to 0: a count of all steps would leave
            int32 after 2**31 of them, a month of a small model's.
        lengths, tokens: as for `decode_inputs`.
    """
    append = append_tokens_triton if sampled.is_cuda else append_tokens_reference
    append(sampled, slots, ends, lengths, tokens, results, counter)


def append_tokens_triton(
    sampled: Tensor,
    slots: Tensor,
    ends: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    results: Tensor,
    counter: Tensor,
) -> None:
    """`append_tokens` in one launch."""
    _append_tokens_kernel[(1,)](
        sampled,
        slots,
        ends,
        lengths,
        tokens,
        results,
        counter,
        len(sampled),
        len(tokens) - 1,
        results.shape[0],
        results.stride(0),
        lengths.stride(0),
        tokens.stride(0),
        BLOCK=min(triton.next_power_of_2(len(sampled)), 1024),
        **pdl_options(sampled),
    )


def append_tokens_reference(
    sampled: Tensor,
    slots: Tensor,
    ends: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    results: Tensor,
    counter: Tensor,
) -> None:
    """`append_tokens` in torch."""
    results[int(counter), : len(sampled)] = sampled
    counter.copy_((counter + 1) % len(results))
    real = slots != len(tokens) - 1
    index = slots[real].long()
    tokens[index, ends[real].long()] = sampled[real].int()
    lengths[index] = ends[real]


# --- Triton ------------------------------------------------------------------------------------------


# Not by alignments, which differ from step to step: another form would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["rows", "positions_ptr"])  # type: ignore[untyped-decorator]
def _decode_inputs_kernel(
    slots_ptr,
    lengths_ptr,
    tokens_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    places_ptr,
    seq_lens_ptr,
    rows,
    length_stride,
    token_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    allow_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    slot = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
    position = tl.load(lengths_ptr + slot * length_stride, mask=inside, other=0)
    token = tl.load(tokens_ptr + slot * token_stride + position, mask=inside, other=0)
    block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
    tl.store(ids_ptr + row, token.to(tl.int64), mask=inside)
    tl.store(positions_ptr + row, position.to(tl.int64), mask=inside)
    tl.store(places_ptr + row, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    tl.store(seq_lens_ptr + row, position + 1, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])  # type: ignore[untyped-decorator]
def _packed_inputs_kernel(
    slots_ptr,
    query_start_ptr,
    starts_ptr,
    lengths_ptr,
    tokens_ptr,
    tables_ptr,
    ids_ptr,
    positions_ptr,
    places_ptr,
    seq_lens_ptr,
    padding_slot,
    length_stride,
    token_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    allow_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    first = tl.load(query_start_ptr + row)
    count = tl.load(query_start_ptr + row + 1) - first
    start = tl.load(starts_ptr + row)
    if tl.program_id(1) == 0:
        tl.store(seq_lens_ptr + row, start + count)
        if slot != padding_slot:
            tl.store(lengths_ptr + slot * length_stride, start + count)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    position = start + offset
    token = tl.load(tokens_ptr + slot * token_stride + position, mask=inside, other=0)
    block = tl.load(tables_ptr + slot * table_stride + position // BLOCK_SIZE, mask=inside, other=0)
    tl.store(ids_ptr + first + offset, token.to(tl.int64), mask=inside)
    tl.store(positions_ptr + first + offset, position.to(tl.int64), mask=inside)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(places_ptr + first + offset, place, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["rows"])  # type: ignore[untyped-decorator]
def _append_tokens_kernel(
    sampled_ptr,
    slots_ptr,
    ends_ptr,
    lengths_ptr,
    tokens_ptr,
    results_ptr,
    counter_ptr,
    rows,
    padding_slot,
    steps,
    result_stride,
    length_stride,
    token_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    allow_next(PDL)
    wait_previous(PDL)
    count = tl.load(counter_ptr)
    result_ptr = results_ptr + count * result_stride
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < rows
        token = tl.load(sampled_ptr + row, mask=inside, other=0).to(tl.int32)
        slot = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
        end = tl.load(ends_ptr + row, mask=inside, other=0)
        real = inside & (slot != padding_slot)
        tl.store(tokens_ptr + slot * token_stride + end, token, mask=real)
        tl.store(lengths_ptr + slot * length_stride, end, mask=real)
        tl.store(result_ptr + row, token, mask=inside)
    tl.debug_barrier()
    tl.store(counter_ptr, (count + 1) % steps)
