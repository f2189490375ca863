"""One rank of test_all_reduce: exchanges with the others through files that all map, and saves what it got.

Arguments: rank, number of ranks, folder with the memories `memory-<kernel>-<rank>`.
"""

import sys
from pathlib import Path

import torch
from headrace.kernels.all_reduce import all_reduce_triton, one_shot_layout, square_parts, two_shot_layout
from headrace.kernels.draw_tokens import Share, draw_tokens_triton, winners_layout
from headrace.kernels.mailbox import Layout, Mailbox, make_mailbox
from torch import Tensor

CPU = torch.device("cpu")
ROUNDS = 5
"""More than a mailbox has boxes for."""
LARGEST = 700
SQUARED = (2, 256)
"""Rows and columns of a sum that leaves squares: the last program of a kernel has too few blocks."""
ROWS = 6


def layouts(size: int) -> dict[str, Layout]:
    found = {"winners": winners_layout(size, ROWS)}
    for dtype in (torch.float32, torch.bfloat16):
        num_bytes = LARGEST * dtype.itemsize
        found[f"one {dtype}"] = one_shot_layout(size, num_bytes, dtype)
        found[f"two {dtype}"] = two_shot_layout(size, num_bytes, dtype)
    return found


def message(rank: int, turn: int, elements: int, dtype: torch.dtype) -> Tensor:
    """What a rank adds; some of it is negative zero, which is how a mailbox says that nothing has come."""
    x = torch.randn(elements, generator=torch.Generator().manual_seed(1000 * turn + rank))
    x[::7] = -0.0
    return x.to(dtype)


def sizes(turn: int) -> int:
    return (LARGEST, 1, 300, 513, LARGEST)[turn]


def logits(columns: int, turn: int) -> Tensor:
    x = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(turn))
    x[0] = 0.0  # all ranks tie, and the first token wins
    x[1, 1:] = -torch.inf
    return x


def reduced(mailbox: Mailbox, rank: int, add: bool) -> list[Tensor]:
    """The sums of all rounds; in between rank 0 rehearses, which nobody else must notice."""
    got = []
    for turn in range(ROUNDS):
        partial = message(rank, turn, sizes(turn), mailbox.layout.dtype)
        residual = message(-1, turn, sizes(turn), mailbox.layout.dtype) if add else None
        if rank == 0:
            all_reduce_triton(partial.clone(), mailbox, live=False)
        got.append(all_reduce_triton(partial, mailbox, residual))
    return got


def squared(mailbox: Mailbox, rank: int) -> list[Tensor]:
    """A sum of rows and its squares."""
    rows, width = SQUARED
    partial = message(rank, ROUNDS, rows * width, mailbox.layout.dtype).view(SQUARED)
    squares = torch.full((square_parts(mailbox.layout, width), rows), torch.nan)
    return [all_reduce_triton(partial, mailbox, squares=squares), squares]


def drawn(mailbox: Mailbox, rank: int, size: int, vocab: int) -> list[Tensor]:
    each = -(-vocab // size)
    start, stop = min(rank * each, vocab), min((rank + 1) * each, vocab)
    temperatures = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.7, 2.0])
    seeds, positions = torch.arange(ROWS), torch.arange(ROWS, dtype=torch.int32)
    got = []
    for turn in range(ROUNDS):
        mine = torch.full((ROWS, each), 100.0)  # padding would win
        mine[:, : stop - start] = logits(vocab, turn)[:, start:stop]
        share = Share(start, stop - start, mailbox)
        got.append(draw_tokens_triton(mine, temperatures, seeds, positions, share=share))
    return got


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    results, memories = {}, []
    for name, layout in layouts(size).items():
        paths = [folder / f"memory-{name}-{peer}" for peer in range(size)]
        memories += [torch.from_file(str(path), True, layout.num_bytes, dtype=torch.uint8) for path in paths]
        mailbox = make_mailbox(layout, rank, [memory.data_ptr() for memory in memories[-size:]], CPU)
        if name == "winners":
            results[name] = drawn(mailbox, rank, size, vocab=101)
        else:
            results[name] = reduced(mailbox, rank, add="float32" in name) + squared(mailbox, rank)
    torch.save(results, folder / f"results-{rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
