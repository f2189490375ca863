"""The daemon's log: one line for each event, for people or for programs.

A record's message names the event; what varies goes into fields: `LOGGER.info("client left",
extra=fields(client=name, requests=3))`. What clients sent is quoted, so that nobody can forge a line.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]


def fields(**values: object) -> dict[str, Any]:
    """The `extra` of a log call."""
    return {"fields": values}


def configure(log_format: LogFormat, level: int) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "fields", {})
    return found


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        words = [_time_of(record), f"{record.levelname:<7}", record.getMessage().replace("\n", "\\n")]
        words += [f"{name}={_shown(value)}" for name, value in _fields_of(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _shown(value: object) -> str:
    """Bare where that is unambiguous, else quoted and escaped."""
    text = value if isinstance(value, str) else f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and not set(text) & set(' "=') and text else json.dumps(text)
