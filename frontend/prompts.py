"""The forms a prompt may have, and what makes one unfit. Nothing here tokenizes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..ipc.errors import RequestError
from .checks import is_unicode
from .names import nearest

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids, "prompt": text for the output}.

The mappings may have a "cache_salt": prompts share cached prefixes only with those of the same salt. Other
keys of vLLM's may be there with nothing in them.
"""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_MAX_SALT = 1024
_LIMIT = 'a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}'


class ParsedPrompt(NamedTuple):
    """A prompt as text, as token ids, or both."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str = ""


def parse_prompt(prompt: object) -> ParsedPrompt:
    """Raises RequestError for anything but a `Prompt`."""
    if isinstance(prompt, str):
        return ParsedPrompt(_text(prompt), None)
    if isinstance(prompt, (list, tuple)):
        return ParsedPrompt(None, _token_ids(prompt))
    if not isinstance(prompt, Mapping):
        raise _refusal("prompt", type(prompt).__name__, f"prompt must be {_LIMIT}, got {prompt!r:.100}")
    for key, value in prompt.items():
        if key not in _KEYS and value is not None and not (isinstance(value, Mapping) and not value):
            message = f"prompt: key {key!r} is not supported{nearest(str(key), _KEYS)}; it must be {_LIMIT}"
            raise _refusal(str(key), value, message)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise _refusal("prompt", text, f'prompt: {{"prompt": ...}} must be a string, got {text!r:.100}')
    if ids is not None and not isinstance(ids, (list, tuple)):
        message = f'prompt: {{"prompt_token_ids": ...}} must be a list of integers, got {ids!r:.100}'
        raise _refusal("prompt_token_ids", ids, message)
    if text is None and ids is None:
        raise _refusal("prompt", prompt, f"prompt must be {_LIMIT}, got {prompt!r:.100}")
    text = None if text is None else _text(text)
    return ParsedPrompt(text, None if ids is None else _token_ids(ids), _salt(prompt.get("cache_salt")))


def check_token_ids(ids: list[int], vocab_size: int, max_model_len: int) -> bytes:
    """The ids as int32 bytes. Raises RequestError: empty, too long, or out of the vocabulary."""
    if not ids:
        raise _refusal(
            "prompt", ids, "prompt: it is empty; at least 1 token is needed", limit="at least 1 token"
        )
    if len(ids) >= max_model_len:
        message = (
            f"prompt: its {len(ids)} tokens and at least 1 output token are longer than "
            f"max_model_len={max_model_len}"
        )
        raise _refusal("prompt", len(ids), message, limit=max_model_len - 1)
    lowest, highest = min(ids), max(ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        message = f"prompt: token id {wrong} is out of the vocabulary, [0, {vocab_size})"
        raise _refusal("prompt_token_ids", wrong, message, limit=f"[0, {vocab_size})")
    return array("i", ids).tobytes()


def _text(text: str) -> str:
    if not is_unicode(text):
        limit = "text without lone surrogates"
        raise _refusal("prompt", f"{text!a:.100}", f"prompt must be {limit}, got {text!a:.100}", limit)
    return text


def _salt(salt: object) -> str:
    if salt is None:
        return ""
    limit = f"a string of 1 to {_MAX_SALT} characters, valid Unicode"
    if not isinstance(salt, str) or not 1 <= len(salt) <= _MAX_SALT or not is_unicode(salt):
        raise _refusal("cache_salt", salt, f"cache_salt must be {limit}, got {salt!r:.100}", limit)
    return salt


def _token_ids(ids: Sequence[Any]) -> list[int]:
    if not set(map(type, ids)) <= {int}:
        wrong = next(item for item in ids if type(item) is not int)
        message = f"prompt: token ids must be integers, got {wrong!r:.100}"
        raise _refusal("prompt_token_ids", wrong, message, limit="integers")
    return list(ids)


def _refusal(parameter: str, value: object, message: str, limit: object = _LIMIT) -> RequestError:
    return RequestError(message, parameter=parameter, value=f"{value!s:.100}", limit=limit)
