"""top_k, top_p and min_p on the device: the lowest logit of each row that stays in the race.

Tokens of equal logits share their fate, so that a row's filter is one threshold and needs no sort: min_p
keeps what is at least so likely beside the likeliest; of that top_k every token that is as likely as the
k-th; of those top_p the shortest run of the likeliest whose probability (within those) reaches it.

The threshold is found by counting: how many tokens, and how much probability, are at or above an edge? All
programs count at edges over the whole range (first launch of `_count_kernel`), then at edges between the two
that enclose the threshold (second launch); what is between two of those is gathered, a few hundred logits
mostly, and bisected by one program a row until the threshold is one of them. Probabilities are summed as
integers, 2^40 for the likeliest token, so that the outcome does not depend on the order in which programs
run. Nothing waits for the host, and rows without a filter cost an empty program.

Tokens more than `_DEPTH` (in units of the temperature) below the likeliest count for nothing: together they
have less than 2e-9 of the probability, and no noise can make one of them win.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_DEPTH = 32.0
_EDGES = 16
_BLOCK = 4096
_LAST_BLOCK = 2048
"""Gathered logits that the last program keeps in registers; more it reads again and again."""


def stay_thresholds(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """float32 [rows]: tokens whose logit is at least this stay; -inf where all do.

    Args:
        logits: [rows, vocab], any float dtype, columns adjacent, no NaN.
        temperatures: float32 [slots], of 0 everything stays; top_k: int32 [slots], 0 is off; top_p: float64
            [slots], 1 is off; log_min_p: float32 [slots], the logarithm of min_p, -inf is off. All may be
            columns of tables.
        slots: integer [rows], where row i finds them; None: at i.
    """
    thresholds = stay_thresholds_triton if logits.is_cuda else stay_thresholds_reference
    return thresholds(logits, temperatures, top_k, top_p, log_min_p, slots)


def stay_thresholds_reference(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """`stay_thresholds` in torch, in float64, by sorting."""
    found = torch.full((len(logits),), -torch.inf, device=logits.device)
    for row, slot in enumerate(range(len(logits)) if slots is None else slots.tolist()):
        temperature, k, p = float(temperatures[slot]), int(top_k[slot]), float(top_p[slot])
        if temperature == 0 or (k <= 0 and p >= 1 and float(log_min_p[slot]) == -torch.inf):
            continue
        values = logits[row].double().sort(descending=True).values
        weights = ((values - values[0]) / temperature).exp()
        stays = (values - values[0]) / temperature >= max(float(log_min_p[slot]), -_DEPTH)
        if k > 0:
            stays &= values >= values[min(k, len(values)) - 1]
        if p < 1:
            reached = (weights * stays).cumsum(0)
            stays &= reached - weights < p * reached[-1]
        found[row] = values[stays][-1]
    return found


# --- Triton ------------------------------------------------------------------------------------------


def stay_thresholds_triton(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    log_min_p: Tensor,
    slots: Tensor | None = None,
    block: int = _BLOCK,
    last_block: int = _LAST_BLOCK,
) -> Tensor:
    """`stay_thresholds` in five launches."""
    rows, columns = logits.shape
    assert logits.stride(1) == 1
    device = logits.device
    blocks = triton.cdiv(columns, block)
    wishes = torch.empty(rows, 4, dtype=torch.float64, device=device)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    sums = torch.empty(2, rows, 2, blocks, _EDGES, dtype=torch.int64, device=device)
    gathered = torch.empty(rows, columns, dtype=torch.float32, device=device)
    num_gathered = torch.empty(rows, dtype=torch.int32, device=device)
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    sizes = (columns, logits.stride(0))
    options = pdl_options(logits)
    wide = {"BLOCKS": triton.next_power_of_2(blocks), "EDGES": _EDGES, **options}
    grid = (blocks, rows)
    _begin_kernel[grid](
        logits,
        temperatures,
        top_k,
        top_p,
        log_min_p,
        top_k if slots is None else slots,
        temperatures.stride(0),
        top_k.stride(0),
        top_p.stride(0),
        log_min_p.stride(0),
        wishes,
        best,
        num_gathered,
        *sizes,
        HAS_SLOTS=slots is not None,
        DEPTH=_DEPTH,
        BLOCK=block,
        **options,
    )
    for level in (0, 1):
        _count_kernel[grid](logits, wishes, best, sums, *sizes, LEVEL=level, BLOCK=block, num_warps=8, **wide)
    _gather_kernel[grid](
        logits, wishes, best, sums, gathered, num_gathered, *sizes, BLOCK=block, num_warps=8, **wide
    )
    _bisect_kernel[(rows,)](
        wishes, best, sums, gathered, num_gathered, thresholds, columns, blocks, BLOCK=last_block, **wide
    )
    return thresholds


@triton.jit
def _begin_kernel(
    logits_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    slots_ptr,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    log_min_p_stride,
    wishes_ptr,
    best_ptr,
    num_gathered_ptr,
    columns,
    row_stride,
    HAS_SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Note what each row wishes (see `_wish`), and the best logit of each of its blocks."""
    row = tl.program_id(1).to(tl.int64)
    allow_next(PDL)
    wait_previous(PDL)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperatures_ptr + slot * temperature_stride)
    top_k = tl.load(top_k_ptr + slot * top_k_stride)
    top_p = tl.load(top_p_ptr + slot * top_p_stride)
    log_min_p = tl.load(log_min_p_ptr + slot * log_min_p_stride)
    filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (log_min_p > -float("inf")))
    if tl.program_id(0) == 0:
        at = wishes_ptr + row * 4
        tl.store(at, tl.where(filtered, temperature, 0.0).to(tl.float64))
        tl.store(at + 1, top_k.to(tl.float64))
        tl.store(at + 2, top_p)
        tl.store(at + 3, tl.minimum(-log_min_p, DEPTH).to(tl.float64))
        tl.store(num_gathered_ptr + row, 0)
    if filtered:
        logit = _load(logits_ptr + row * row_stride, tl.program_id(0), columns, BLOCK)
        tl.store(best_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.max(logit, 0))


@triton.jit
def _count_kernel(
    logits_ptr,
    wishes_ptr,
    best_ptr,
    sums_ptr,
    columns,
    row_stride,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many tokens of a block, and how much mass, are at or above each edge of a row."""
    row = tl.program_id(1).to(tl.int64)
    rows, blocks = tl.num_programs(1), tl.num_programs(0)
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1)):
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        if tl.abs(best) < float("inf"):
            low, high, _, _, _ = _enclose(
                row, rows, blocks, best, temperature, top_k, top_p, depth, sums_ptr, LEVEL, BLOCKS, EDGES
            )
            edge = tl.arange(0, EDGES)
            values = _edges(edge, best, temperature, depth, low, high, LEVEL, EDGES)
            logit = _load(logits_ptr + row * row_stride, tl.program_id(0), columns, BLOCK)
            mass = tl.where(logit >= low, _mass(logit, best, temperature), 0)
            count_at = tl.full([EDGES], 0, tl.int64)
            mass_at = tl.full([EDGES], 0, tl.int64)
            for number in range(EDGES):
                reaches = logit >= tl.max(tl.where(edge == number, values, -float("inf")), 0)
                count = tl.sum(reaches.to(tl.int32), 0).to(tl.int64)
                count_at = tl.where(edge == number, count, count_at)
                mass_at = tl.where(edge == number, tl.sum(tl.where(reaches, mass, 0), 0), mass_at)
            at = sums_ptr + ((LEVEL * rows + row) * 2 * blocks + tl.program_id(0)) * EDGES + edge
            tl.store(at, count_at)
            tl.store(at + blocks * EDGES, mass_at)


@triton.jit
def _gather_kernel(
    logits_ptr,
    wishes_ptr,
    best_ptr,
    sums_ptr,
    gathered_ptr,
    num_gathered_ptr,
    columns,
    row_stride,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gather the logits of a row among which its threshold is."""
    row = tl.program_id(1).to(tl.int64)
    rows, blocks = tl.num_programs(1), tl.num_programs(0)
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1)):
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        if tl.abs(best) < float("inf"):
            low, high, _, _, _ = _enclose(
                row, rows, blocks, best, temperature, top_k, top_p, depth, sums_ptr, 2, BLOCKS, EDGES
            )
            logit = _load(logits_ptr + row * row_stride, tl.program_id(0), columns, BLOCK)
            wanted = (logit >= low) & (logit < high)
            number = tl.sum(wanted.to(tl.int32), 0)
            if number > 0:
                place = tl.atomic_add(num_gathered_ptr + row, number) + tl.cumsum(wanted.to(tl.int32), 0) - 1
                tl.store(gathered_ptr + row * columns + place, logit, mask=wanted)


