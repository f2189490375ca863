"""Fixtures that several folders share: a configuration of the oracle, small unless told otherwise."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tokenizers
from headrace.ipc.config import EngineConfig
from tokenizers import decoders, models, pre_tokenizers, trainers

# As the workers do, for tests that compute in their own process: torch's threads must not spin on two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Kernels run in Triton's interpreter where there is no GPU. Triton reads it when it is first imported, by
# whichever test module comes first.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing is ever unpickled, here or in any child process. An AssertionError says so.
NO_PICKLE = Path(__file__).with_name("no_pickle")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(NO_PICKLE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
)
runpy.run_path(str(NO_PICKLE / "sitecustomize.py"))

# The same examples every time, and none fails for taking long: the machine may have other things to do.
hypothesis.settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")

DEFAULTS: dict[str, Any] = {
    "model": "oracle",
    "model_path": "",
    "served_model_name": "oracle",
    "tokenizer": None,
    "hf_config": {},
    "architecture": "Oracle",
    "vocab_size": 1000,
    "eos_token_ids": [],
    "default_sampling": {},
    "dtype": "float32",
    "device": "cpu",
    "load_format": "oracle",
    "seed": 0,
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "max_model_len": 64,
    "max_model_len_is_explicit": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "scheduling_policy": "fcfs",
    "max_queued_requests": 10_000,
    "max_queued_tokens": 1_000_000,
    "block_size": 4,
    "num_gpu_blocks_override": 16,
    "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None,
    "torch_profiler_dir": None,
    "log_stats": False,
    "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs",
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., EngineConfig]:
    """`make_config(**changes)`"""

    def make(**changes: Any) -> EngineConfig:
        return EngineConfig(**(DEFAULTS | changes))

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `load_format="dummy"`: a Llama of 3 layers whose random weights speak byte-level BPE.

    300 token ids, the last of them without text; 0 ends, 1 is special too and may stand in text as <|tool|>.
    """
    folder = tmp_path_factory.mktemp("text-model")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(['{"name": "value", "number": 10}', "the wheel turns"] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder
