"""One rank of test_fused_ranks: a fused model over ranks that meet in shared files, its logits saved.

Arguments: rank, number of ranks, folder with the mailboxes' memories, then an EngineConfig as JSON per model.
"""

import sys
from pathlib import Path

import msgspec
import torch
from headrace.ipc.config import EngineConfig
from headrace.kernels.all_reduce import one_shot_layout, two_shot_layout
from headrace.kernels.draw_tokens import draw_tokens_triton, winners_layout
from headrace.kernels.mailbox import Layout, make_mailbox
from headrace.kernels.slot_table import StepInputs
from headrace.worker import fused, parallel
from headrace.worker.fused import Fused, Packed, fold_norms, fuse
from headrace.worker.models import build_model
from headrace.worker.parallel import Line, Peers, TensorParallel
from headrace.worker.weights import load_weights
from torch import Tensor

CPU = torch.device("cpu")
PROMPT = [3, 96, 41, 0, 7, 55, 8, 95]
NUM_PREFILLED = 6
BLOCK = 4
LARGEST = 512
"""Numbers in a sum."""
MANY_ROWS = 17
"""The fewest whose norms may come late."""


def layouts(size: int) -> list[Layout]:
    """For float32, then for the many rows' bfloat16."""
    found = []
    for dtype, numbers in ((torch.float32, LARGEST), (torch.bfloat16, MANY_ROWS * 256)):
        num_bytes = numbers * dtype.itemsize
        found += [one_shot_layout(size, num_bytes, dtype), two_shot_layout(size, num_bytes, dtype)]
        found.append(winners_layout(size, 4))
    return found


def connect(rank: int, size: int, folder: Path) -> tuple[TensorParallel, TensorParallel]:
    """Mailboxes and nothing else, for float32 and for bfloat16: what they cannot do fails."""
    mailboxes = []
    for number, layout in enumerate(layouts(size)):
        paths = [folder / f"memory-{number}-{peer}" for peer in range(size)]
        mapped = [torch.from_file(str(path), True, layout.num_bytes, dtype=torch.uint8) for path in paths]
        KEPT.extend(mapped)
        mailboxes.append(make_mailbox(layout, rank, [memory.data_ptr() for memory in mapped], CPU))
    few, many = (TensorParallel(rank, size, peers=Peers(Line(), *mailboxes[at : at + 3])) for at in (0, 3))
    return few, many


KEPT: list[Tensor] = []
"""Mapped as long as the process lives."""


def inputs(start: int, stop: int) -> StepInputs:
    ids, place = torch.tensor(PROMPT[start:stop]), torch.arange(start, stop)
    return StepInputs(ids, place, place, torch.tensor([stop], dtype=torch.int32))


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def steps(model: Fused) -> list[Tensor]:
    """Logits of the prompt's first part as one chunk, then token by token; this rank's share of them."""
    chunk = Packed(inputs(0, NUM_PREFILLED), i32(0), i32(0, NUM_PREFILLED), 0, i32(0, 0).view(1, 2))
    first = model.packed(chunk, i32(NUM_PREFILLED - 1))
    assert first is not None
    decodes = [model.decode(inputs(at, at + 1), i32(0)) for at in range(NUM_PREFILLED, len(PROMPT))]
    return [first, *decodes]


@torch.inference_mode()
def run(config: EngineConfig, tp: TensorParallel) -> dict[str, Tensor]:
    model = build_model(
        config.architecture, config.hf_config, torch.float32, CPU, tp, max_model_len=config.max_model_len
    )
    load_weights(model, config, CPU, tp)
    blocks = -(-len(PROMPT) // BLOCK)
    shape = (blocks, BLOCK, model.num_kv_heads, model.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.num_layers)]
    heads = config.hf_config["num_attention_heads"] // tp.size
    steps_of = fuse(model, caches, torch.arange(blocks, dtype=torch.int32)[None], heads, 1)
    assert steps_of is not None
    logits = steps(steps_of)
    share = steps_of.share
    columns = logits[0].shape[1] if share is None else share.columns
    zero = torch.zeros(1)
    drawn = [
        draw_tokens_triton(
            each, zero, zero.long(), zero.int(), share=None if share is None else steps_of.share
        )
        for each in logits
    ]
    return {"logits": torch.cat(logits)[:, :columns], "drawn": torch.cat(drawn)}


@torch.inference_mode()
def run_many_rows(config: EngineConfig, tp: TensorParallel) -> dict[str, Tensor]:
    """Logits of a first token in each of many rows: norms come late, their scales from what sums leave."""
    options = config.hf_config
    model = build_model(
        config.architecture, options, torch.bfloat16, CPU, tp, max_model_len=config.max_model_len
    )
    load_weights(model, config, CPU, tp)
    fold_norms(model)
    shape = (MANY_ROWS, BLOCK, model.num_kv_heads, model.head_dim)
    caches = [
        (torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
        for _ in range(model.num_layers)
    ]
    tables = torch.arange(MANY_ROWS, dtype=torch.int32)[:, None]
    steps_of = fuse(model, caches, tables, options["num_attention_heads"] // tp.size, MANY_ROWS)
    assert steps_of is not None
    rows = torch.arange(MANY_ROWS)
    first = StepInputs(rows, 0 * rows, BLOCK * rows, torch.ones(MANY_ROWS, dtype=torch.int32))
    logits = steps_of.decode(first, rows.int())
    share = steps_of.share
    return {"logits": logits[:, : logits.shape[1] if share is None else share.columns].float()}


def main(rank: str, size: str, folder: str, *encoded: str) -> None:
    torch.set_num_threads(1)
    *configs, wide = [msgspec.json.decode(config, type=EngineConfig) for config in encoded]
    few, many = connect(int(rank), int(size), Path(folder))
    results = [run(config, few) for config in configs]
    results.append(run_many_rows(wide, many))
    # Large messages, whose sums go on in the background, over gloo in NCCL's place.
    fused.HALVED_FROM = NUM_PREFILLED - 1
    gloo = parallel.connect(int(rank), int(size), CPU, f"{folder}/ranks")
    results.append(run(configs[0], gloo))
    torch.save(results, Path(folder) / f"results-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