@triton.jit
def _bisect_kernel(
    wishes_ptr,
    best_ptr,
    sums_ptr,
    gathered_ptr,
    num_gathered_ptr,
    thresholds_ptr,
    columns,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find each row's threshold among what was gathered."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    threshold = tl.full([], -float("inf"), tl.float32)
    if temperature > 0:
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        threshold = best - depth * temperature  # and nothing to search where the best is not finite
        if ((top_k > 0) | (top_p < 1)) & (tl.abs(best) < float("inf")):
            low, high, count, mass, total = _enclose(
                row, rows, blocks, best, temperature, top_k, top_p, depth, sums_ptr, 2, BLOCKS, EDGES
            )
            number = tl.load(num_gathered_ptr + row)
            some_ptr = gathered_ptr + row * columns
            needed = top_p * total.to(tl.float64)
            if top_k > 0:
                needed = top_k.to(tl.float64)
            high = tl.minimum(high, best)
            threshold = _bisect(
                some_ptr, number, low, high, top_k > 0, needed, count, mass, best, temperature, BLOCK
            )
            if (top_k > 0) & (top_p < 1):
                kept = _reached(some_ptr, number, threshold, False, count, mass, best, temperature, BLOCK)
                threshold = _bisect(
                    some_ptr,
                    number,
                    threshold,
                    best,
                    False,
                    top_p * kept,
                    count,
                    mass,
                    best,
                    temperature,
                    BLOCK,
                )
    tl.store(thresholds_ptr + row, threshold)


@triton.jit
def _wish(wishes_ptr, row):
    """A row's temperature (0: no filter), top_k, top_p, and how far below the best anything stays."""
    at = wishes_ptr + row * 4
    temperature, depth = tl.load(at).to(tl.float32), tl.load(at + 3).to(tl.float32)
    return temperature, tl.load(at + 1).to(tl.int32), tl.load(at + 2), depth


@triton.jit
def _load(row_ptr, block, columns, BLOCK: tl.constexpr):
    column = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row_ptr + column, mask=column < columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _row_best(best_ptr, row, blocks, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    return tl.max(tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=-float("inf")), 0)


@triton.jit
def _mass(logit, best, temperature):
    """What a token counts for: 2^40 times its probability beside the likeliest's. int64."""
    return (tl.exp2((logit - best) * (1.4426950408889634 / temperature)) * 1099511627776.0).to(tl.int64)


@triton.jit
def _edges(edge, best, temperature, depth, low, high, LEVEL: tl.constexpr, EDGES: tl.constexpr):
    """The edges of a round of counting, from high to low; the last is `low`."""
    part = (edge + 1).to(tl.float32) / EDGES
    if LEVEL == 0:  # denser where the probability is
        values = best - temperature * depth * part * part
    else:
        top = tl.minimum(high, best)
        values = top - (top - low) * part
    return tl.where(edge == EDGES - 1, low, values)


@triton.jit
def _enclose(
    row,
    rows,
    blocks,
    best,
    temperature,
    top_k,
    top_p,
    depth,
    sums_ptr,
    LEVELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
):
    """What LEVELS rounds of counting say: the threshold is at least `low` and below `high`.

    Where both filter these enclose top_k's, and `high` is infinite in the end: top_p's may be anywhere above.

    Returns: low, high, count and mass of the tokens at or above `high`, and the mass of all.
    """
    edge = tl.arange(0, EDGES)
    block = tl.arange(0, BLOCKS)
    low = best - depth * temperature
    high = tl.full([], float("inf"), tl.float32)
    count_above = tl.full([], 0, tl.int64)
    mass_above = tl.full([], 0, tl.int64)
    total = tl.full([], 0, tl.int64)
    for level in tl.static_range(LEVELS):
        at = ((level * rows + row) * 2 * blocks + block[:, None]) * EDGES + edge[None, :]
        inside = block[:, None] < blocks
        count = tl.sum(tl.load(sums_ptr + at, mask=inside, other=0), 0)
        mass = tl.sum(tl.load(sums_ptr + at + blocks * EDGES, mask=inside, other=0), 0)
        if level == 0:
            total = tl.max(mass, 0)
        # Counts and masses rise from edge to edge: those that suffice are the last ones.
        enough = count >= top_k
        if top_k <= 0:
            enough = mass.to(tl.float64) >= top_p * total.to(tl.float64)
        short = EDGES - tl.sum(enough.to(tl.int32), 0)
        values = _edges(edge, best, temperature, depth, low, high, level, EDGES)
        last_short = edge == short - 1
        if short > 0:
            count_above = tl.sum(tl.where(last_short, count, 0), 0)
            mass_above = tl.sum(tl.where(last_short, mass, 0), 0)
            high = tl.max(tl.where(last_short, values, -float("inf")), 0)
        if short < EDGES:
            low = tl.max(tl.where(edge == short, values, -float("inf")), 0)
    if (LEVELS == 2) & (top_k > 0) & (top_p < 1):
        high = tl.full([], float("inf"), tl.float32)
        count_above = tl.full([], 0, tl.int64)
        mass_above = tl.full([], 0, tl.int64)
    return low, high, count_above, mass_above, total


@triton.jit
def _bisect(
    some_ptr,
    number,
    low,
    high,
    by_count,
    needed,
    count_above,
    mass_above,
    best,
    temperature,
    BLOCK: tl.constexpr,
):
    """The largest value in [low, high] at or above which there is what is needed; `low` if there is none."""
    least = _key(low).to(tl.int64)
    beyond = _key(high).to(tl.int64) + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        value = _value(middle.to(tl.int32))
        reached = _reached(
            some_ptr, number, value, by_count, count_above, mass_above, best, temperature, BLOCK
        )
        if reached >= needed:
            least = middle
        else:
            beyond = middle
    return _value(least.to(tl.int32))


@triton.jit
def _reached(
    some_ptr, number, value, by_count, count_above, mass_above, best, temperature, BLOCK: tl.constexpr
):
    """Count or mass of the tokens at or above `value`, as float64."""
    count = count_above
    mass = mass_above
    for start in range(0, number, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(some_ptr + place, mask=place < number, other=-float("inf"))
        reaches = logit >= value
        if by_count:
            count += tl.sum(reaches.to(tl.int32), 0)
        else:
            mass += tl.sum(tl.where(reaches, _mass(logit, best, temperature), 0), 0)
    return tl.where(by_count, count.to(tl.float64), mass.to(tl.float64))


@triton.jit
def _key(value):
    """int32 in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
