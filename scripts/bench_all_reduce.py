"""Sums over GPUs: right, equal on all ranks, and how long they take, by message size.

    python scripts/bench_all_reduce.py --ranks 2 [--width 4096] [--dtype bfloat16]

Each sum is added to a residual, as in a layer of a model: through peer memory in one shot and in two, the
same leaving the sums of the rows' squares (`sq.`), and by NCCL with an addition. Times are microseconds of
one sum in a CUDA graph of many in a row, the slowest rank's; `host` is NCCL's without a graph. NVLink
multicast is off. First the kernels are compared with exact sums, and squares with those of the results, over
thousands of rounds of changing sizes, with ranks that come late at random. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from benchlib.gpus import require_gpus
from headrace.kernels.all_reduce import (
    all_reduce_reference,
    all_reduce_triton,
    one_shot_layout,
    square_parts,
    two_shot_layout,
)
from headrace.kernels.mailbox import Mailbox
from headrace.worker.parallel import TensorParallel, connect, share_mailboxes
from torch import Tensor

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768)
IN_A_ROW = 20
ROUNDS = 3000
MOST_ROWS = {"one shot": 256, "two shots": ROWS[-1], "NCCL": ROWS[-1]}


Row: TypeAlias = dict[str, float]
Way: TypeAlias = Callable[[Tensor, Tensor], None]


def message(seed: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def room_for_squares(mailbox: Mailbox, x: Tensor) -> Tensor:
    return x.new_empty(square_parts(mailbox.layout, x.shape[1]), len(x), dtype=torch.float32)


def check_squares(squares: Tensor, rows: Tensor) -> None:
    exact = rows.double().square().view(len(rows), len(squares), -1).sum(-1).t()
    torch.testing.assert_close(squares.double(), exact, rtol=1e-6, atol=0.0)


def check(tp: TensorParallel, mailboxes: dict[str, Mailbox], width: int, device: torch.device) -> int:
    """Sums of changing sizes back to back, against exact ones. Returns a number that the results decide."""
    sizes, late = random.Random(1), random.Random(tp.rank)
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    digest = 0
    for turn in range(ROUNDS):
        name = sizes.choice(list(mailboxes))
        mailbox = mailboxes[name]
        rows = sizes.choice([1, sizes.randrange(1, 17), sizes.randrange(1, MOST_ROWS[name])])
        seeds = range(turn * tp.size, (turn + 1) * tp.size)
        messages = [message(seed, (rows, width), mailbox.layout.dtype, device) for seed in seeds]
        if late.random() < 0.02:
            time.sleep(late.random() / 200)
        residual = torch.full_like(messages[0], 0.5)
        squares = room_for_squares(mailbox, residual)
        pending.append((residual, all_reduce_reference(messages, residual), squares))
        all_reduce_triton(messages[tp.rank].clone(), mailbox, residual, squares=squares if turn % 2 else None)
        if len(pending) == 50:
            for number, (got, expected, squares) in enumerate(pending):
                torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
                digest = 31 * digest % 2**40 + int(got.view(torch.uint8).long().sum())
                if number % 2:
                    check_squares(squares, got)
                    digest = 31 * digest % 2**40 + int(squares.view(torch.uint8).long().sum())
            pending.clear()
    return digest


def graph_us(run: Callable[[], object], wait_for_all: Callable[[], object]) -> float:
    """Microseconds of one of the sums that `run` launches in a row."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    graph.replay()
    times = []
    for _ in range(7):
        wait_for_all()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(5):
            graph.replay()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)) * 1e3 / 5 / IN_A_ROW)
    return statistics.median(times)


def host_us(run: Callable[[], object], wait_for_all: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        wait_for_all()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e6 / IN_A_ROW)
    return statistics.median(times)


