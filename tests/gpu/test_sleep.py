"""A GPU engine gives its memory back when it sleeps, and says the same when it is awake again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from headrace import LLM, SamplingParams

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 1,
}


def answers(llm: LLM) -> list[list[int]]:
    prompts = [[3, 4, 5], [9] * 200, list(range(100))]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("eager", "ranks"),
    [(False, 1), (True, 1), pytest.param(False, 2, marks=pytest.mark.multi_gpu)],
)
def test_sleep_and_wake_up(tmp_path: Path, eager: bool, ranks: int) -> None:
    if ranks > torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with LLM(
        str(tmp_path),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=16,
        num_gpu_blocks_override=20_000,
        enforce_eager=eager,
        tensor_parallel_size=ranks,
        poison_blocks=True,
    ) as llm:
        before = answers(llm)
        checksums = llm.collective_rpc("weights_checksum")
        awake = llm.collective_rpc("memory_stats")[0]
        for level in (1, 2, 1):
            llm.sleep(level)
            asleep = llm.collective_rpc("memory_stats")[0]
            # Of this process, not of the device: others may use that too. cuBLAS keeps workspaces.
            assert int(str(awake["reserved_bytes"])) > (1 << 30) // ranks
            assert int(str(asleep["reserved_bytes"])) < (1 << 27)
            llm.wake_up()
            assert llm.collective_rpc("weights_checksum") == checksums
            assert answers(llm) == before
            time.sleep(3)  # graphs are recorded again meanwhile
            assert answers(llm) == before
