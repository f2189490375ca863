"""Logprobs as OpenAI's two routes show them, and as vLLM shows those of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..logprobs import Logprob, LogprobsOnePosition, PromptLogprobs, SampleLogprobs
from ..tokenizer import Tokenizer

_LEAST = -9999.0
"""JSON has no infinity."""
_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class LogprobForms:
    """One request's way to show them.

    `top` is how many of the likeliest tokens are shown at each position, -1 for all. With `by_id` tokens are
    named "token_id:7", so that those which are no text can be told apart.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, by_id: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._by_id = by_id

    def chat(self, positions: SampleLogprobs) -> dict[str, Any]:
        """Of /v1/chat/completions."""
        content: list[dict[str, Any]] = []
        for position in positions:
            (token, chosen), *_ = position.items()
            likeliest = [self._entry(other, found) for other, found in self._likeliest(position)]
            content.append({**self._entry(token, chosen), "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def completion(
        self, positions: Iterable[LogprobsOnePosition | None], ids: list[int], offset: int
    ) -> dict[str, list[Any]]:
        """Of /v1/completions: columns. `offset` is where the first token begins in the choice's text.

        A prompt's first token has no position: nothing precedes it.
        """
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for position, token in zip(positions, ids, strict=True):
            text = self._text(token, None if position is None else position[token])
            columns["text_offset"].append(offset)
            columns["tokens"].append(self._name(token, text))
            offset += len(text)
            if position is None:
                columns["token_logprobs"].append(None)
                columns["top_logprobs"].append(None)
                continue
            columns["token_logprobs"].append(max(position[token].logprob, _LEAST))
            shown = [(token, position[token]), *self._likeliest(position)]
            columns["top_logprobs"].append(
                {self._name(t, self._text(t, found)): max(found.logprob, _LEAST) for t, found in shown}
            )
        return columns

    def prompt(self, positions: PromptLogprobs) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`."""
        return [None if position is None else _by_token(position) for position in positions]

    def _entry(self, token: int, found: Logprob) -> dict[str, Any]:
        name = self._name(token, self._text(token, found))
        return {"token": name, "logprob": max(found.logprob, _LEAST), "bytes": list(name.encode())}

    def _likeliest(self, position: LogprobsOnePosition) -> list[tuple[int, Logprob]]:
        ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
        return ranked if self._top < 0 else ranked[: self._top]

    def _name(self, token: int, text: str) -> str:
        return f"token_id:{token}" if self._by_id else text

    def _text(self, token: int, found: Logprob | None) -> str:
        if found is not None and found.decoded_token is not None:
            return found.decoded_token
        return self._tokenizer.decode(token)


def _by_token(position: LogprobsOnePosition) -> dict[str, Any]:
    return {
        str(token): {
            "logprob": max(found.logprob, _LEAST),
            "rank": found.rank,
            "decoded_token": found.decoded_token,
        }
        for token, found in position.items()
    }
