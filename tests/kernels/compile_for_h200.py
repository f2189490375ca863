"""A process that compiles kernels for an H200 and has none: prints why any could not be compiled, and how
many forms bookkeeping takes, as JSON.

The interpreter runs a kernel that the compiler would refuse, and does not run Gluon's at all.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchlib.decode_chain import DecodeChain, Shape, Weights
from headrace.kernels import fixed_order_attention, fixed_order_linear
from headrace.kernels.all_reduce import all_reduce_triton, one_shot_layout, two_shot_layout
from headrace.kernels.copy_segments import copy_segments
from headrace.kernels.decode_plan import DecodePlan, plan_decode
from headrace.kernels.forbid_tokens import forbid_tokens
from headrace.kernels.fused_linear import late_gate_up_silu, linear_add_squares
from headrace.kernels.kv_write import finish_heads
from headrace.kernels.layer_norm import layer_norm
from headrace.kernels.mailbox import make_mailbox
from headrace.kernels.medium_batch_linear import medium_batch_linear, parts_of, tiling
from headrace.kernels.paged_prefill import paged_prefill
from headrace.kernels.prompt_attention import prompt_attention, prompt_cache
from headrace.kernels.rms_norm import rms_norm, row_squares
from headrace.kernels.sampling import gumbel_argmax
from headrace.kernels.slot_table import append_tokens, decode_inputs, packed_inputs
from headrace.kernels.stay_thresholds import stay_thresholds

CPU = torch.device("cpu")


class H200:
    """What Triton asks of a GPU's driver, but to launch anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend() -> Counter[str]:
    """Tensors say that they are on a GPU, and kernels that are launched are only compiled: how many forms of
    each, by its name.
    """
    driver.set_active(H200())
    functions: Any = triton.runtime.jit.JITFunction
    run = functions.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(function, *args, grid=grid, warmup=True, **options)

    forms: Counter[str] = Counter()

    def compiled(*, fn: Any, **_: Any) -> None:
        forms[fn.name.rpartition(".")[2]] += 1

    functions.run = compile_only
    triton.knobs.runtime.jit_post_compile_hook = compiled
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda _: (9, 0)
    cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=132)
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    return forms


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def decode(rows: int, is_opt: bool = False, head_dim: int = 64) -> Callable[[], None]:
    """A decode step of so many rows."""
    shape = Shape("small", 2, 512, 1024, 8, 2, head_dim, 1000, is_opt, is_opt, head_dim == 128)
    return DecodeChain(Weights(shape, CPU), [100] * rows).step


def late(rows: int) -> Callable[[], None]:
    """What follows attention where norms are late."""

    def run() -> None:
        x = numbers(rows, 512)
        squares = linear_add_squares(x, numbers(512, 512), None, x.clone())
        late_gate_up_silu(x, numbers(2048, 512), 1e-5, squares)

    return run


def product(tokens: int, rows: int, columns: int) -> Callable[[], None]:
    """With warp groups' instructions: plain; normed and gated; with bias, residual and squares."""

    def run() -> None:
        x, w = numbers(tokens, columns), numbers(rows, columns)
        plain, gated = tiling(tokens, rows, columns), tiling(tokens, rows // 2, columns, gated=True)
        assert plain is not None
        medium_batch_linear(x, w, tiling=plain)
        if gated is not None:
            medium_batch_linear(x, w, tiling=gated, squares=torch.ones(2, tokens), eps=1e-5, gated=True)
        room = torch.zeros(parts_of(plain, rows), tokens)
        residual = numbers(tokens, rows)
        medium_batch_linear(x, w, tiling=plain, bias=w[:, 0], residual=residual, leave_squares=room)

    return run


def prompts(head_dim: int) -> Callable[[], None]:
    def run() -> None:
        qkv, out = numbers(300, 12, head_dim), numbers(300, 8 * head_dim)
        caches = numbers(100, 16, 2, head_dim), numbers(100, 16, 2, head_dim)
        finish_heads(qkv, *caches, torch.zeros(300, dtype=torch.int64))
        where: dict[str, Any] = {
            "block_tables": integers(4, 8),
            "table_rows": integers(4),
            "query_start": integers(5),
            "seq_lens": integers(4),
            "tiles": integers(6, 2),
            "scale": 0.1,
            "out": out,
        }
        paged_prefill(qkv[:, :8], *caches, **where)
        cache = prompt_cache(*caches)
        assert cache is not None
        prompt_attention(qkv, cache, **where)

    return run


def fixed_order() -> None:
    """For `batch_invariant`: products of 1, 5 and 40 rows; attention of decoding rows and of prompts."""
    room = fixed_order_linear.Workspace.empty(CPU)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 5, 40):
            x, w = numbers(rows, 1024).to(dtype), numbers(2048, 1024).to(dtype)
            fixed_order_linear.fixed_order_linear(x, w, workspace=room, activation="relu")
    workspace = fixed_order_attention.Workspace.empty(8, 2, 64, 4, 1024, CPU)
    for tile_tokens, count in ((1, 4), (1, 400), (fixed_order_attention.tile_tokens(8, 2), 4)):
        fixed_order_attention.fixed_order_attention(
            numbers(400, 8, 64),
            numbers(100, 16, 2, 64),
            numbers(100, 16, 2, 64),
            block_tables=integers(400, 64),
            table_rows=integers(400),
            query_start=integers(401),
            seq_lens=integers(400),
            tiles=integers(count, 2),
            tile_tokens=tile_tokens,
            scale=0.1,
            workspace=workspace,
        )


