"""One tensor-parallel rank, for test_parallel: runs models over one prompt and saves their logits.

Arguments: rank, size, rendezvous file, folder of the logits, then one EngineConfig as JSON per model.
"""

import sys
from pathlib import Path

import msgspec
import torch
from headrace.ipc.config import EngineConfig
from headrace.kernels.paged_attention import AttentionMetadata
from headrace.worker.models import build_model
from headrace.worker.parallel import TensorParallel, connect
from headrace.worker.weights import load_weights
from torch import Tensor

CPU = torch.device("cpu")
PROMPT = torch.tensor([3, 96, 41, 0, 7, 55, 8, 17, 95])
NUM_PREFILLED = 6
BLOCK = 4


def metadata(start: int, stop: int) -> AttentionMetadata:
    return AttentionMetadata(
        slot_mapping=torch.arange(start, stop),
        block_tables=torch.arange(-(-len(PROMPT) // BLOCK), dtype=torch.int32)[None],
        query_start=torch.tensor([0, stop - start], dtype=torch.int32),
        seq_lens=torch.tensor([stop], dtype=torch.int32),
        num_decodes=int(stop - start == 1),
        max_seq_len=stop,
        query_lens_host=[stop - start],
        seq_lens_host=[stop],
    )


@torch.inference_mode()
def logits(config: EngineConfig, tp: TensorParallel) -> Tensor:
    """float32 [len(PROMPT), vocab]: the prompt's first part at once, then token by token."""
    model = build_model(
        config.architecture, config.hf_config, torch.float32, CPU, tp, max_model_len=config.max_model_len
    )
    load_weights(model, config, CPU, tp)
    shape = (-(-len(PROMPT) // BLOCK), BLOCK, model.num_kv_heads, model.head_dim)
    cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.num_layers)]
    starts = [0, *range(NUM_PREFILLED, len(PROMPT))]
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(PROMPT)], strict=True):
        hidden = model(PROMPT[start:stop], torch.arange(start, stop), cache, metadata(start, stop))
        parts.append(model.compute_logits(hidden))
    return torch.cat(parts)


def main(rank: str, size: str, rendezvous: str, folder: str, *configs: str) -> None:
    torch.set_num_threads(1)
    tp = connect(int(rank), int(size), CPU, rendezvous)
    for number, config in enumerate(configs):
        result = logits(msgspec.json.decode(config, type=EngineConfig), tp)
        torch.save(result, Path(folder) / f"{number}-{tp.rank}-of-{tp.size}.pt")
    colour = tp.broadcast(torch.full((3,), tp.rank), src=tp.size - 1)
    assert colour.tolist() == [tp.size - 1] * 3


if __name__ == "__main__":
    main(*sys.argv[1:])
