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
from headrace.worker.fused import Fused, Packed, fuse
from headrace.worker.models import build_model
from headrace.worker.parallel import Peers, TensorParallel
from headrace.worker.weights import load_weights
from torch import Tensor

CPU = torch.device("cpu")
PROMPT = [3, 96, 41, 0, 7, 55, 8, 95]
NUM_PREFILLED = 6
BLOCK = 4
LARGEST = 512
"""Numbers in a sum."""


def layouts(size: int) -> list[Layout]:
    one, two = (
        one_shot_layout(size, 4 * LARGEST, torch.float32),
        two_shot_layout(size, 4 * LARGEST, torch.float32),
    )
    return [one, two, winners_layout(size, 4)]


def connect(rank: int, size: int, folder: Path) -> TensorParallel:
    """Mailboxes and nothing else: what they cannot do fails."""
    mailboxes = []
    for number, layout in enumerate(layouts(size)):
        paths = [folder / f"memory-{number}-{peer}" for peer in range(size)]
        mapped = [torch.from_file(str(path), True, layout.num_bytes, dtype=torch.uint8) for path in paths]
        KEPT.extend(mapped)
        mailboxes.append(make_mailbox(layout, rank, [memory.data_ptr() for memory in mapped], CPU))
    return TensorParallel(rank, size, peers=Peers(*mailboxes))


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


def main(rank: str, size: str, folder: str, *encoded: str) -> None:
    torch.set_num_threads(1)
    configs = [msgspec.json.decode(config, type=EngineConfig) for config in encoded]
    mailboxes = connect(int(rank), int(size), Path(folder))
    results = [run(config, mailboxes) for config in configs]
    # Large messages, whose sums go on in the background, over gloo in NCCL's place.
    fused.HALVED_FROM = NUM_PREFILLED - 1
    gloo = parallel.connect(int(rank), int(size), CPU, f"{folder}/ranks")
    results.append(run(configs[0], gloo))
    torch.save(results, Path(folder) / f"results-{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
