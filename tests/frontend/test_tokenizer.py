"""Tokenizer: the same ids and text as the `tokenizers` package alone gives, from every form of file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from headrace import ConfigError, RequestError
from headrace.frontend.chat_template import render
from headrace.frontend.gguf_tokenizer import tokenizer_from_gguf
from headrace.frontend.tokenizer import Tokenizer

SAMPLES = [
    "",
    "The quick brown fox",
    "  lots   of\n\n\n  white\tspace  \n ",
    "12345 6 78 1,000.50",
    "👩‍👩‍👧 水車 Müller",
    "<|im_start|>user\nhi<|im_end|>\nwide  gap",
    "\x00\ufffd\u200b",
]


def gguf_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What a GGUF file of this tokenizer says."""
    data = json.loads(tokenizer.backend.to_str())
    size = len(tokenizer)
    kinds = [1] * size
    tokens = [str(tokenizer.backend.id_to_token(i)) for i in range(size)]
    for added in data["added_tokens"]:
        kinds[added["id"]] = 3 if added["special"] else 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in data["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.mark.parametrize("text", SAMPLES)
def test_gguf_equals_the_tokenizer_it_was_made_from(tokenizer: Tokenizer, text: str) -> None:
    other = tokenizer_from_gguf(Path("x.gguf"), gguf_metadata(tokenizer, "gpt-2"))
    assert other.encode(text).ids == tokenizer.encode(text)
    assert other.decode(tokenizer.encode(text), skip_special_tokens=False) == tokenizer.decode(
        tokenizer.encode(text)
    )


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "in 1234", ["in", "Ġ1234"]),
        ("smollm", "in 12", ["in", "Ġ", "1", "2"]),
        ("qwen2", "in 12", ["in", "Ġ", "1", "2"]),
        ("llama-bpe", "in 1234", ["in", "Ġ", "123", "4"]),
        ("llama-bpe", "I'M a\n\n b", ["I", "'M", "Ġa", "ĊĊ", "Ġb"]),
    ],
)
def test_gguf_splits_before_merging(tokenizer: Tokenizer, pre: str, text: str, words: list[str]) -> None:
    backend = tokenizer_from_gguf(Path("x.gguf"), gguf_metadata(tokenizer, pre))
    assert backend.pre_tokenizer is not None
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_gguf_puts_the_first_token_in_front_when_told(tokenizer: Tokenizer) -> None:
    metadata = gguf_metadata(tokenizer, "gpt-2") | {"tokenizer.ggml.add_bos_token": True}
    assert tokenizer_from_gguf(Path("x.gguf"), metadata).encode("fox").ids == [1, *tokenizer.encode("fox")]


@pytest.mark.parametrize(
    ("key", "value"), [("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.pre", "kimi-k9")]
)
def test_gguf_of_an_unknown_kind_is_refused(tokenizer: Tokenizer, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        tokenizer_from_gguf(Path("x.gguf"), gguf_metadata(tokenizer, "gpt-2") | {key: value})


def test_vocab_and_merges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """GPT-2's and OPT's form; OPT puts its first token in front."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    config = {"bos_token": "<|end|>", "eos_token": "<|im_end|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    for text in ("The quick brown fox", "水車 <|im_end|>"):
        assert loaded.encode(text) == [0, *tokenizer.encode(text)]
        assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id) == (0, 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert Tokenizer.load(tmp_path).encode("The quick") == tokenizer.encode("The quick")


def test_names_and_sizes(tokenizer: Tokenizer) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token_id) == ("<|im_end|>", 2, None)
    assert tokenizer.all_special_ids == [0, 1, 2]
    assert len(tokenizer) == tokenizer.vocab_size + 1
    ids = tokenizer.encode("<|im_start|>fox")
    assert tokenizer.decode(ids) == "<|im_start|>fox"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox"
    assert tokenizer("fox")["input_ids"] == tokenizer.encode("fox") == tokenizer.encode_long("fox")


def test_several_at_once(tokenizer: Tokenizer) -> None:
    hi, fox = tokenizer.encode("hi"), tokenizer.encode("fox")
    assert tokenizer.batch_decode([hi, [2, *fox]], skip_special_tokens=True) == ["hi", "fox"]
    assert [tokenizer.convert_ids_to_tokens(2)] == tokenizer.convert_ids_to_tokens([2]) == ["<|im_end|>"]


def test_truncation_in_the_file_is_not_ours(tokenizer_folder: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("a b c d e")) > 2


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.model": "x"}, "save_pretrained"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "tokenizer_config.json"),
    ],
)
def test_unreadable_folder(
    files: dict[str, str | None], names: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for name, content in files.items():
        if content is None:
            shutil.copy(tokenizer_folder / name, tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=names):
        Tokenizer.load(tmp_path)


# --- chat templates --------------------------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}]


def test_chat_template(tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(HI, add_generation_prompt=True) == tokenizer.encode(text)
    assert tokenizer.apply_chat_template(HI, tokenize=False, return_tensors=None, padding=False) == text[:-22]
    for name, value in (("return_tensors", "pt"), ("return_dict", True), ("max_length", 3)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(RequestError, match=f"{name} is not supported"):
            tokenizer.apply_chat_template(HI, **options)


@pytest.mark.parametrize(
    ("trims", "content", "shown"),
    [
        (False, "well, ", "well, "),
        (True, "well, ", "well,"),
        (False, " a\n\n", " a\n\n"),
        (True, " a\n", "a"),
    ],
)
def test_continue_final_message(tokenizer: Tokenizer, trims: bool, content: str, shown: str) -> None:
    """As transformers does: what trails is kept if the template keeps it."""
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    template = tokenizer.chat_template or ""
    if trims:
        template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}|{% endfor %}"
    asked: dict[str, Any] = {"chat_template": template, "continue_final_message": True, "tokenize": False}
    text = tokenizer.apply_chat_template(messages, **asked)
    assert isinstance(text, str)
    assert text.endswith("<|im_start|>assistant\n" + shown)
    with pytest.raises(RequestError, match="continue_final_message"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": " "}], **asked)


def test_template_helpers() -> None:
    source = (
        "{%- for m in messages %}{% if m.skip %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}|{{ tools | tojson(indent=1) }}"
        "|{{ strftime_now('%Y') | length }}"
    )
    shown = render(source, [*HI, {"role": "x", "skip": 1}], tools=[{"a": "<é>"}])
    assert shown == 'hi|[\n {\n  "a": "<é>"\n }\n]|4'


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ raise_exception('roles must alternate') }}", HI),
        ("{{ messages.append(1) }}", HI),
        ("{{ ''.__class__.__mro__ }}", HI),
        ("{% if %}", HI),
        ("x", []),
        ("x", "hi"),
        ("x", [{"content": "no role"}]),
    ],
)
def test_template_refusals(source: str, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        render(source, messages)


def test_no_template(spm_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        spm_tokenizer.apply_chat_template(HI)
