"""Folders of weights, whole and damaged, and weights from a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.parallel import TensorParallel
from headrace.worker.weights import load_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

MakeConfig: TypeAlias = Callable[..., EngineConfig]
CPU, ALONE = torch.device("cpu"), TensorParallel()
OPTIONS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture
def peer() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**OPTIONS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def load(make_config: MakeConfig) -> Callable[..., CausalLM]:
    """Load a Llama of OPTIONS from a folder."""

    def load(folder: Path, tp: TensorParallel = ALONE, **changes: object) -> CausalLM:
        hf_config = transformers.LlamaConfig(**OPTIONS).to_dict() | changes
        config = make_config(load_format="safetensors", model_path=str(folder))
        model = build_model("LlamaForCausalLM", hf_config, torch.float32, CPU, tp, 64)
        load_weights(model, config, CPU, tp)
        return model

    return load


Load: TypeAlias = Callable[..., CausalLM]


def assert_holds(model: CausalLM, tensors: dict[str, Tensor]) -> None:
    weights = model.weights()
    assert weights.keys() == tensors.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.target, tensors[name][weight.part]), name


def test_one_file(tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load) -> None:
    peer.save_pretrained(tmp_path)
    assert_holds(load(tmp_path), peer.state_dict())


def test_shards(tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load) -> None:
    peer.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_holds(load(tmp_path), peer.state_dict())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_part(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load, rank: int
) -> None:
    peer.save_pretrained(tmp_path)
    model = load(tmp_path, TensorParallel(rank, 2))
    assert_holds(model, peer.state_dict())
    whole = sum(parameter.numel() for parameter in peer.parameters())
    norms = 5 * OPTIONS["hidden_size"]
    assert sum(parameter.numel() for parameter in model.parameters()) == (whole - norms) // 2 + norms


def test_tied_embeddings_need_no_head(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load
) -> None:
    tensors = {name: tensor for name, tensor in peer.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path, tie_word_embeddings=True), tensors)
    save_file(peer.state_dict(), tmp_path / "model.safetensors")  # some hold it nevertheless
    assert_holds(load(tmp_path, tie_word_embeddings=True), tensors)


def test_pickled_weights_are_never_opened(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load
) -> None:
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never opened"):
        load(tmp_path)


def test_what_other_programs_leave_is_ignored(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load
) -> None:
    peer.save_pretrained(tmp_path)
    save_file({"layers.0.wq.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(tensors | inv_freq, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path), peer.state_dict())


def damage(folder: Path, name: str, tensor: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else tensors | {name: tensor}, file)


NORM = "model.layers.1.input_layernorm.weight"


def test_missing_unexpected_and_misshapen_tensors_are_named(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load
) -> None:
    peer.save_pretrained(tmp_path)
    damage(tmp_path, NORM, torch.zeros(17))
    with pytest.raises(ConfigError, match=rf"{NORM}' of shape \[17\]; its config asks for \[16\]"):
        load(tmp_path)
    damage(tmp_path, NORM, None)
    with pytest.raises(ConfigError, match=f"lacks tensor '{NORM}'") as error:
        load(tmp_path)
    assert (error.value.parameter, error.value.value) == ("model", NORM)
    damage(tmp_path, NORM, torch.zeros(16))
    damage(tmp_path, "model.layers.1.self_attn.sinks", torch.zeros(4))
    with pytest.raises(
        ConfigError, match=r"has tensor 'model\.layers\.1\.self_attn\.sinks', which Llama has not"
    ):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_numbers_that_are_no_weights_are_named(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load, dtype: torch.dtype
) -> None:
    peer.save_pretrained(tmp_path)
    damage(tmp_path, NORM, torch.ones(16).to(dtype))
    with pytest.raises(ConfigError, match=f"has tensor '{NORM}' of {dtype}") as error:
        load(tmp_path)
    assert error.value.parameter == "model"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_floats_of_any_width_are_converted(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load, dtype: torch.dtype
) -> None:
    peer.to(dtype).save_pretrained(tmp_path)
    assert_holds(load(tmp_path), {name: tensor.float() for name, tensor in peer.state_dict().items()})


@pytest.mark.parametrize("index", [True, False])
def test_a_truncated_file_is_named(
    tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load, index: bool
) -> None:
    peer.save_pretrained(tmp_path, max_shard_size="6KB" if index else "1GB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"cannot read '{file}'"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, peer: transformers.LlamaForCausalLM, load: Load) -> None:
    peer.save_pretrained(tmp_path, max_shard_size="6KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ConfigError, match=f"cannot read '{file}': No such file"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{}"])
def test_a_damaged_index_is_named(tmp_path: Path, load: Load, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ConfigError, match=f"cannot read '{index}'"):
        load(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path: Path, load: Load) -> None:
    with pytest.raises(ConfigError, match=f"'{tmp_path}' has no weights"):
        load(tmp_path)


def dummy(make_config: MakeConfig, tp: TensorParallel = ALONE, seed: int = 0) -> CausalLM:
    hf_config = transformers.LlamaConfig(**OPTIONS).to_dict()
    model = build_model("LlamaForCausalLM", hf_config, torch.float32, CPU, tp, 64)
    load_weights(model, make_config(load_format="dummy", seed=seed), CPU, tp)
    return model


def test_dummy_weights_are_a_function_of_the_seed(make_config: MakeConfig) -> None:
    one = {name: weight.target for name, weight in dummy(make_config).weights().items()}
    assert_holds(dummy(make_config), one)
    for rank in range(2):
        assert_holds(dummy(make_config, TensorParallel(rank, 2)), one)
    matrices = torch.cat([tensor.flatten() for tensor in one.values() if tensor.dim() == 2])
    assert matrices.mean().abs() < 0.001
    assert 0.019 < matrices.std() < 0.021
    assert len(set(matrices.tolist())) > 0.9 * matrices.numel()
    assert all(torch.equal(tensor, torch.ones(16)) for tensor in one.values() if tensor.dim() == 1)
    other = dummy(make_config, seed=1).weights()["model.embed_tokens.weight"].target
    assert not torch.equal(other, one["model.embed_tokens.weight"])
