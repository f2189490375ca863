"""A tokenizer trained on the spot, so that no test needs a model's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from headrace.frontend.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, 1234 times in 2026.",
    "Ein Müller mahlt Getreide; das Wasser läuft über das Rad. 水車は川の水で回る。🎡🎡👩‍👩‍👧",
    "def mill(wheel):\n    return wheel.turn(water=1.5)  # steady",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json (byte-level BPE, 400 tokens) and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_tokens([tokenizers.AddedToken("wide  gap", special=False, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def byte_level(
    *, normalizer: normalizers.Normalizer | None, split: str | None, special: list[str]
) -> Tokenizer:
    """Byte-level BPE; `split` is a pattern that words are cut by, None GPT-2's own."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=split is not None))
    if normalizer is not None:
        backend.normalizer = normalizer
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    words = [] if split is None else [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*words, own])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.add_special_tokens(special)
    return Tokenizer(backend, eos_token=special[-1])


def sentencepiece(*, strips: bool) -> Tokenizer:
    """One that decodes as SentencePiece models do: "▁" for spaces, byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁mill", "wheel", "s", "é", "水", "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def spm_tokenizer() -> Tokenizer:
    return sentencepiece(strips=True)


WORDS = r"(?i:'s|'t)|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


@pytest.fixture(
    scope="session", params=["gpt2", "llama3", "qwen", "llama2", "sentencepiece, unstripped", "wordpiece"]
)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One of each family that decodes in a way of its own."""
    match request.param:
        case "gpt2":
            return byte_level(normalizer=None, split=None, special=["</s>"])
        case "llama3":
            return byte_level(normalizer=None, split=WORDS, special=["<|begin_of_text|>", "<|eot_id|>"])
        case "qwen":
            return byte_level(normalizer=normalizers.NFC(), split=WORDS, special=["<|im_end|>"])
        case "llama2":
            return sentencepiece(strips=True)
        case "sentencepiece, unstripped":
            return sentencepiece(strips=False)
    pieces = ["[UNK]", "the", "mill", "##s", "##wheel", ",", "."]
    backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)
