"""The tokenizer that a GGUF file's metadata describes: byte-level BPE ("gpt2" in GGUF's words).

How text is split before the merges apply is `tokenizer.ggml.pre`, a name that llama.cpp's sources define.
transformers reads the same files but ignores that name: it splits off no digits for SmolLM, unlike the
model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ..ipc.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4
"""Token types: the first is special, the second only never split."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _gpt2_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def make() -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return make


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "llama-bpe": _split(_LLAMA3_SPLIT),
    "qwen2": _split(_QWEN2_SPLIT),
    "smollm": _gpt2_digits,
}


def tokenizer_from_gguf(path: Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build it from a GGUF header's metadata. Raises ConfigError naming what is missing or unknown."""
    _expect(path, metadata, "tokenizer.ggml.model", ["gpt2"])
    pre = metadata.setdefault("tokenizer.ggml.pre", "default")
    _expect(path, metadata, "tokenizer.ggml.pre", list(_PRE_TOKENIZERS))
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3's vocabulary holds words that no chain of merges reaches.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, of_kind in zip(tokens, kinds, strict=False)
                if of_kind == kind
            ]
        )
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = bos_template(tokens[bos], bos)
    return backend


def bos_template(token: str, token_id: int) -> processors.PostProcessor:
    """Puts the beginning-of-sequence token in front."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, token_id)]
    )


def _expect(path: Path, metadata: dict[str, Any], key: str, known: list[str]) -> None:
    value = metadata.get(key)
    if value not in known:
        limit = ", ".join(known)
        message = f"tokenizer: {str(path)!r} has {key}={value!r}; known are {limit}"
        raise ConfigError(message, parameter="tokenizer", value=value, limit=limit)
