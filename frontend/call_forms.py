"""How `AsyncLLM`'s methods may be called: positional forms, ids, and options that exist by name only."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from ..ipc.errors import RequestError
from .checks import refusal
from .sampling_params import SamplingParams


def tell_apart(args: Sequence[Any]) -> dict[str, Any]:
    """Names for the positional arguments of `generate`; None counts as not given."""
    match args:
        case ():
            names: tuple[str, ...] = ()
        case (str(),):
            names = ("request_id",)
        case (_,):
            names = ("prompt",)
        case (_, SamplingParams() | None):
            names = ("prompt", "sampling_params")
        case (str(), _):
            names = ("request_id", "prompt")
        case (_, _):
            names = ("prompt", "sampling_params")
        case (_, _, SamplingParams()):
            names = ("request_id", "prompt", "sampling_params")
        case (_, _, _):
            names = ("prompt", "sampling_params", "request_id")
        case _:
            raise TypeError(f"generate() takes at most 3 positional arguments, got {len(args)}")
    return {name: value for name, value in zip(names, args, strict=True) if value is not None}


def checked_id(request_id: object) -> str:
    if request_id is None:
        return f"req-{secrets.token_hex(8)}"
    if isinstance(request_id, str) and request_id:
        return request_id
    message = f"request_id must be a string of at least one character, got {request_id!r:.100}"
    raise RequestError(message, parameter="request_id", value=request_id, limit="a non-empty string")


def checked_prompt_text(text: object) -> str | None:
    """What outputs show as their prompt; None: the prompt itself."""
    if text is None or isinstance(text, str):
        return text
    raise refusal("prompt_text", text, "a string or None")


def refuse_set(options: dict[str, Any]) -> None:
    """vLLM's options of features that do not exist here may be passed, but not used."""
    for name, value in options.items():
        if name not in _UNSUPPORTED:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        if value is not None and not (isinstance(value, (int, Mapping)) and not value):
            message = f"{name} is not supported yet, got {value!r:.100}"
            raise RequestError(message, parameter=name, value=f"{value!s:.100}", limit=None)


_UNSUPPORTED = frozenset(
    {
        "data_parallel_rank",
        "lora_request",
        "mm_processor_kwargs",
        "reasoning_ended",
        "reasoning_parser_kwargs",
        "reset_connector",
        "tokenization_kwargs",
        "trace_headers",
    }
)
