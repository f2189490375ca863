"""Every model against transformers, at every position, however its tokens are cut into steps."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
import transformers
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.kernels.paged_attention import AttentionMetadata
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.models.llama import Llama
from headrace.worker.parallel import TensorParallel
from headrace.worker.rope import rotation_table
from headrace.worker.weights import load_weights
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

MakeConfig: TypeAlias = Callable[..., EngineConfig]
Step: TypeAlias = list[tuple[int, int]]
"""(sequence, number of tokens) of each row."""

CPU = torch.device("cpu")
VOCAB, BLOCK, MAX_LEN = 97, 4, 64
LENGTHS = (23, 1, 9, 40)

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
}
SLIDING = {"sliding_window": 8, "use_sliding_window": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "llama-mha-tied": ("Llama", SMALL | {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa-biases": (
        "Llama",
        SMALL | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope-head_dim": ("Llama", SMALL | {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "Llama",
        SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", SMALL | {"sliding_window": 64}),
    "qwen2": ("Qwen2", SMALL),
    "qwen2-tied": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 12}),
    "qwen3-yarn": (
        "Qwen3",
        SMALL | {"head_dim": 12, "rope_scaling": YARN | {"original_max_position_embeddings": 32}},
    ),
    "opt": ("OPT", OPT),
    "opt-norm-after-projected": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-untied-no-biases": ("OPT", OPT | {"tie_word_embeddings": False, "enable_bias": False}),
    "opt-gelu": ("OPT", OPT | {"activation_function": "gelu"}),
}


class Case(NamedTuple):
    """A model of ours, and what transformers says of some sequences."""

    model: CausalLM
    prompts: list[list[int]]
    logprobs: list[Tensor]
    """[length, VOCAB] of each prompt"""


def make_peer(family: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(len(options))
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the initial values, in which biases are zeros and norms ones; sharp enough to matter.
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * (0.3 if is_norm else 0.2) + is_norm)
    return model


def load(folder: Path, make_config: MakeConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    hf_config = json.loads((folder / "config.json").read_text())
    (architecture,) = hf_config["architectures"]
    model = build_model(architecture, hf_config, dtype, CPU, TensorParallel(), MAX_LEN)
    config = make_config(load_format="safetensors", model_path=str(folder), hf_config=hf_config)
    load_weights(model, config, CPU, TensorParallel())
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig
) -> Case:
    peer = make_peer(*MODELS[request.param])
    folder = tmp_path_factory.mktemp("model")
    peer.save_pretrained(folder)
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in LENGTHS]
    with torch.no_grad():
        logprobs = [peer(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in prompts]
    return Case(load(folder, make_config), prompts, logprobs)


@torch.inference_mode()
def run(model: CausalLM, prompts: list[list[int]], steps: list[Step]) -> list[Tensor]:
    """Log-probabilities [length, VOCAB] of each prompt, its blocks scattered over the cache."""
    needed = [-(-len(prompt) // BLOCK) for prompt in prompts]
    scattered = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).int()
    tables = torch.zeros(len(prompts), max(needed), dtype=torch.int32)
    for row, blocks in enumerate(scattered.split_with_sizes(needed)):
        tables[row, : len(blocks)] = blocks
    shape = (sum(needed), BLOCK, model.num_kv_heads, model.head_dim)
    dtype = next(model.parameters()).dtype
    cache = [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_layers)
    ]
    done = [0] * len(prompts)
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for step in steps:
        step = sorted(step, key=lambda row: row[1] > 1)
        spans = [range(done[sequence], done[sequence] + count) for sequence, count in step]
        sequences = [sequence for sequence, _ in step]
        positions = torch.tensor([position for span in spans for position in span])
        ids = [prompts[i][position] for i, span in zip(sequences, spans, strict=True) for position in span]
        owners = [i for i, span in zip(sequences, spans, strict=True) for _ in span]
        blocks = tables[owners, positions // BLOCK].long()
        for sequence, span in zip(sequences, spans, strict=True):
            done[sequence] = span.stop
        query_lens, seq_lens = [len(span) for span in spans], [span.stop for span in spans]
        meta = AttentionMetadata(
            slot_mapping=blocks * BLOCK + positions % BLOCK,
            block_tables=tables[sequences],
            query_start=torch.tensor([0, *query_lens]).cumsum(0).int(),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            num_decodes=query_lens.count(1),
            max_seq_len=max(seq_lens),
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
        )
        hidden = model(torch.tensor(ids), positions, cache, meta)
        logprobs = model.compute_logits(hidden).log_softmax(-1)
        for sequence, part in zip(sequences, logprobs.split_with_sizes(query_lens), strict=True):
            parts[sequence].append(part)
    return [torch.cat(of_sequence) for of_sequence in parts]


def at_once() -> list[Step]:
    return [list(enumerate(LENGTHS))]


def token_by_token() -> list[Step]:
    return [
        [(sequence, 1) for sequence, length in enumerate(LENGTHS) if position < length]
        for position in range(max(LENGTHS))
    ]


def in_chunks(size: int = 7) -> list[Step]:
    return [
        [(i, min(size, length - start)) for i, length in enumerate(LENGTHS) if start < length]
        for start in range(0, max(LENGTHS), size)
    ]


def at_random(seed: int = 0) -> list[Step]:
    """Some sequences a step, in any order, each a token or a chunk."""
    rng = random.Random(seed)
    left = dict(enumerate(LENGTHS))
    steps: list[Step] = []
    while left:
        rows = rng.sample(sorted(left), rng.randint(1, len(left)))
        step = [(row, min(left[row], rng.choice([1, 1, 2, 5, 11]))) for row in rows]
        steps.append(step)
        for row, count in step:
            left[row] -= count
            if not left[row]:
                del left[row]
    return steps


@pytest.mark.parametrize("steps", [at_once, token_by_token, in_chunks, at_random])
def test_every_logprob_is_transformers(case: Case, steps: Callable[[], list[Step]]) -> None:
    for ours, theirs in zip(run(case.model, case.prompts, steps()), case.logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def build(architecture: str, **options: object) -> CausalLM:
    hf_config = SMALL | {"rope_theta": 1e4, "hidden_act": "silu"} | options
    return build_model(architecture, hf_config, torch.float32, CPU, TensorParallel(), MAX_LEN)


def test_rope_options_from_before_transformers_5() -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    old = build("LlamaForCausalLM", rope_theta=1000.0, rope_scaling=scaling)
    new = build("LlamaForCausalLM", rope_parameters=LLAMA3_ROPE)
    plain = build("LlamaForCausalLM", rope_theta=1000.0)
    assert isinstance(old, Llama)
    assert isinstance(new, Llama)
    assert isinstance(plain, Llama)
    assert torch.equal(old.rotation, new.rotation)
    assert not torch.equal(old.rotation, plain.rotation)


ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 1e6},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192}},
    "trained-length": {
        "rope_scaling": {name: LLAMA3_ROPE[name] for name in LLAMA3_ROPE if not name.startswith("original")}
    },
    "trained-length-outside": {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 64},
    "given-twice": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn-of-all-pairs": {"rope_scaling": YARN | {"original_max_position_embeddings": 8}},
    "yarn-without-a-factor": {
        "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 1 << 14}
    },
    "yarn-with-options": {
        "rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    },
    "yarn-with-weights": {"rope_scaling": YARN | {"factor": 3.3, "mscale": 1.2, "mscale_all_dim": 0.7}},
}


@pytest.mark.parametrize("options", ROPES.values(), ids=ROPES)
def test_rotations_are_transformers_to_the_last_bit(options: dict[str, Any]) -> None:
    length = 1 << 17  # so far out the last bit of a frequency is a hundredth of a radian
    hf_config = SMALL | {"head_dim": 32, "max_position_embeddings": length} | options
    peer = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copy.deepcopy(hf_config)))
    positions = torch.arange(0, length, 97)
    cos, sin = peer(torch.zeros(1), positions[None])
    ours = rotation_table(hf_config, 32, length)[positions]
    assert torch.equal(ours[:, 0], cos[0, :, :16])
    assert torch.equal(ours[:, 2], sin[0, :, :16])


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    hf_config = SMALL | {"num_attention_heads": 32, "hidden_size": 64}
    del hf_config["num_key_value_heads"], hf_config["tie_word_embeddings"]
    theirs = getattr(transformers, f"{family}Config").from_dict(dict(hf_config))
    ours = build_model(f"{family}ForCausalLM", hf_config, torch.float32, CPU, TensorParallel(), MAX_LEN)
    assert isinstance(ours, Llama)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.is_tied == theirs.tie_word_embeddings


def test_bfloat16_stays_close(tmp_path: Path, make_config: MakeConfig) -> None:
    peer = make_peer(*MODELS["llama"])
    peer.save_pretrained(tmp_path)
    prompt = list(range(40))
    (ours,) = run(load(tmp_path, make_config, torch.bfloat16), [prompt], [[(0, 30)], [(0, 9)], [(0, 1)]])
    with torch.no_grad():
        theirs = peer(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert ours.dtype == torch.float32
    assert 1e-3 < (ours - theirs).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("GPT2LMHeadModel", {}, "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM"),
        ("LlamaForCausalLM", {"sliding_window": 63}, "max_model_len 64 .* window of 63"),
        ("MistralForCausalLM", {"sliding_window": 63}, "max_model_len 64 .* window of 63"),
        (
            "MistralForCausalLM",
            {"sliding_window": 63, "layer_types": ["full_attention"] * 2},  # Mistral has no such option
            "window of 63",
        ),
        ("Qwen2ForCausalLM", SLIDING | {"max_window_layers": 1}, "window of 8"),
        (
            "Qwen2ForCausalLM",
            SLIDING | {"layer_types": ["full_attention", "sliding_attention"]},
            "window of 8",
        ),
        ("Qwen3ForCausalLM", SLIDING | {"max_window_layers": 0}, "window of 8"),
        ("LlamaForCausalLM", {"is_causal": False}, "is_causal False"),
        ("OPTForCausalLM", {"ffn_dim": 80, "is_causal": False}, "is_causal False"),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}, "num_attention_heads .* 6, not a multiple of 4"),
        ("LlamaForCausalLM", {"head_dim": 7}, "head_dim .* 7, not a multiple of 2"),
        (
            "OPTForCausalLM",
            {"ffn_dim": 80, "num_attention_heads": 5},
            "hidden_size .* 48, not a multiple of 5",
        ),
        (
            "LlamaForCausalLM",
            {"intermediate_size": None},
            "intermediate_size .* None, not a positive integer",
        ),
        ("OPTForCausalLM", {}, "ffn_dim .* None, not a positive integer"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "factor None, where its rope scaling"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor None"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_type 'longrope'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 0}}, "factor 0, where its rope"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {"type": "dynamic", "factor": 4}, "max_position_embeddings": 32},
            "at most 32 tokens",
        ),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
        ("OPTForCausalLM", {"ffn_dim": 80, "max_position_embeddings": 63}, "max_model_len 64 exceeds .* 63"),
        ("OPTForCausalLM", {"ffn_dim": 80, "activation_function": "tanh"}, "activation_function 'tanh'"),
    ],
)
def test_unsupported_models_are_refused(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(architecture, **options)


def test_options_that_change_nothing_are_accepted() -> None:
    build("LlamaForCausalLM", sliding_window=8, layer_types=["full_attention"] * 2)
    build("LlamaForCausalLM", pretraining_tp=2)
    build("LlamaForCausalLM", pretraining_tp=None)
    for family in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        build(family, sliding_window=8)
        build(family, sliding_window=8, use_sliding_window=False, max_window_layers=0)
        build(family, **SLIDING, layer_types=["full_attention"] * 2, max_window_layers=0)
        build(family, **SLIDING, max_window_layers=2)
        build(family, **SLIDING)
    build("LlamaForCausalLM", rope_scaling={"type": "dynamic", "factor": 4}, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (4, {}, "tensor_parallel_size 4 does not divide the model's number of attention heads, 6"),
        (3, {}, "tensor_parallel_size 3 does not divide the model's number of key/value heads, 2"),
        (2, {"intermediate_size": 81}, "does not divide the model's intermediate_size, 81"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_model("LlamaForCausalLM", SMALL | options, torch.float32, CPU, TensorParallel(0, size), MAX_LEN)
    assert error.value.parameter == "tensor_parallel_size"
