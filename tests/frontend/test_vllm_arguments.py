"""Engine arguments as programs for vLLM give them: those that ask for nothing change nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from headrace import AsyncEngineArgs, ConfigError
from headrace.frontend.engine_args import FIELDS, resolve
from headrace.frontend.vllm_arguments import NEUTRAL

TAKEN_FOR_GRANTED: dict[str, Any] = {
    "tokenizer_mode": "auto",
    "trust_remote_code": True,
    "revision": None,
    "quantization": None,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "distributed_executor_backend": "mp",
    "kv_cache_dtype": "auto",
    "enable_lora": False,
    "enable_log_requests": False,
    "enable_sleep_mode": True,
    "async_scheduling": True,
    "compilation_config": {},
    "speculative_config": None,
    # ours, in vLLM's words for "as you like"
    "max_model_len": -1,
    "max_num_seqs": None,
    "block_size": None,
    "enable_prefix_caching": None,
    "enable_chunked_prefill": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_asks_for_nothing_changes_nothing(folder: Path) -> None:
    plain: dict[str, Any] = {"model": str(folder), "load_format": "oracle", "skip_tokenizer_init": True}
    assert resolve(AsyncEngineArgs(**plain, **TAKEN_FOR_GRANTED)) == resolve(AsyncEngineArgs(**plain))
    also: dict[str, Any] = {**plain, "max_model_len": "auto", "cpu_offload_gb": 0.0}
    assert resolve(AsyncEngineArgs(**also)) == resolve(AsyncEngineArgs(**plain))


class Dtype:
    """As torch shows its own."""

    def __str__(self) -> str:
        return "torch.float16"


def test_other_forms_of_our_own_arguments() -> None:
    given: dict[str, Any] = {"dtype": Dtype(), "served_model_name": ["one"], "max_model_len": -1}
    assert AsyncEngineArgs(**given) == AsyncEngineArgs(dtype="float16", served_model_name="one")
    wrong: dict[str, Any] = {"served_model_name": ["a", "b"], "max_model_len": -2, "dtype": "torch.int8"}
    for name, value in wrong.items():
        one: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match=f"^{name} must be "):
            resolve(AsyncEngineArgs(**one))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"),
        ("kv_cache_dtype", "fp8"),
        ("pipeline_parallel_size", 2),
        ("pipeline_parallel_size", True),
        ("data_parallel_size", 2),
        ("distributed_executor_backend", "ray"),
        ("enable_lora", True),
        ("enable_lora", 0),
        ("cpu_offload_gb", 4),
        ("cpu_offload_gb", False),
        ("revision", "main"),
        ("speculative_config", {"method": "ngram"}),
        ("compilation_config", {"level": 3}),
        ("tokenizer_mode", "mistral"),
    ],
)
def test_what_is_not_here_is_refused_with_the_reason(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is not supported: .* it must be ") as caught:
        AsyncEngineArgs(**{name: value})
    assert caught.value.parameter == name
    assert caught.value.limit is not None


def test_a_parser_of_the_program_s_own(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    assert AsyncEngineArgs.add_cli_args(parser) is parser
    words = ["--model", str(folder), "--max-num-seqs", "3", "--trust-remote-code", "--port", "1"]
    given = parser.parse_args([*words, "--hf-overrides", '{"rope_theta": 5}'])
    expected = AsyncEngineArgs(model=str(folder), max_num_seqs=3, hf_overrides={"rope_theta": 5})
    assert AsyncEngineArgs.from_cli_args(given) == expected
    assert (given.port, given.seed, given.tokenizer, given.pipeline_parallel_size) == (1, 0, None, 1)
    del given.port
    assert AsyncEngineArgs(**vars(given)) == expected
    with pytest.raises(ConfigError, match="quantization is not supported"):
        AsyncEngineArgs.from_cli_args(parser.parse_args(["--quantization", "fp8"]))
    alone = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(), async_args_only=True)
    assert vars(alone.parse_args([])) == {}


def test_none_of_them_hides_an_argument_of_ours() -> None:
    assert not NEUTRAL.keys() & FIELDS.keys()
