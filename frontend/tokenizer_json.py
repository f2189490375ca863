"""The tokenizer as one JSON file of the `tokenizers` package: what grammars are matched with.

A folder's own file where it has one. Others are written once into the user's cache folder, under a name made
of what they were made from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from .. import __version__
from ..ipc.gguf import read_gguf_header
from .cache_folder import cache_folder
from .tokenizer import Tokenizer

logger = logging.getLogger("headrace")

_SOURCES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def tokenizer_json(path: Path) -> Path | None:
    """The file for the tokenizer of a folder or GGUF file; None, and a warning, when it cannot be written.

    Raises ConfigError when there is no such tokenizer.
    """
    own = path / "tokenizer.json"
    if own.is_file():
        return own
    try:
        target = cache_folder("tokenizers", "tokenizer") / f"{_key(path)}.json"
        if not target.is_file():
            _write(target, Tokenizer.load(path).backend.to_str())
        return target
    except OSError as error:
        logger.warning("structured_outputs will be refused: cannot write the tokenizer's file: %s", error)
        return None


def _key(path: Path) -> str:
    digest = hashlib.sha256(__version__.encode())
    if path.is_file():
        # The metadata end where the first tensor begins.
        tensors = read_gguf_header(path).tensors.values()
        with path.open("rb") as file:
            digest.update(file.read(min((each.offset for each in tensors), default=-1)))
    else:
        for name in _SOURCES:
            if (path / name).is_file():
                digest.update(name.encode() + b"\0" + (path / name).read_bytes())
    return digest.hexdigest()[:32]


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=".part-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).replace(target)  # others see the whole file or none
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
