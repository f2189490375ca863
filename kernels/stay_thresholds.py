"""top_k, top_p and min_p on the device: the lowest logit of each row that stays in the race.

Tokens of equal logits share their fate, so that a row's filter is one threshold and needs no sort: min_p
keeps what is at least so likely beside the likeliest; of that top_k every token that is as likely as the
k-th; of those top_p the shortest run of the likeliest whose probability (within those) reaches it.

The threshold is found by counting: how many tokens, and how much probability, are at or above an edge? All
programs count at edges over the whole range (first launch of `_count_kernel`), then at edges between the two
that enclose the threshold (second launch); what is between two of those is gathered, a few hundred logits
mostly, and bisected by one program a row until the threshold is one of them. What programs add to one another
are integers, 2^40 for the likeliest token, so that the outcome depends neither on the order in which they
run nor on the other rows. Weights and the sums of a program are float32: where a sum is within a millionth
of top_p, the token there may stay or not, always the same way on the same device. Nothing waits for the host,
and rows without a filter cost an empty program.

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
_COUNT_BLOCK = 1024
"""For a single warp: sums over edges are shuffles then, and wait for no other warp."""
_FEW_ROWS = 8
"""More fill the GPU with programs of several blocks, too; fewer of them start for unfiltered rows in vain."""
_LAST_BLOCK = 4096
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
    count_block: int = _COUNT_BLOCK,
    last_block: int = _LAST_BLOCK,
) -> Tensor:
    """`stay_thresholds` in five launches."""
    rows, columns = logits.shape
    assert logits.stride(1) == 1
    device = logits.device
    blocks = triton.cdiv(columns, block)
    wishes = torch.empty(rows, 4, dtype=torch.float64, device=device)
    best = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    edges = torch.empty(2, rows, _EDGES, dtype=torch.float32, device=device)
    sums = torch.empty(2, rows, _EDGES, dtype=torch.int64, device=device)
    gathered = torch.empty(rows, columns, dtype=torch.float32, device=device)
    num_gathered = torch.empty(rows, dtype=torch.int32, device=device)
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    found = (wishes, best, edges, sums)
    sizes = (columns, logits.stride(0), blocks)
    options = pdl_options(logits)
    wide = {"BLOCKS": triton.next_power_of_2(blocks), "EDGES": _EDGES, **options}
    _begin_kernel[blocks, rows](
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
        sums,
        num_gathered,
        columns,
        logits.stride(0),
        HAS_SLOTS=slots is not None,
        DEPTH=_DEPTH,
        EDGES=_EDGES,
        BLOCK=block,
        **options,
    )
    chunks = 1 if rows <= _FEW_ROWS else 4
    for level in (0, 1):
        _count_kernel[triton.cdiv(columns, chunks * count_block), rows](
            logits, *found, *sizes, LEVEL=level, CHUNKS=chunks, BLOCK=count_block, num_warps=1, **wide
        )
    _gather_kernel[blocks, rows](
        logits, *found, gathered, num_gathered, *sizes, BLOCK=block, num_warps=8, **wide
    )
    _bisect_kernel[(rows,)](
        *found, gathered, num_gathered, thresholds, columns, blocks, BLOCK=last_block, num_warps=8, **wide
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
    sums_ptr,
    num_gathered_ptr,
    columns,
    row_stride,
    HAS_SLOTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EDGES: tl.constexpr,
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
        nothing = tl.full([EDGES], 0, tl.int64)
        tl.store(sums_ptr + row * EDGES + tl.arange(0, EDGES), nothing)
        tl.store(sums_ptr + (tl.num_programs(1) + row) * EDGES + tl.arange(0, EDGES), nothing)
    if filtered:
        logit = _load(logits_ptr + row * row_stride, tl.program_id(0), columns, BLOCK)
        tl.store(best_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.max(logit, 0))


@triton.jit
def _count_kernel(
    logits_ptr,
    wishes_ptr,
    best_ptr,
    edges_ptr,
    sums_ptr,
    columns,
    row_stride,
    blocks,
    LEVEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum up, for each edge of a row, the weights of the tokens at or above it."""
    row = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1)
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1)):
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        if tl.abs(best) < float("inf"):
            low, high, _, _ = _enclose(
                row, rows, best, temperature, top_k, top_p, depth, edges_ptr, sums_ptr, LEVEL, EDGES
            )
            top = tl.minimum(high, best)
            edge = tl.arange(0, EDGES)
            values = tl.full([EDGES], 0, tl.float32)
            sums = tl.full([EDGES], 0, tl.int64)
            for chunk in range(CHUNKS):
                logit = _load(
                    logits_ptr + row * row_stride, tl.program_id(0) * CHUNKS + chunk, columns, BLOCK
                )
                weight = _weight(logit, best, temperature, top_k)
                chunk_sums = tl.full([EDGES], 0, tl.float32)
                for number in tl.static_range(EDGES):
                    part = (number + 1) / EDGES
                    if LEVEL == 0:  # denser where the probability is
                        part = part * part
                    value = tl.fma(low - top, part, top)
                    value = tl.where(number == EDGES - 1, low, value)
                    values = tl.where(edge == number, value, values)
                    reached = tl.sum(tl.where(logit >= value, weight, 0.0), 0)
                    chunk_sums += tl.where(edge == number, reached, 0.0)
                sums += _whole(chunk_sums)  # here, so that CHUNKS changes no sum
            at = (LEVEL * rows + row) * EDGES + edge
            if tl.program_id(0) == 0:
                tl.store(edges_ptr + at, values)
            tl.atomic_add(sums_ptr + at, sums)


