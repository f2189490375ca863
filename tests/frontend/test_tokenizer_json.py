"""The tokenizer's file for grammars: found or written once, and right for every family of tokenizers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from headrace.frontend.detokenizer import DecoderFactory
from headrace.frontend.tokenizer import Tokenizer
from headrace.frontend.tokenizer_json import tokenizer_json
from headrace.ipc import grammars
from headrace.ipc.config import EngineConfig


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_s_own_file_is_taken(tokenizer_folder: Path, cache: Path) -> None:
    assert tokenizer_json(tokenizer_folder) == tokenizer_folder / "tokenizer.json"
    assert not cache.exists()


def vocabulary_and_merges(tokenizer: Tokenizer, folder: Path) -> Path:
    model = json.loads(tokenizer.backend.to_str())["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    return folder


def gguf_file(tokenizer: Tokenizer, path: Path, eos: int = 2) -> Path:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    model = json.loads(tokenizer.backend.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for _, i in vocabulary])
    writer.add_eos_token_id(eos)
    writer.add_tensor("t", np.zeros(1024, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("make", [vocabulary_and_merges, gguf_file])
def test_others_are_written_once(
    make: Callable[[Tokenizer, Path], Path], tokenizer: Tokenizer, tmp_path: Path, cache: Path
) -> None:
    source = make(tokenizer, tmp_path / "source")
    path = tokenizer_json(source)
    assert path is not None
    assert path.parent == cache / "headrace" / "tokenizers"
    text = "The mill's wheel; 水車 🎡"
    assert tokenizers.Tokenizer.from_file(str(path)).encode(text).ids == Tokenizer.load(source).encode(text)
    before = path.stat()
    assert tokenizer_json(source) == path
    assert path.stat() == before  # not again
    assert list(path.parent.iterdir()) == [path]  # and nothing beside it


def test_its_name_is_its_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokenizer_json(gguf_file(tokenizer, tmp_path / "a.gguf"))
    assert tokenizer_json(gguf_file(tokenizer, tmp_path / "b.gguf")) == first
    assert tokenizer_json(gguf_file(tokenizer, tmp_path / "a.gguf", eos=1)) != first


def test_where_nothing_can_be_written_grammars_are_refused_later(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert tokenizer_json(vocabulary_and_merges(tokenizer, tmp_path / "source")) is None
    assert "structured_outputs will be refused" in caplog.text


def test_every_family_of_tokenizers_writes_what_the_grammar_says(
    any_tokenizer: Tokenizer, make_config: Callable[..., EngineConfig], tmp_path: Path
) -> None:
    """Random walks through the vocabulary, their text as a stream shows it."""
    path = tmp_path / "tokenizer.json"
    any_tokenizer.backend.save(str(path))
    size, end = len(any_tokenizer) + 5, len(any_tokenizer) - 1
    config = make_config(tokenizer_json=str(path), vocab_size=size, eos_token_ids=[end])
    if any_tokenizer.backend.get_vocab().get("##s") is not None:
        with pytest.raises(ValueError, match="decoder"):
            grammars.read_vocabulary(config)
        return
    vocabulary = grammars.read_vocabulary(config)
    pattern = r"[水é🎡](the |mill wheels|水|é|🎡|\n){3,9}!"
    matcher = grammars.new_matcher(vocabulary, f"start: /{pattern}/\n")
    rng, mask = random.Random(2), np.zeros(-(-size // 32), np.int32)
    for _ in range(20):
        walk, tokens = matcher.deep_copy(), list[int]()
        while not walk.is_stopped():
            grammars.fill_mask(walk, mask)
            choices: Any = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            tokens.append(int(rng.choice(choices)))
            walk.consume_token(tokens[-1])
            grammars.check(walk)
        decoder = DecoderFactory(any_tokenizer)(True)
        text = "".join(decoder.push((token,)) for token in tokens) + decoder.finish()
        assert re.fullmatch(pattern, text), (text, tokens)