def measure(tp: TensorParallel, mailboxes: dict[str, Mailbox], width: int, device: torch.device) -> list[Row]:
    dtype = mailboxes["one shot"].layout.dtype

    def wait_for_all() -> None:
        tp.group.allreduce([torch.ones(1, device=device)]).wait()
        torch.cuda.synchronize()

    def by_nccl(partial_sums: Tensor, residual: Tensor) -> None:
        tp.group.allreduce([partial_sums]).wait()
        residual += partial_sums

    ways: dict[str, Way] = {}
    for name, mailbox in mailboxes.items():
        ways |= {name: partial(by_mailbox, mailbox), f"{name}, sq.": partial(with_squares, mailbox)}
    ways["NCCL"] = by_nccl
    rows: list[Row] = []
    for count in ROWS:
        arguments = [torch.zeros(count, width, dtype=dtype, device=device) for _ in range(2)]
        row: Row = {"rows": count, "KiB": count * width * dtype.itemsize / 1024}
        for name, way in ways.items():
            run = partial(in_a_row, way, *arguments)
            most = MOST_ROWS[name.removesuffix(", sq.")]
            row[name] = graph_us(run, wait_for_all) if count <= most else math.nan
        row["NCCL, host"] = host_us(partial(in_a_row, by_nccl, *arguments), wait_for_all)
        rows.append(row)
    return rows


def by_mailbox(mailbox: Mailbox, partial_sums: Tensor, residual: Tensor) -> None:
    all_reduce_triton(partial_sums, mailbox, residual)


def with_squares(mailbox: Mailbox, partial_sums: Tensor, residual: Tensor) -> None:
    all_reduce_triton(partial_sums, mailbox, residual, squares=room_for_squares(mailbox, partial_sums))


def in_a_row(way: Way, partial_sums: Tensor, residual: Tensor) -> None:
    for _ in range(IN_A_ROW):
        way(partial_sums, residual)


@torch.inference_mode()
def one_rank(args: argparse.Namespace) -> None:
    device, dtype = torch.device("cuda", args.rank), getattr(torch, args.dtype)
    torch.cuda.set_device(device)
    tp = connect(args.rank, args.ranks, device, args.rendezvous)
    size, width = args.ranks, args.width
    each = width * dtype.itemsize
    layouts = {
        "one shot": one_shot_layout(size, MOST_ROWS["one shot"] * each, dtype),
        "two shots": two_shot_layout(size, MOST_ROWS["two shots"] * each, dtype),
    }
    mailboxes = dict(zip(layouts, share_mailboxes(tp, device, list(layouts.values())), strict=True))
    begun = time.perf_counter()
    told: dict[str, Any] = {"digest": check(tp, mailboxes, args.width, device)}
    told["seconds"] = time.perf_counter() - begun
    told["rows"] = measure(tp, mailboxes, args.width, device)
    Path(f"{args.rendezvous}-{args.rank}").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--width", type=int, default=4096, help="numbers in a row (4096)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        one_rank(args)
        return
    if args.width % 256:
        parser.error("--width: squares are left of rows of whole blocks, multiples of 256")
    if args.ranks < 2:
        parser.error("--ranks: at least 2 GPUs are needed")
    require_gpus(parser, args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "ranks")
        command = [sys.executable, *sys.argv, "--ranks", str(args.ranks), "--rendezvous", place, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(args.ranks)]
        try:
            codes = [rank.wait(300) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            sys.exit(f"the ranks exited with {codes}")
        told = [json.loads(Path(f"{place}-{rank}").read_text()) for rank in range(args.ranks)]
    if len({each["digest"] for each in told}) > 1:
        sys.exit("the ranks' sums differ")
    names = list(told[0]["rows"][0])
    rows = [
        {name: max(each["rows"][number][name] for each in told) for name in names}
        for number in range(len(ROWS))
    ]
    print(f"{ROUNDS} rounds right and equal on {args.ranks} ranks, {told[0]['seconds']:.1f} s")
    print("".join(f"{name:>16}" for name in names))
    for row in rows:
        print("".join(f"{row[name]:>16.1f}" for name in names))
    print(json.dumps({"benchmark": "bench_all_reduce", "settings": vars(args), "results": rows}))


if __name__ == "__main__":
    main()
