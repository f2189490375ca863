"""A byte-level BPE tokenizer of any size, for models that are only a config.json: its words are made up.

Structured output needs a vocabulary of real size and shape: bytes, runs of JSON's punctuation, words with and
without a space before them.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_STARTS = (
    '"',
    '",',
    '":',
    '"},',
    '"],',
    ' "',
    "{",
    '{"',
    "[{",
    '["',
    "},",
    "}]",
    "  ",
    "\n",
    "\n\n",
    "://",
    "00",
)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write `folder`/tokenizer.json with this many tokens, of which the last is special."""
    rng = random.Random(0)
    space = pre_tokenizers.ByteLevel.alphabet()
    letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLU"
    vocab = {byte: number for number, byte in enumerate(sorted(space))}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> str:
        if left + right not in vocab and len(vocab) < vocab_size - 1:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
        return left + right

    for text in _STARTS:
        whole = text[0].replace(" ", "Ġ").replace("\n", "Ċ")
        for character in text[1:].replace(" ", "Ġ").replace("\n", "Ċ"):
            whole = merge(whole, character)
    for first in "0123456789":
        for second in "0123456789":
            two = merge(first, second)
            for third in "0123456789":
                merge(two, third)
    words = ["Ġ", *letters]
    while len(vocab) < vocab_size - 1:
        left, right = rng.choice(words), rng.choice(letters)
        if len(left) < 12 and left + right not in vocab:
            words.append(merge(left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
