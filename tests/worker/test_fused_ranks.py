"""Fused models over two ranks compute what one computes: interpreted kernels, files for the GPUs' memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from headrace.ipc.config import EngineConfig
from headrace.kernels.mailbox import empty
from headrace.worker.parallel import TensorParallel

from .fused_rank import layouts, run, run_many_rows

RANK = Path(__file__).with_name("fused_rank.py")
OPTIONS: dict[str, Any] = {
    "vocab_size": 97,  # odd: the ranks' shares of the vocabulary differ
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"num_key_value_heads": 1, "attention_bias": True}),  # both ranks hold that head
    ("OPT", {}),
]
WIDE: tuple[str, dict[str, Any]] = ("Llama", {"hidden_size": 256, "num_key_value_heads": 2})
"""Rows of a whole block: sums leave their squares."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run in the interpreter here; on GPUs tests/gpu has their like"
)


def make_model(family: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A random checkpoint and what the configuration says of it."""
    torch.manual_seed(0)
    hf = getattr(transformers, f"{family}Config")(**OPTIONS | options, initializer_range=0.3)
    peer = getattr(transformers, f"{family}ForCausalLM")(hf)
    for name, parameter in peer.named_parameters():
        if name.endswith("bias"):  # a bias added by both ranks must not go unnoticed
            torch.nn.init.normal_(parameter)
    peer.save_pretrained(folder)
    fields = {"hf_config": hf.to_dict(), "architecture": f"{family}ForCausalLM"}
    return {"load_format": "safetensors", "model_path": str(folder), **fields}


@pytest.mark.timeout(900)  # kernels in the interpreter, which wait for each other by asking again and again
def test_two_ranks_equal_one(tmp_path: Path, make_config: Callable[..., EngineConfig]) -> None:
    for number, layout in enumerate(layouts(2)):
        for rank in range(2):
            path = str(tmp_path / f"memory-{number}-{rank}")
            empty(torch.from_file(path, True, layout.num_bytes, dtype=torch.uint8), layout.dtype)
    models = [*MODELS, WIDE]
    configs = [
        make_config(**make_model(*model, tmp_path / str(number))) for number, model in enumerate(models)
    ]
    encoded = [msgspec.json.encode(config).decode() for config in configs]
    ranks = [
        subprocess.Popen([sys.executable, str(RANK), str(rank), "2", str(tmp_path), *encoded])
        for rank in range(2)
    ]
    try:
        alone = [run(config, TensorParallel()) for config in configs[:-1]]
        many_alone = run_many_rows(configs[-1], TensorParallel())["logits"]
        assert [process.wait(800) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    both = [torch.load(tmp_path / f"results-{rank}.pt") for rank in range(2)]
    for number, (family, _) in enumerate(MODELS):
        expected = alone[number]["logits"]
        assert expected.std() > 0.1
        ours = torch.cat([each[number]["logits"] for each in both], dim=1)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4, msg=family)
        for each in (alone, *both):
            assert torch.equal(each[number]["drawn"], expected.argmax(-1)), family
    many = torch.cat([each[len(MODELS)]["logits"] for each in both], dim=1)
    assert (many - many_alone).norm() < 0.02 * many_alone.norm()
    for each in both:
        torch.testing.assert_close(each[-1]["logits"], alone[0]["logits"], atol=1e-4, rtol=1e-4)
