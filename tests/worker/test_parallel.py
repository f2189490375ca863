"""Several ranks over gloo compute what one computes. The ranks are threads here; the engine has processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias

import msgspec
import pytest
import torch
import transformers
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.kernels.paged_attention import AttentionMetadata
from headrace.worker.models import build_model
from headrace.worker.parallel import TensorParallel, check_devices, connect
from headrace.worker.weights import load_weights
from torch import Tensor

MakeConfig: TypeAlias = Callable[..., EngineConfig]
CPU = torch.device("cpu")
PROMPT = torch.tensor([3, 96, 41, 0, 7, 55, 8, 17, 95])
NUM_PREFILLED = 6
BLOCK = 4
OPTIONS: dict[str, Any] = {
    "vocab_size": 97,  # odd: the ranks' shares of the vocabulary differ
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # more ranks share them
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 256,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    ("Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    ("Qwen2", {}),
    ("Qwen3", {"head_dim": 12}),
    ("OPT", {"do_layer_norm_before": False}),
    ("OPT", {"word_embed_proj_dim": 24}),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def logits_of(config: EngineConfig, tp: TensorParallel) -> Tensor:
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


def on_every_rank(size: int, rendezvous: Path, run: Callable[[TensorParallel], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        ranks = [
            pool.submit(lambda rank: run(connect(rank, size, CPU, str(rendezvous))), rank)
            for rank in range(size)
        ]
        return [rank.result(60) for rank in ranks]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> list[EngineConfig]:
    """One of every family, with random weights; the last has dummy ones."""
    made = []
    for number, (family, options) in enumerate(MODELS):
        torch.manual_seed(number)
        hf = getattr(transformers, f"{family}Config")(**OPTIONS | options, initializer_range=0.3)
        peer = getattr(transformers, f"{family}ForCausalLM")(hf)
        for name, parameter in peer.named_parameters():
            if name.endswith("bias"):  # a bias added by several ranks must not go unnoticed
                torch.nn.init.normal_(parameter)
        folder = tmp_path_factory.mktemp("model")
        peer.save_pretrained(folder)
        fields = {"hf_config": hf.to_dict(), "architecture": f"{family}ForCausalLM"}
        made.append(make_config(load_format="safetensors", model_path=str(folder), **fields))
    return [*made, msgspec.structs.replace(made[0], load_format="dummy")]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_ranks_compute_what_one_computes(size: int, configs: list[EngineConfig], tmp_path: Path) -> None:
    def run(tp: TensorParallel) -> list[Tensor]:
        return [logits_of(config, tp) for config in configs]

    ranks = on_every_rank(size, tmp_path / "ranks", run)
    for number, config in enumerate(configs):
        expected = logits_of(config, TensorParallel())
        assert expected.std() > 0.01
        for ours in ranks:
            torch.testing.assert_close(ours[number], expected, atol=1e-4, rtol=1e-4, msg=config.architecture)
            assert torch.equal(ours[number].argmax(-1), expected.argmax(-1)), config.architecture
            assert torch.equal(ours[number], ranks[0][number]), f"{config.architecture}: the ranks differ"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "4 does not divide .* attention heads, 6"),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, "4 does not divide .* key/value heads, 6"),
        ({"intermediate_size": 50}, "4 does not divide .* intermediate_size, 50"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, int], words: str) -> None:
    hf = transformers.LlamaConfig(**OPTIONS | {"hidden_size": 48} | changes).to_dict()
    with pytest.raises(ConfigError, match=words) as caught:
        build_model("LlamaForCausalLM", hf, torch.float32, CPU, TensorParallel(1, 4), max_model_len=16)
    assert caught.value.parameter == "tensor_parallel_size"


def test_every_rank_needs_a_gpu_to_itself() -> None:
    check_devices(4, 4)
    with pytest.raises(ConfigError, match="tensor_parallel_size 4 asks for more GPUs than the 2"):
        check_devices(4, 2)


def test_a_broadcast_comes_from_its_source(tmp_path: Path) -> None:
    def run(tp: TensorParallel) -> list[int]:
        return tp.broadcast(torch.full((3,), tp.rank), src=2).tolist()

    assert on_every_rank(3, tmp_path / "ranks", run) == [[2, 2, 2]] * 3


def test_in_silence_nobody_is_waited_for(tmp_path: Path) -> None:
    rendezvous = str(tmp_path / "ranks")
    done = Event()

    def run(rank: int) -> Tensor:
        tp, tensor = connect(rank, 2, CPU, rendezvous), torch.full((3,), 1.0 + rank)
        if rank == 0:
            with tp.silence():
                assert tp.all_reduce(tensor) is tp.broadcast(tensor, src=1) is tensor
                assert len(tp.add_all_reduced(tensor, torch.zeros(3))()) == 1
                assert tp.all_gather_last(tensor).shape == (6,)
            done.set()
        assert done.wait(60)
        return tp.all_reduce(tensor)

    with ThreadPoolExecutor(2) as pool:
        assert [each.tolist() for each in pool.map(run, range(2))] == [[3.0] * 3] * 2


def test_alone_every_collective_is_the_identity(tmp_path: Path) -> None:
    tp = connect(0, 1, CPU, str(tmp_path / "unused"))
    assert tp == TensorParallel(rank=0, size=1, group=None)
    tensor = torch.arange(3)
    assert tp.all_reduce(tensor) is tp.all_gather_last(tensor) is tp.broadcast(tensor) is tensor
    assert not (tmp_path / "unused").exists()
