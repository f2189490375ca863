"""Two ranks over gloo compute what one computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
import transformers
from headrace.ipc.config import EngineConfig
from headrace.worker.parallel import TensorParallel, connect

MakeConfig: TypeAlias = Callable[..., EngineConfig]
RANK = Path(__file__).with_name("tp_rank.py")
OPTIONS: dict[str, Any] = {
    "vocab_size": 97,  # odd: the ranks' shares of the vocabulary differ
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 256,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"tie_word_embeddings": True}),
    ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),  # both hold that head
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 12}),
    ("OPT", {"do_layer_norm_before": False}),
]


def start_rank(rank: int, size: int, folder: Path, configs: list[str]) -> subprocess.Popen[bytes]:
    places = [str(folder / "ranks"), str(folder)]
    return subprocess.Popen([sys.executable, str(RANK), str(rank), str(size), *places, *configs])


def test_two_ranks_equal_one(tmp_path: Path, make_config: MakeConfig) -> None:
    configs = []
    for number, (family, options) in enumerate(MODELS):
        torch.manual_seed(number)
        hf = getattr(transformers, f"{family}Config")(**OPTIONS | options, initializer_range=0.3)
        peer = getattr(transformers, f"{family}ForCausalLM")(hf)
        for name, parameter in peer.named_parameters():
            if name.endswith("bias"):  # a bias added by both ranks must not go unnoticed
                torch.nn.init.normal_(parameter)
        folder = tmp_path / f"model{number}"
        peer.save_pretrained(folder)
        fields = {"hf_config": hf.to_dict(), "architecture": f"{family}ForCausalLM"}
        configs.append(make_config(load_format="safetensors", model_path=str(folder), **fields))
    configs.append(msgspec.structs.replace(configs[0], load_format="dummy"))
    encoded = [msgspec.json.encode(config).decode() for config in configs]

    ranks = [start_rank(rank, 2, tmp_path, encoded) for rank in range(2)]
    alone = start_rank(0, 1, tmp_path, encoded)
    assert [process.wait(120) for process in (*ranks, alone)] == [0, 0, 0]
    for number, config in enumerate(configs):
        expected = torch.load(tmp_path / f"{number}-0-of-1.pt")
        assert expected.std() > 0.01
        for rank in range(2):
            ours = torch.load(tmp_path / f"{number}-{rank}-of-2.pt")
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4, msg=f"{config.architecture}")


def test_alone_every_collective_is_the_identity(tmp_path: Path) -> None:
    tp = connect(0, 1, torch.device("cpu"), str(tmp_path / "unused"))
    assert tp == TensorParallel(rank=0, size=1, group=None)
    tensor = torch.arange(3)
    assert tp.all_reduce(tensor) is tp.all_gather_last(tensor) is tp.broadcast(tensor) is tensor
    assert not (tmp_path / "unused").exists()
