"""Where Triton cannot be installed (it has wheels for few platforms), models run on CPUs all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from headrace import LLM, SamplingParams

from .tiny_llama import tiny_llama


def tokens(folder: Path) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(folder), skip_tokenizer_init=True, dtype="float32", num_gpu_blocks_override=64) as llm:
        outputs = llm.generate([[5, 6, 7], [8] * 40], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_worker_does_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, missing = tmp_path / "model", tmp_path / "missing"
    tiny_llama().save_pretrained(model)
    expected = tokens(model)
    missing.mkdir()
    (missing / "triton.py").write_text("raise ImportError('not for this platform')")
    monkeypatch.setenv("PYTHONPATH", str(missing), prepend=os.pathsep)
    assert tokens(model) == expected
