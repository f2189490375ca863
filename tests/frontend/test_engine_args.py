"""Engine arguments: one resolution, and an error that names the argument, the value and the limit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from headrace import AsyncEngineArgs, ConfigError, EngineArgs, StructuredOutputsConfig
from headrace.frontend.engine_args import check_attached, resolve
from headrace.ipc.config import EngineConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 500,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def resolved(folder: Path, **changes: Any) -> EngineConfig:
    args: dict[str, Any] = {"model": str(folder), "load_format": "oracle", "skip_tokenizer_init": True}
    return resolve(AsyncEngineArgs(**(args | changes)))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_defaults(folder: Path) -> None:
    config = resolved(folder)
    assert config.device == "cpu"
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.block_size) == (256, 2048, 16)
    assert (config.gpu_memory_utilization, config.seed, config.tensor_parallel_size) == (0.9, 0, 1)
    assert config.enable_prefix_caching
    assert config.enable_chunked_prefill
    assert (config.max_model_len, config.max_model_len_is_explicit) == (4096, False)
    assert resolved(folder, max_model_len=4096).max_model_len_is_explicit
    assert config.served_model_name == config.model == str(folder)
    assert config.dtype == "bfloat16"
    assert EngineArgs is AsyncEngineArgs


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3000}, 12000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500}, 4096),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 500}, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
        ({"rope_type": "linear", "factor": 1e308}, 4096),
        ({"rope_type": "linear", "factor": "twice"}, 4096),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_reach_farther(
    folder: Path, name: str, scaling: dict[str, Any], length: int
) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {name: scaling}))
    assert resolved(folder).max_model_len == length
    assert resolved(folder, max_model_len=length).max_model_len == length
    with pytest.raises(ConfigError, match=f"max_position_embeddings=4096.*{length}|=4096$") as caught:
        resolved(folder, max_model_len=length + 1)
    assert caught.value.limit == str(length)


@pytest.mark.parametrize(
    ("wanted", "stored", "dtype"),
    [
        ("auto", "float32", "bfloat16"),
        ("auto", "float16", "bfloat16"),
        ("auto", None, "bfloat16"),
        ("half", "float32", "float16"),
        ("float", "bfloat16", "float32"),
    ],
)
def test_dtype_on_a_cpu(folder: Path, wanted: str, stored: str | None, dtype: str) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"dtype": None, "torch_dtype": stored}))
    assert resolved(folder, dtype=wanted).dtype == dtype


def test_a_step_holds_the_longest_prompt_without_chunking(folder: Path) -> None:
    config = resolved(folder, enable_chunked_prefill=False)
    assert config.max_num_batched_tokens == 4096
    assert resolved(folder, enable_chunked_prefill=False, max_model_len=100).max_num_batched_tokens == 2048
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=100 .*4096"):
        resolved(folder, enable_chunked_prefill=False, max_num_batched_tokens=100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("dtype", "int4"),
        ("seed", -1),
        ("max_model_len", 0),
        ("max_model_len", 4097),
        ("max_model_len", "long"),
        ("max_num_seqs", 0),
        ("max_num_seqs", True),
        ("max_num_batched_tokens", 1.5),
        ("block_size", 24),
        ("block_size", 512),
        ("num_gpu_blocks_override", 0),
        ("gpu_memory_utilization", 1.1),
        ("gpu_memory_utilization", float("nan")),
        ("kv_cache_memory_bytes", -1),
        ("enable_prefix_caching", 1),
        ("enforce_eager", "no"),
        ("tensor_parallel_size", 0),
        ("load_format", "pt"),
        ("scheduling_policy", "lifo"),
        ("generation_config", "missing-folder"),
        ("tokenizer", "./missing"),
        ("hf_overrides", "yarn"),
        ("hf_overrides", {"rope_scaling": object()}),
        ("hf_overrides", lambda config: config),
        ("override_generation_config", [0.6]),
        ("override_generation_config", {"temperatur": 0.6}),
        ("override_generation_config", {"temperature": -1}),
        ("override_generation_config", {"top_k": "all"}),
        ("override_generation_config", {"eos_token_id": "</s>"}),
        ("structured_outputs_config", "guidance"),
        ("structured_outputs_config", {"backend": "xgrammar"}),
        ("structured_outputs_config", {"disable_any_whitespace": 1}),
        ("structured_outputs_config", {"reasoning_parser": "qwen3"}),
    ],
)
def test_bad_value_is_refused_by_name(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        resolved(folder, **{"skip_tokenizer_init": False, name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize("name", ["model", "tokenizer", "served_model_name"])
def test_names_of_other_bytes_than_utf_8_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be text in UTF-8, got") as refused:
        resolved(folder, **{name: f"{folder}/caf\udce9"})
    assert refused.value.parameter == name


def test_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        AsyncEngineArgs(max_num_seq=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (None, "config.json"),
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"vocab_size": 5}', "architectures"),
        ('{"architectures": ["LlamaForCausalLM"]}', "vocab_size"),
    ],
)
def test_bad_model_folder(tmp_path: Path, content: str | None, names: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=names) as caught:
        resolved(tmp_path)
    assert caught.value.parameter == "model"
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./nothing", "~nobody-of-that-name/model", "a b", "x/y/z", "model.gguf"]
)
def test_unknown_model(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot find") as caught:
        resolve(AsyncEngineArgs(model=name))
    assert caught.value.value == name
    assert "Hugging Face id" in str(caught.value.limit)


def test_weights_and_tokenizer_are_looked_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors"):
        resolved(folder, load_format="auto")
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        resolved(folder, skip_tokenizer_init=False)
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    config = resolved(folder, load_format="auto", skip_tokenizer_init=False)
    assert (config.load_format, config.tokenizer) == ("safetensors", str(folder))
    with pytest.raises(ConfigError, match="holds safetensors"):
        resolved(folder, load_format="gguf")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(ConfigError, match="not a readable GGUF file"):
        resolve(AsyncEngineArgs(model=str(file)))
    other = tmp_path / "model.bin"
    other.touch()
    with pytest.raises(ConfigError, match=r"a folder or a \.gguf file"):
        resolve(AsyncEngineArgs(model=str(other)))


def test_generation_config(folder: Path) -> None:
    given = {"eos_token_id": [7, 2], "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(given))
    config = resolved(folder)
    assert config.eos_token_ids == [2, 7]
    assert config.default_sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    ignored = resolved(folder, generation_config="vllm")
    assert (ignored.eos_token_ids, ignored.default_sampling) == ([2], {})
    other = folder / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"top_p": 0.5}')
    assert resolved(folder, generation_config=str(other)).default_sampling == {"top_p": 0.5}


def test_overrides_of_the_generation_config(folder: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "eos_token_id": [2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(given))
    config = resolved(folder, override_generation_config={"top_k": None, "min_p": 0.1, "eos_token_id": 5})
    assert config.default_sampling == {"temperature": 0.6, "min_p": 0.1}
    assert config.eos_token_ids == [2, 5]
    own = resolved(folder, generation_config="vllm", override_generation_config={"max_new_tokens": 9})
    assert own.default_sampling == {"max_tokens": 9}


def test_overrides_of_the_model_config(folder: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    for stored in ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}):
        (folder / "config.json").write_text(json.dumps(LLAMA | stored))
        config = resolved(folder, hf_overrides={"rope_scaling": yarn, "vocab_size": 400})
        assert (config.vocab_size, config.max_model_len) == (400, 4 * 4096)
        assert (config.hf_config["rope_scaling"], config.hf_config["rope_theta"]) == (yarn, 1e6)
        assert "rope_parameters" not in config.hf_config
    (folder / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": yarn}))
    plain = resolved(folder, hf_overrides={"rope_parameters": {"rope_type": "default"}})
    assert plain.max_model_len == 4096
    assert "rope_scaling" not in plain.hf_config


def test_structured_outputs_as_dict_or_object(folder: Path) -> None:
    wanted = StructuredOutputsConfig(backend="guidance", disable_any_whitespace=True)
    assert resolved(folder, structured_outputs_config=wanted).structured_outputs_config == wanted
    said = {"backend": "guidance", "disable_any_whitespace": True, "disable_fallback": False}
    assert resolved(folder, structured_outputs_config=said).structured_outputs_config == wanted
    assert resolved(folder).structured_outputs_config == StructuredOutputsConfig()


def test_resolving_changes_nothing(folder: Path) -> None:
    args = AsyncEngineArgs(model=str(folder), load_format="oracle", skip_tokenizer_init=True)
    before = dataclasses.asdict(args)
    resolve(args)
    assert dataclasses.asdict(args) == before


def test_an_attached_core_is_not_contradicted(folder: Path) -> None:
    tight = {"disable_any_whitespace": True}
    config = resolved(
        folder,
        served_model_name="mill",
        dtype="half",
        disable_log_stats=True,
        structured_outputs_config=tight,
        hf_overrides={"vocab_size": 400},
        override_generation_config={"temperature": 0.5, "top_k": 9},
    )

    def check(**given: Any) -> None:
        check_attached(AsyncEngineArgs(engine_core_address="ipc:///x", **given), config)

    check()
    check(model="mill", structured_outputs_config=tight)
    check(model=str(folder), dtype="float16")
    check(disable_log_stats=True, skip_tokenizer_init=True)
    check(hf_overrides={"vocab_size": 400}, override_generation_config={"top_k": 9})
    check(override_generation_config={"top_p": None, "eos_token_id": 2})
    with pytest.raises(ConfigError, match="hf_overrides"):
        check(hf_overrides={"vocab_size": 500})
    for said in ({"top_k": 8}, {"top_k": None}, {"top_p": 0.5}, {"eos_token_id": [2, 3]}):
        with pytest.raises(ConfigError, match="override_generation_config"):
            check(override_generation_config=said)
    other = ("structured_outputs_config", {"backend": "auto"})
    for name, value in (("model", "other"), ("block_size", 32), ("dtype", "float32"), ("seed", 4), other):
        with pytest.raises(ConfigError, match=name):
            check(**{name: value})
