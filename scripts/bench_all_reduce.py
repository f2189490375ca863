"""Sums over GPUs: right, equal on all ranks, and how long they take, by message size.

    python scripts/bench_all_reduce.py --ranks 2 [--width 4096] [--dtype bfloat16]

Each sum is added to a residual, as in a layer of a model: in one shot and in two through peer memory, and by
NCCL with an addition. Times are microseconds of one sum in a CUDA graph of a row of them, the slowest rank's;
`host` is NCCL's without a graph. NVLink multicast is off. First the kernels are compared with exact sums over
thousands of rounds of changing sizes, with ranks that come late at random. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from headrace.kernels.all_reduce import (
    all_reduce_reference,
    all_reduce_triton,
    one_shot_layout,
    two_shot_layout,
)
from headrace.kernels.mailbox import Mailbox
from headrace.worker.parallel import TensorParallel, connect, share_mailboxes
from torch import Tensor

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768)
IN_A_ROW = 20
ROUNDS = 3000
LARGEST_ONE_SHOT = 2 << 20


Row: TypeAlias = dict[str, float]


def message(seed: int, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(elements, generator=generator, device=device).to(dtype)


def check(tp: TensorParallel, mailboxes: list[Mailbox], largest: int, device: torch.device) -> int:
    """Sums of changing sizes back to back, against exact ones. Returns a number that the results decide."""
    sizes, late, dtype = random.Random(1), random.Random(tp.rank), mailboxes[0].layout.dtype
    pending: list[tuple[Tensor, Tensor]] = []
    digest = 0
    for turn in range(ROUNDS):
        elements = sizes.choice([1, 8, 100, 4096, 5000, 65536, sizes.randrange(1, largest)])
        messages = [message(turn * tp.size + rank, elements, dtype, device) for rank in range(tp.size)]
        if late.random() < 0.02:
            time.sleep(late.random() / 200)
        mailbox = mailboxes[turn % 2]
        if mailbox is mailboxes[0] and elements > LARGEST_ONE_SHOT // dtype.itemsize:
            mailbox = mailboxes[1]
        residual = torch.full_like(messages[0], 0.5)
        ours = all_reduce_triton(messages[tp.rank].clone(), mailbox, residual)
        pending.append((ours, all_reduce_reference(messages, torch.full_like(ours, 0.5))))
        if len(pending) == 50:
            for got, right in pending:
                torch.testing.assert_close(got, right, atol=2e-2, rtol=2e-2)
                digest = 31 * digest % 2**40 + int(got.view(torch.uint8).long().sum())
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


def measure(
    tp: TensorParallel, mailboxes: list[Mailbox], width: int, device: torch.device
) -> list[dict[str, Any]]:
    rows, dtype = [], mailboxes[0].layout.dtype

    def wait_for_all() -> None:
        tp.all_reduce(torch.ones(1, device=device))
        torch.cuda.synchronize()

    def by_nccl(partial: Tensor, residual: Tensor) -> None:
        tp.all_reduce(partial)
        residual += partial

    for count in ROWS:
        partial = torch.zeros(count, width, dtype=dtype, device=device)
        residual = torch.zeros_like(partial)

        def row_of(
            one: Callable[[Tensor, Tensor], object], args: tuple[Tensor, Tensor]
        ) -> Callable[[], object]:
            return lambda: [one(*args) for _ in range(IN_A_ROW)]

        row: dict[str, Any] = {"rows": count, "KiB": partial.numel() * dtype.itemsize / 1024}
        for name, mailbox in zip(("one shot", "two shots"), mailboxes, strict=True):
            if partial.numel() * dtype.itemsize > LARGEST_ONE_SHOT and name == "one shot":
                row[name] = float("nan")
                continue
            run = row_of(lambda p, r, m=mailbox: all_reduce_triton(p, m, r), (partial, residual))  # type: ignore[misc]
            row[name] = graph_us(run, wait_for_all)
        run = row_of(by_nccl, (partial, residual))
        row["NCCL"] = graph_us(run, wait_for_all)
        row["NCCL host"] = host_us(run, wait_for_all)
        rows.append(row)
    return rows


@torch.inference_mode()
def one_rank(args: argparse.Namespace) -> None:
    device, dtype = torch.device("cuda", args.rank), getattr(torch, args.dtype)
    torch.cuda.set_device(device)
    tp = connect(args.rank, args.ranks, device, args.rendezvous)
    largest = ROWS[-1] * args.width
    layouts = [
        one_shot_layout(args.ranks, LARGEST_ONE_SHOT, dtype),
        two_shot_layout(args.ranks, largest * dtype.itemsize, dtype),
    ]
    mailboxes = share_mailboxes(tp, device, layouts)
    begun = time.perf_counter()
    told: dict[str, Any] = {"digest": check(tp, mailboxes, largest, device)}
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
    if args.ranks < 2:
        parser.error("--ranks: at least 2 GPUs are needed")
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
    print("".join(f"{name:>12}" for name in names))
    for row in rows:
        print("".join(f"{row[name]:>12.1f}" for name in names))
    print(json.dumps({"benchmark": "bench_all_reduce", "settings": vars(args), "results": rows}))


if __name__ == "__main__":
    main()