def sums() -> None:
    """Of two ranks, in one shot and in two."""
    partial = numbers(64, 512)
    for layout in (
        one_shot_layout(2, 1 << 20, torch.bfloat16),
        two_shot_layout(2, 1 << 20, torch.bfloat16),
    ):
        box = make_mailbox(layout, 0, [4096, 8192], CPU)
        all_reduce_triton(partial, box, partial.clone(), True, torch.zeros(2, 64))


def others() -> None:
    x = numbers(300, 512)
    rms_norm(x, x[0], 1e-5, x.clone(), x.clone())
    row_squares(x)
    layer_norm(x, x[0], x[1], 1e-5, x.clone())
    one, off = torch.ones(300), torch.zeros(300)
    stay_thresholds(x, one, off.int(), one.double(), off.log())
    gumbel_argmax(x.float(), off.long(), off.long())
    forbid_tokens(x, integers(300, 16), integers(300))
    copy_segments(integers(100), integers(100), 4, 10)
    slots, table = integers(4), integers(5, 8)
    packed_inputs(slots, integers(5), slots, integers(5), table, table, 16, 64, 40)


def bookkeeping(rows: int) -> None:
    """What surrounds the layers of a decode step of so many rows, and of one with three prompts more."""
    table, slots = integers(300, 8), integers(rows)
    inputs = decode_inputs(slots, table[:, 0], table, table, 16)
    plan_decode(DecodePlan.empty(300, 8, 2, 64, CPU), inputs.seq_lens, slots)
    append_tokens(torch.zeros(rows, dtype=torch.int64), slots, slots, table[:, 0], table, table, slots[:1])
    slots = integers(rows + 3)
    inputs = packed_inputs(slots, integers(rows + 4), slots, table[:, 0], table, table, 16, rows + 100, 40)
    caches = numbers(100, 16, 2, 64), numbers(100, 16, 2, 64)
    finish_heads(
        numbers(100, 12, 64),
        *caches,
        inputs.slot_mapping[rows:],
        rotation=torch.zeros(50, 3, 32),
        positions=inputs.positions[rows:],
    )


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    "decode 1": lambda: decode(1),
    "decode 1, OPT": lambda: decode(1, is_opt=True),
    "decode 8": lambda: decode(8, head_dim=128),
    "decode 200": lambda: decode(200),
    "late norms": lambda: late(64),
    "late norms of more rows": lambda: late(200),
    "product": lambda: product(32, 6144, 1024),
    "product that programs share": lambda: product(64, 1024, 4096),
    "prompts": lambda: prompts(64),
    "prompts, wide heads": lambda: prompts(128),
    "fixed order": lambda: fixed_order,
    "sums": lambda: sums,
    "others": lambda: others,
}


def main() -> None:
    forms, failed = pretend(), {}
    for name, make in CASES.items():
        try:
            make()()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    compiled = sorted(forms)
    forms.clear()
    for rows in (130, 131, 144, 160):
        bookkeeping(rows)
    print(json.dumps({"compiled": compiled, "failed": failed, "forms": forms}))


if __name__ == "__main__":
    main()
