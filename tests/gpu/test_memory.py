"""The KV cache's size beside a process that holds much of the GPU's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from headrace import LLM, SamplingParams
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.worker.cuda_runner import CudaRunner

GIB = 1 << 30
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 1,
}
"""A block of 16 tokens is 1 MiB: what the requests could use is more than the GPU has."""
HOLD = """
import sys, torch
held = torch.ones({0}, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def neighbour(num_bytes: int) -> Iterator[None]:
    """A process that holds so much of the GPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(num_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


@pytest.mark.parametrize("held", [0, 40 * GIB])
def test_the_cache_is_a_share_of_what_was_free(folder: Path, held: int) -> None:
    with neighbour(held):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        with LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            gpu_memory_utilization=0.6,
        ) as llm:
            used = free - torch.cuda.mem_get_info()[0]
            # A CUDA context and what recording graphs took come on top; torch keeps some of the largest step.
            assert 0.6 * free - 2 * GIB < used < 0.6 * free + 2 * GIB
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            outputs = llm.generate([[5] * 3000] * 3, params, use_tqdm=False)
            assert [len(output.outputs[0].token_ids) for output in outputs] == [20] * 3


def test_the_error_shows_the_arithmetic(folder: Path, gpu_config: Callable[..., EngineConfig]) -> None:
    config = gpu_config(folder, load_format="dummy", kv_cache_memory_bytes=None, gpu_memory_utilization=0.001)
    with pytest.raises(
        ConfigError, match=r"gpu_memory_utilization=0\.001 of the .* GiB that were free"
    ) as caught:
        CudaRunner(config, 0, "").load(lambda phase: None)
    assert caught.value.parameter == "gpu_memory_utilization"
