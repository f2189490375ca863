"""One decode step of attention in one launch: norm and rotate, store the new token, attend over pages.

    q, k, v = heads of qkv;  q, k = rotate(norm(q)), rotate(norm(k));  cache[seq_len - 1] = k, v
    out     = softmax(scale * q K^T) V,  K and V being the row's first seq_len tokens in the cache

Rows have contexts of any length; `decode_plan.plan_decode` has cut them into pieces. One program per piece
and key-value head. The heads that share keys and values are the rows of one matrix product. The new token
never goes through the cache: its score starts the softmax of the last piece. The program that finishes a row
last puts the row's pieces together.
"""

# mypy: disable-error-code="assignment"
# (Triton's tuples grow under one name.)

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode_plan import DecodePlan, is_small, leaves_whole
from .jit import INTERPRETED, tl, triton
from .pdl import allow_next, pdl_options, wait_previous
from .rms_norm import late_scale, row_scales


class DecodeTuning(NamedTuple):
    """How a program walks over its tokens."""

    tile: int
    """Tokens per step."""
    num_warps: int
    num_stages: int
    """Of the compiled loop. Keys follow the block table's entries, so half of the stages are theirs: 3 stages
    have one tile of keys and values under way, 5 have two, 7 three."""


def _tuning(rows: int, kv_heads: int, head_dim: int, element_size: int) -> DecodeTuning:
    """Best on average of a sweep over five models on an H200.

    One row has latency to hide, by a large tile that is loaded before anything else. Many rows have loads to
    keep under way, by many programs of a single warp, which needs no barriers: 4.0 TB/s; 3.7 with two.
    """
    if element_size == 4:  # what fits into registers and shared memory
        return DecodeTuning(32, 4, 3)
    if rows == 1:
        return DecodeTuning(128, 4, 3)
    is_whole = leaves_whole(rows, kv_heads) and head_dim <= 128
    if is_small(rows, kv_heads):
        return DecodeTuning(64, 2, 5) if head_dim <= 64 or is_whole else DecodeTuning(64, 4, 3)
    few_programs = rows * kv_heads <= 768
    if is_whole and head_dim > 64:  # the programs that are left at the end should be fast
        return DecodeTuning(64, 2, 5) if few_programs else DecodeTuning(32, 1, 5)
    # Two large tiles under way leave room for 6 programs on a multiprocessor, 792 in all.
    return DecodeTuning(32, 1, 5 if head_dim <= 64 or few_programs else 3)


def _at_once(rows: int, kv_heads: int, num_warps: int, sharing: int, width: int) -> int:
    """Pieces combined at once: 64 registers of a thread for one row. With more rows, registers mean programs:
    16 pieces take 236 registers where 4 take 128."""
    if rows > 1:
        return 4 if is_small(rows, kv_heads) else 2
    return int(min(max(2048 * num_warps // (triton.next_power_of_2(sharing) * width), 2), 16))


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    rotation: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    late: Tensor | None = None,
    squares: Tensor | None = None,
    bias: Tensor | None = None,
    reads_ahead: bool = False,
    tuning: DecodeTuning | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per row; its key and value are stored in the cache.

    Args:
        qkv: [rows, (heads + 2 * kv_heads) * head_dim], the projections.
        k_cache, v_cache: [blocks, block_size, kv_heads, head_dim]
        block_tables: int32 [., max_blocks]
        plan: as `plan_decode` left it for this step.
        rotation: [positions, 3, head_dim / 2], rows [cos, -sin, sin]; None: no rotary embedding.
        q_norm, k_norm: [head_dim], weights of an RMS norm of each head; None: no norm.
        late: [rows, in_features], the input of the projections, whose RMS norm (with `eps`) is still to be
            applied (its weight is in the projections).
        squares: float32 [parts, rows], in all the sums of the squares of `late`'s rows, if known.
        bias: [(heads + 2 * kv_heads) * head_dim], to be added to the projections after `late`'s norm; not
            without `late`.
        reads_ahead: read plan and cache before the kernel in front has ended. Sound if this step's plan was
            complete when the layer before attended: in every layer but the first.
        out: where to put the result.

    Returns: [rows, heads * head_dim].
    """
    rows = len(qkv)
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    width = triton.next_power_of_2(head_dim)
    chosen = tuning or _tuning(rows, kv_heads, head_dim, qkv.element_size())
    if out is None:
        out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    _decode_attention_kernel[kv_heads, plan.max_pieces(rows)](
        qkv,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        qkv if rotation is None else rotation,
        qkv if late is None else late,
        qkv if squares is None else squares,
        qkv if bias is None else bias,
        k_cache,
        v_cache,
        block_tables,
        plan.work,
        plan.partial,
        plan.stats,
        plan.arrivals,
        out,
        rows,
        block_tables.stride(0),
        scale * 1.4426950408889634,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        ROTATE=rotation is not None,
        NORM=q_norm is not None,
        LATE=0 if late is None else late.shape[1],
        PARTS=0 if squares is None else len(squares),
        HAS_BIAS=bias is not None,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads + 1)),
        WIDTH=width,
        TILE=chosen.tile,
        AT_ONCE=_at_once(rows, kv_heads, chosen.num_warps, heads // kv_heads, width),
        COLUMNS=plan.work.shape[1],
        STAGES=chosen.num_stages,
        FIRST_TILE=is_small(rows, kv_heads),
        READS_AHEAD=reads_ahead,
        num_warps=chosen.num_warps,
        **pdl_options(qkv),
    )
    return out


@triton.jit
def _load_heads(heads_ptr, inside, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr):
    """Heads at a pointer or [n, 1] of them, where `inside` [n, WIDTH]; what a rotation pairs with them."""
    column = tl.broadcast_to(tl.arange(0, WIDTH)[None, :], inside.shape)
    x = tl.load(heads_ptr + column, mask=inside, other=0.0)
    partner = x
    if ROTATE:
        HALF: tl.constexpr = HEAD_DIM // 2
        partner = tl.load(
            heads_ptr + tl.where(column < HALF, column + HALF, column - HALF), mask=inside, other=0.0
        )
    return x, partner


@triton.jit
def _load_norms(q_norm_ptr, k_norm_ptr, is_query, is_key, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Weights of the heads' norms, as `_load_heads` loads heads."""
    q, q_partner = _load_heads(q_norm_ptr, is_query, HEAD_DIM, WIDTH, True)
    k, k_partner = _load_heads(k_norm_ptr, is_key, HEAD_DIM, WIDTH, True)
    return q + k, q_partner + k_partner


@triton.jit
def _finished(x, scale, bias):
    """Projections of what was not normed yet, rounded as if it had been."""
    return (x.to(tl.float32) * scale + bias).to(x.dtype)


@triton.jit
def _prepared(
    x,
    partner,
    weight,
    partner_weight,
    cos,
    sin,
    eps,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Heads normed and rotated, in float32; rounded in between as separate kernels would."""
    dtype = x.dtype
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = (x * factor * weight.to(tl.float32)).to(dtype).to(tl.float32)
        partner = (partner * factor * partner_weight.to(tl.float32)).to(dtype).to(tl.float32)
    if ROTATE:
        x = x * cos.to(tl.float32) + partner * sin.to(tl.float32)
    return x


@triton.jit
def _token_offsets(table_ptr, token, inside, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Where tokens stand in the cache."""
    block = tl.load(table_ptr + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    return (block * BLOCK_SIZE + token % BLOCK_SIZE) * STRIDE


@triton.jit
def _dot(a, b):
    """The interpreter multiplies bfloat16 wrongly. float32 keeps its precision: three products of halves."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _attend(q, k, v, inside, scale, largest, total, values):
    """The running softmax (largest score, sum, weighted values) after one more tile."""
    scores = tl.where(inside[None, :], _dot(q, tl.trans(k)) * scale, -1e30)
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    kept = tl.exp2(largest - larger)
    return larger, total * kept + tl.sum(weights, 1), values * kept[:, None] + _dot(weights.to(v.dtype), v)


@triton.jit
def _combine(
    partial_ptr,
    stats_ptr,
    out_ptr,
    first,
    pieces,
    head,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Put a row's pieces together, by loads that bypass the multiprocessor's own cache.

    Pieces are added one after the other, AT_ONCE of them under way. As a reduction over a third dimension,
    which crosses warps, this took 10 us for 16 pieces of 6 heads of 128.
    """
    member = tl.arange(0, GROUP)
    column = tl.arange(0, WIDTH)
    in_group = member < SHARING
    inside = in_group[:, None] & (column < HEAD_DIM)[None, :]
    largest = tl.full([GROUP], -1e30, tl.float32)
    for at in range(0, pieces, 64):
        number = at + tl.arange(0, 64)
        place = stats_ptr + ((first + number)[:, None] * HEADS + (head + member)[None, :]) * 2
        exists = (number < pieces)[:, None] & in_group[None, :]
        scores = tl.load(place, mask=exists, other=-1e30, cache_modifier=".cg")
        largest = tl.maximum(largest, tl.max(scores, 0))
    total = tl.zeros([GROUP], tl.float32)
    values = tl.zeros([GROUP, WIDTH], tl.float32)
    for at in range(0, pieces, AT_ONCE):
        loaded = ()
        for i in tl.static_range(AT_ONCE):
            number = member * 0 + at + i
            exists = in_group & (number < pieces)
            place = (first + number) * HEADS + head + member
            loaded = loaded + (
                tl.load(stats_ptr + place * 2, mask=exists, other=-1e30, cache_modifier=".cg"),
                tl.load(stats_ptr + place * 2 + 1, mask=exists, other=1.0, cache_modifier=".cg"),
                tl.load(
                    partial_ptr + place[:, None] * HEAD_DIM + column[None, :],
                    mask=inside & exists[:, None],
                    other=0.0,
                    cache_modifier=".cg",
                ),
            )
        for i in tl.static_range(AT_ONCE):
            weight = tl.exp2(loaded[3 * i] - largest)
            total += weight * loaded[3 * i + 1]
            values += weight[:, None] * loaded[3 * i + 2]
    place = out_ptr + (head + member)[:, None] * HEAD_DIM + column[None, :]
    tl.store(place, (values / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _decode_attention_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    rotation_ptr,
    late_ptr,
    squares_ptr,
    bias_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_tables_ptr,
    work_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    out_ptr,
    rows,
    table_stride,
    scale,  # times log2(e): all exponentials are to base 2
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,  # columns of `late`
    PARTS: tl.constexpr,  # of `squares`; 0: there are none
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share keys and values and the new key, padded to 16 rows or more
    WIDTH: tl.constexpr,  # head_dim, padded to a power of two
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # load it above the wait
    READS_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    SHARING: tl.constexpr = HEADS // KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    if not READS_AHEAD:
        wait_previous(PDL)
        allow_next(PDL)
    # One sector: all of it is loaded at once, before the question whether there is such a piece.
    entry = work_ptr + piece * COLUMNS
    row = tl.load(entry)
    table_row = tl.load(entry + 1)
    start = tl.load(entry + 2)
    end = tl.load(entry + 3)
    seq_len = tl.load(entry + 4)
    first = tl.load(entry + 5)
    pieces = tl.load(entry + 6)
    if row < 0:
        return
    table_ptr = block_tables_ptr + table_row.to(tl.int64) * table_stride
    new = seq_len - 1
    is_last = end == seq_len
    old_end = tl.minimum(end, new)

    # The new key is one more row below the queries: norm and rotation are theirs, and a product of all rows
    # with themselves has its scores. In the shape of the queries all of it lies in the threads as they do.
    member = tl.arange(0, GROUP)
    column = tl.arange(0, WIDTH)
    in_head = (column < HEAD_DIM)[None, :]
    is_query = (member < SHARING)[:, None] & in_head
    is_key = (member == SHARING)[:, None] & in_head
    in_tile = is_query | is_key
    cos, sin = 1.0, 0.0
    if ROTATE:
        angle = rotation_ptr + new.to(tl.int64) * (3 * HALF) + tl.broadcast_to(column[None, :], GROUP, WIDTH)
        cos = tl.load(angle - tl.where(column < HALF, 0, HALF)[None, :], mask=in_tile, other=0.0)
        sin = tl.load(angle + HALF, mask=in_tile, other=0.0)
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM + column[None, :]
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM + column[None, :]
    token = start + tl.arange(0, TILE)
    inside = token < old_end
    if FIRST_TILE:
        offset = _token_offsets(table_ptr, token, inside, BLOCK_SIZE, STRIDE)[:, None]
        k = tl.load(k_ptr + offset, mask=inside[:, None] & in_head, other=0.0)
        v = tl.load(v_ptr + offset, mask=inside[:, None] & in_head, other=0.0)
    norm, partner_norm = 0.0, 0.0
    if NORM:
        norm, partner_norm = _load_norms(q_norm_ptr, k_norm_ptr, is_query, is_key, HEAD_DIM, WIDTH)
    head = tl.where(member < SHARING, kv_head * SHARING + member, HEADS + kv_head)[:, None] * HEAD_DIM
    v_head = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    bias, partner_bias, v_bias = 0.0, 0.0, 0.0
    if HAS_BIAS:
        bias, partner_bias = _load_heads(bias_ptr + head, in_tile, HEAD_DIM, WIDTH, ROTATE)
        v_bias = tl.load(bias_ptr + v_head + column[None, :], mask=in_head, other=0.0)
    new_block = tl.load(table_ptr + new // BLOCK_SIZE).to(tl.int64)
    new_offset = (new_block * BLOCK_SIZE + new % BLOCK_SIZE) * STRIDE
    if READS_AHEAD:
        wait_previous(PDL)
        allow_next(PDL)

    # All loads together: what follows the wait is what a step waits for.
    in_row = qkv_ptr + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * HEAD_DIM)
    dtype = k_cache_ptr.dtype.element_ty
    q, partner = _load_heads(in_row + head, in_tile, HEAD_DIM, WIDTH, ROTATE)
    new_v = tl.load(in_row + v_head + column[None, :], mask=in_head, other=0.0)
    if LATE:
        late = late_scale(late_ptr, squares_ptr, row, rows, eps, LATE, PARTS)
        q, partner = _finished(q, late, bias), _finished(partner, late, partner_bias)
        new_v = _finished(new_v, late, v_bias)
    q = _prepared(q, partner, norm, partner_norm, cos, sin, eps, HEAD_DIM, NORM, ROTATE).to(dtype)
    largest = tl.full([GROUP], -1e30, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    values = tl.zeros([GROUP, WIDTH], tl.float32)
    if is_last:
        new_v = new_v.to(dtype)
        tl.store(tl.broadcast_to(k_ptr + new_offset, GROUP, WIDTH), q, mask=is_key)
        tl.store(v_ptr + new_offset, new_v, mask=in_head)
        largest = tl.sum(_dot(q, tl.trans(tl.where(is_key, q, 0.0))), 1) * scale
        total = tl.full([GROUP], 1.0, tl.float32)
        values = tl.broadcast_to(new_v.to(tl.float32), GROUP, WIDTH)

    loop_start = start
    if FIRST_TILE:
        if start < old_end:
            largest, total, values = _attend(q, k, v, inside, scale, largest, total, values)
        loop_start = start + TILE
    for at in tl.range(loop_start, old_end, TILE, num_stages=STAGES):
        token = at + tl.arange(0, TILE)
        inside = token < old_end
        offset = _token_offsets(table_ptr, token, inside, BLOCK_SIZE, STRIDE)[:, None]
        k = tl.load(k_ptr + offset, mask=inside[:, None] & in_head, other=0.0)
        v = tl.load(v_ptr + offset, mask=inside[:, None] & in_head, other=0.0)
        largest, total, values = _attend(q, k, v, inside, scale, largest, total, values)

    first_head = kv_head * SHARING
    out_row = out_ptr + row.to(tl.int64) * (HEADS * HEAD_DIM)
    if pieces == 1:
        tl.store(
            out_row + (first_head + member)[:, None] * HEAD_DIM + column[None, :],
            (values / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=is_query,
        )
    else:
        place = piece * HEADS + first_head + member
        tl.store(
            partial_ptr + place[:, None] * HEAD_DIM + column[None, :],
            values,
            mask=is_query,
        )
        tl.store(stats_ptr + place * 2, largest, mask=member < SHARING)
        tl.store(stats_ptr + place * 2 + 1, total, mask=member < SHARING)
        tl.debug_barrier()
        arrivals = arrivals_ptr + row * KV_HEADS + kv_head
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == pieces - 1:
            tl.store(arrivals, 0)
            _combine(
                partial_ptr,
                stats_ptr,
                out_row,
                first,
                pieces,
                first_head,
                HEADS,
                SHARING,
                triton.next_power_of_2(SHARING),
                HEAD_DIM,
                WIDTH,
                AT_ONCE,
            )


def decode_attention_reference(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    rotation: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    late: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in torch, row by row, in the precision of its arguments. Row i has block table i."""
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if late is not None:
        qkv = qkv * row_scales(late, eps) + (0 if bias is None else bias)
    out = torch.zeros(len(qkv), heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    for row, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            continue
        q, k, v = torch.split(qkv[row].view(-1, head_dim), [heads, kv_heads, kv_heads])
        if q_norm is not None and k_norm is not None:
            q = F.rms_norm(q, q_norm.shape, q_norm, eps)
            k = F.rms_norm(k, k_norm.shape, k_norm, eps)
        if rotation is not None:
            q, k = (_rotate(x, rotation[seq_len - 1]) for x in (q, k))
        blocks = block_tables[row, : -(-seq_len // block_size)].long()
        k_cache[blocks[-1], (seq_len - 1) % block_size] = k
        v_cache[blocks[-1], (seq_len - 1) % block_size] = v
        keys, values = (
            cache[blocks].flatten(0, 1)[:seq_len].repeat_interleave(heads // kv_heads, 1)
            for cache in (k_cache, v_cache)
        )
        weights = (torch.einsum("hd,thd->ht", q, keys) * scale).softmax(-1)
        out[row] = torch.einsum("ht,thd->hd", weights, values)
    return out.flatten(1)


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    halves = heads.view(len(heads), 2, -1)
    return torch.flatten(halves * rotation[0] + halves.flip(1) * rotation[1:], 1)
