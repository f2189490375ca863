"""The clients of the core, and the share of each in a step's outputs. No sockets here."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from operator import itemgetter

from ..ipc.messages import ClientStats, Finished, Logprobs, PromptLogprobs, Started, StepOutputs, pack
from .logprobs import put_together
from .request import Phase, Request
from .steps import Outputs

_MAX_NAME = 100


def shown_name(name: str) -> str:
    """What a client calls itself, fit for a log or a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME])


@dataclass(slots=True)
class Client:
    """A frontend that said Hello."""

    id: int
    name: str
    since: float
    """When it said so, `time.monotonic()`."""
    requests: dict[int, Request] = field(default_factory=dict)
    """Those that have not ended."""
    complained: bool = False
    """It sent something unreadable, which is logged once."""
    generation_tokens: int = 0

    def stats(self, now: float) -> ClientStats:
        """Its share of the engine."""
        running = [r for r in self.requests.values() if r.phase in (Phase.RUNNING, Phase.DRAINING)]
        return ClientStats(
            name=self.name,
            num_running=len(running),
            num_waiting=len(self.requests) - len(running),
            num_blocks=sum(len(request.block_table) for request in running),
            generation_tokens=self.generation_tokens,
            connected_seconds=now - self.since,
            id=self.id,
        )


@dataclass(slots=True)
class _Share:
    """One client's rows in the step's columns."""

    indices: list[int] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("i"))
    column: bytes = b""
    """`numbers` as they travel"""


class Splitter:
    """Makes each client's `StepOutputs`; who owns which row is remembered while the rows stay the same."""

    def __init__(self) -> None:
        self._rows: list[Request] | None = None
        self._shares: dict[bytes, _Share] = {}

    def split(self, outputs: Outputs) -> dict[bytes, StepOutputs]:
        """What to send to whom."""
        if outputs.rows is not self._rows:
            self._regroup(outputs.rows)
        started, finished = _by_client(outputs)
        prompts: dict[bytes, list[PromptLogprobs]] = {}
        for request, logprobs in outputs.prompt_logprobs:
            prompts.setdefault(request.client, []).append(PromptLogprobs(request.number, logprobs))
        alone = len(self._shares) == 1
        messages: dict[bytes, StepOutputs] = {}
        for client, share in self._shares.items():
            tokens = outputs.tokens.tobytes() if alone else _pick(outputs.tokens, share.indices)
            messages[client] = StepOutputs(
                share.column,
                tokens,
                started.pop(client, []),
                finished.pop(client, []),
                _logprobs(outputs, share) if outputs.logprobs else None,
                prompts.pop(client, []),
            )
        for client in started.keys() | finished.keys() | prompts.keys():  # news, but no token
            messages[client] = StepOutputs(
                b"",
                b"",
                started.get(client, []),
                finished.get(client, []),
                prompt_logprobs=prompts.get(client, []),
            )
        return messages

    def _regroup(self, rows: list[Request]) -> None:
        shares: dict[bytes, _Share] = {}
        for index, request in enumerate(rows):
            share = shares.get(request.client)
            if share is None:
                share = shares[request.client] = _Share()
            share.indices.append(index)
            share.numbers.append(request.number)
        for share in shares.values():
            share.column = share.numbers.tobytes()
        self._rows, self._shares = rows, shares


def _by_client(outputs: Outputs) -> tuple[dict[bytes, list[Started]], dict[bytes, list[Finished]]]:
    started: dict[bytes, list[Started]] = {}
    for request in outputs.started:
        news = Started(request.number, request.num_cached_tokens, request.queued_seconds)
        started.setdefault(request.client, []).append(news)
    finished: dict[bytes, list[Finished]] = {}
    for request, reason, stop, error in outputs.ended:
        finished.setdefault(request.client, []).append(Finished(request.number, reason, stop, error))
    return started, finished


def _logprobs(outputs: Outputs, share: _Share) -> Logprobs | None:
    found = ((place, outputs.logprobs.get(outputs.rows[i])) for place, i in enumerate(share.indices))
    return put_together({place: row for place, row in found if row is not None})


def _pick(tokens: array[int], indices: list[int]) -> bytes:
    picked = itemgetter(*indices)(tokens)  # one index gives the item itself
    return pack(picked if len(indices) > 1 else (picked,))