@triton.jit
def _gather_kernel(
    logits_ptr,
    wishes_ptr,
    best_ptr,
    edges_ptr,
    sums_ptr,
    gathered_ptr,
    num_gathered_ptr,
    columns,
    row_stride,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EDGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gather the logits of a row among which its threshold is."""
    row = tl.program_id(1).to(tl.int64)
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    if (temperature > 0) & ((top_k > 0) | (top_p < 1)):
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        if tl.abs(best) < float("inf"):
            low, high, _, _ = _enclose(
                row, tl.num_programs(1), best, temperature, top_k, top_p, depth, edges_ptr, sums_ptr, 2, EDGES
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
    edges_ptr,
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
    allow_next(PDL)
    wait_previous(PDL)
    temperature, top_k, top_p, depth = _wish(wishes_ptr, row)
    threshold = tl.full([], -float("inf"), tl.float32)
    if temperature > 0:
        best = _row_best(best_ptr, row, blocks, BLOCKS)
        threshold = best - depth * temperature  # and nothing to search where the best is not finite
        if ((top_k > 0) | (top_p < 1)) & (tl.abs(best) < float("inf")):
            low, high, above, needed = _enclose(
                row, tl.num_programs(0), best, temperature, top_k, top_p, depth, edges_ptr, sums_ptr, 2, EDGES
            )
            number = tl.load(num_gathered_ptr + row)
            some_ptr = gathered_ptr + row * columns
            high = tl.minimum(high, best)
            threshold = _bisect(some_ptr, number, low, high, needed, above, best, temperature, top_k, BLOCK)
            if (top_k > 0) & (top_p < 1):
                kept = _reached(some_ptr, 0, number, threshold, best, temperature, 0, BLOCK)
                needed = top_p * kept.to(tl.float64)
                threshold = _bisect(
                    some_ptr, number, threshold, best, needed, above, best, temperature, 0, BLOCK
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
def _weight(logit, best, temperature, top_k):
    """What a token counts for: 1 for top_k, else its probability beside the likeliest's."""
    probability = tl.exp2((logit - best) * (1.4426950408889634 / temperature))
    return tl.where(top_k > 0, 1.0, probability)


@triton.jit
def _whole(weight):
    """Weights as int64."""
    return (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def _enclose(
    row,
    rows,
    best,
    temperature,
    top_k,
    top_p,
    depth,
    edges_ptr,
    sums_ptr,
    LEVELS: tl.constexpr,
    EDGES: tl.constexpr,
):
    """What LEVELS rounds of counting say: the threshold is at least `low` and below `high`.

    Where both filter these enclose top_k's, and `high` is infinite in the end: top_p's may be anywhere above.

    Returns: low, high, the weight of the tokens at or above `high`, and what the threshold must reach.
    """
    edge = tl.arange(0, EDGES)
    low = best - depth * temperature
    high = tl.full([], float("inf"), tl.float32)
    above = tl.full([], 0, tl.int64)
    needed = top_k.to(tl.float64) * 1099511627776.0
    for level in tl.static_range(LEVELS):
        at = (level * rows + row) * EDGES + edge
        sums, values = tl.load(sums_ptr + at), tl.load(edges_ptr + at)
        if level == 0:
            total = tl.max(sums, 0).to(tl.float64)
            needed = tl.where(top_k > 0, needed, top_p * total)
        # Sums rise from edge to edge: those that suffice are the last ones.
        short = EDGES - tl.sum((sums.to(tl.float64) >= needed).to(tl.int32), 0)
        last_short = edge == short - 1
        if short > 0:
            above = tl.sum(tl.where(last_short, sums, 0), 0)
            high = tl.max(tl.where(last_short, values, -float("inf")), 0)
        if short < EDGES:
            low = tl.max(tl.where(edge == short, values, -float("inf")), 0)
    if (LEVELS == 2) & (top_k > 0) & (top_p < 1):
        high = tl.full([], float("inf"), tl.float32)
        above = tl.full([], 0, tl.int64)
    return low, high, above, needed


@triton.jit
def _bisect(some_ptr, number, low, high, needed, above, best, temperature, top_k, BLOCK: tl.constexpr):
    """The largest value in [low, high] at or above which there is what is needed; `low` if there is none."""
    place = tl.arange(0, BLOCK)
    first = tl.load(some_ptr + place, mask=place < number, other=-float("inf"))
    first_weight = _whole(_weight(first, best, temperature, top_k))
    least = _key(low).to(tl.int64)
    beyond = _key(high).to(tl.int64) + 1
    while beyond - least > 1:
        middle = (least + beyond) // 2
        value = _value(middle.to(tl.int32))
        reached = above + tl.sum(tl.where(first >= value, first_weight, 0), 0)
        if number > BLOCK:
            reached += _reached(some_ptr, BLOCK, number, value, best, temperature, top_k, BLOCK)
        if reached.to(tl.float64) >= needed:
            least = middle
        else:
            beyond = middle
    return _value(least.to(tl.int32))


@triton.jit
def _reached(some_ptr, begin, number, value, best, temperature, top_k, BLOCK: tl.constexpr):
    """Weight of the gathered tokens from the `begin`-th on that are at or above `value`."""
    reached = tl.full([], 0, tl.int64)
    for start in range(begin, number, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(some_ptr + place, mask=place < number, other=-float("inf"))
        weight = _whole(_weight(logit, best, temperature, top_k))
        reached += tl.sum(tl.where(logit >= value, weight, 0), 0)
    return reached


@triton.jit
def _key(value):
    """int32 in the order of the floats."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
