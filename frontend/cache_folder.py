"""Where files are kept that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path

from ..ipc.errors import ConfigError


def cache_folder(name: str, parameter: str) -> Path:
    """`$XDG_CACHE_HOME/headrace/<name>`, or under `~/.cache` where that is not set (or not absolute).

    Raises ConfigError, about `parameter`, where there is no home either.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "headrace" / name
    except RuntimeError as error:
        message = f"{parameter}: there is no cache folder for {name!r}: {error}; set XDG_CACHE_HOME"
        raise ConfigError(message, parameter=parameter, value=name) from error
