"""A frontend of a shared core, whose core dies again and again: it tries its requests when it is its turn.

The core's part is played by hand: what it is told in each of its lives is what the frontend knows of blame.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from headrace import AsyncEngineArgs, AsyncLLM, RequestCrashedError, SamplingParams
from headrace.frontend.engine_args import resolve
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    Call,
    EngineInfo,
    Finished,
    FinishReason,
    Hello,
    Reply,
    StepOutputs,
    Welcome,
    pack,
)
from headrace.ipc.sockets import ServerSocket

TIMEOUT = 60.0
QUIET_MS = 100
"""For what a frontend should not say after what it should."""
Args = Callable[..., AsyncEngineArgs]


class Lives:
    """Cores at one address, one after the other."""

    def __init__(self, args: AsyncEngineArgs, address: str) -> None:
        self.address = address
        self.has_begun = threading.Event()
        self._welcome = Welcome(PROTOCOL_VERSION, resolve(args), EngineInfo(2048, 2000, 1, "0"))

    def live(self, count: int, *, grants: bool, answers: bool = False) -> list[str]:
        """Until the frontend has come and said `count` things, and a moment more; returns what it said."""
        server, said, has_come = ServerSocket(self.address), list[str](), False
        self.has_begun.set()
        while server.sockets[0].poll(QUIET_MS if has_come and len(said) >= count else int(1000 * TIMEOUT)):
            received = server.recv()
            assert received is not None
            client, message = received
            if isinstance(message, Hello):
                has_come = True
                server.send(client, self._welcome)
            elif isinstance(message, Call):
                said.append(message.method)
                if grants:
                    server.send(client, Reply(message.call))
            elif isinstance(message, AddRequest):
                said.append("request")
                if answers:
                    ended = Finished(message.request, FinishReason.LENGTH)
                    server.send(client, StepOutputs(pack([message.request]), pack([42]), finished=[ended]))
        server.close()
        return said


@pytest.fixture
def lives(oracle_args: Args, tmp_path: Path) -> Lives:
    return Lives(oracle_args(), f"ipc://{tmp_path}/run/core")


def ask(lives: Lives, act: Callable[[], None]) -> list[int]:
    """The tokens of a request at the core there, while `act` plays that core."""

    async def run() -> list[int]:
        async with AsyncLLM(AsyncEngineArgs(engine_core_address=lives.address)) as engine:
            params = SamplingParams(max_tokens=1, ignore_eos=True)
            outputs = [o async for o in engine.generate({"prompt_token_ids": [1]}, params, "a")]
            return list(outputs[-1].outputs[0].token_ids)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        assert lives.has_begun.wait(TIMEOUT)
        return asyncio.run(asyncio.wait_for(run(), 2 * TIMEOUT))
    finally:
        thread.join()


def test_what_another_client_has_done_is_not_blamed_on_ours(lives: Lives) -> None:
    """Four deaths, all of another client's request: ours was there without its turn, or was not sent."""
    said: list[list[str]] = []

    def act() -> None:
        said.extend(lives.live(1, grants=False) for _ in range(4))
        said.append(lives.live(3, grants=True, answers=True))

    assert ask(lives, act) == [42]
    assert said == [
        ["request"],
        ["request"],  # the first replay, with all others
        ["take_turn"],  # and nothing more, for it is not granted
        ["take_turn"],
        ["take_turn", "request", "pass_turn"],
    ]


def test_what_was_tried_in_our_turn_is_the_cause(lives: Lives) -> None:
    said: list[list[str]] = []

    def act() -> None:
        said.extend(lives.live(count, grants=True) for count in (1, 1, 2, 0))

    with pytest.raises(RequestCrashedError):
        ask(lives, act)
    assert said == [
        ["request"],
        ["request"],
        ["take_turn", "request"],
        [],
    ]  # the last one shows that they died
