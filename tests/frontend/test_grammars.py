"""The process that checks grammars: started once, killed when it hangs; the event loop never waits for it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from headrace import RequestError, StructuredOutputsParams
from headrace.frontend.grammars import CHECK_SECONDS, Grammars
from headrace.ipc.config import EngineConfig


@pytest.fixture
def make_grammars(
    make_config: Callable[..., EngineConfig], text_model: Path
) -> Iterator[Callable[..., Grammars]]:
    made: list[Grammars] = []

    def make(**changes: Any) -> Grammars:
        given = {
            "tokenizer_json": str(text_model / "tokenizer.json"),
            "vocab_size": 300,
            "eos_token_ids": [0],
        }
        made.append(Grammars(make_config(**({"load_format": "dummy"} | given | changes))))
        return made[-1]

    yield make
    for grammars in made:
        grammars.close()
    assert checkers() == []


def checkers() -> list[psutil.Process]:
    """The checking processes that this one started."""
    children = psutil.Process().children()
    return [each for each in children if "headrace.frontend.grammar_checker:run" in each.cmdline()]


def regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


def test_one_process_serves_all(make_grammars: Callable[..., Grammars]) -> None:
    grammars = make_grammars()
    assert checkers() == []  # none before the first request

    async def go() -> None:
        found = await asyncio.gather(*(grammars.grammar(regex(f"a{i % 3}")) for i in range(9)))
        assert len(set(found)) == 3
        (process,) = checkers()
        with pytest.raises(RequestError, match="unclosed group") as caught:
            await grammars.grammar(regex("("))
        assert caught.value.parameter == "structured_outputs"
        process.suspend()
        # What is known needs no process.
        assert await grammars.grammar(regex("a1")) == found[1]
        with pytest.raises(RequestError, match="unclosed group"):
            await grammars.grammar(regex("("))
        process.resume()

    asyncio.run(go())


def test_a_check_that_hangs_is_killed_and_others_go_on(make_grammars: Callable[..., Grammars]) -> None:
    grammars = make_grammars()

    async def go() -> None:
        await grammars.grammar(regex("a"))
        (process,) = checkers()
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        hung, late = asyncio.create_task(grammars.grammar(regex("b"))), grammars.grammar(regex("c"))
        beats = 0
        while not hung.done():
            beats += 1
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="longer than"):
            await hung
        assert CHECK_SECONDS <= time.monotonic() - start < 10  # it never ends by itself
        assert beats > 20  # the event loop was free
        assert not process.is_running()
        assert "c" in await late
        assert "b" in await grammars.grammar(regex("b"))  # it was not the expression's fault: not remembered

    asyncio.run(go())


def test_a_check_that_dies_is_an_error_of_its_request(make_grammars: Callable[..., Grammars]) -> None:
    grammars = make_grammars()

    async def go() -> None:
        await grammars.grammar(regex("a"))
        (process,) = checkers()
        os.kill(process.pid, signal.SIGSTOP)
        hung = asyncio.create_task(grammars.grammar(regex("b")))
        await asyncio.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="ended the process"):
            await hung
        assert "c" in await grammars.grammar(regex("c"))

    asyncio.run(go())


def test_closing_ends_a_check(make_grammars: Callable[..., Grammars]) -> None:
    grammars = make_grammars()

    async def go() -> None:
        await grammars.grammar(regex("a"))
        os.kill(checkers()[0].pid, signal.SIGSTOP)
        hung = asyncio.create_task(grammars.grammar(regex("b")))
        await asyncio.sleep(0.05)
        grammars.close()
        with pytest.raises(RequestError):
            await hung

    asyncio.run(go())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_format": "oracle"}, "the oracle"),
        ({"tokenizer_json": None}, "no tokenizer"),
        ({"eos_token_ids": []}, "no end-of-sequence token"),
        ({"tokenizer_json": "/nowhere/tokenizer.json"}, "/nowhere/tokenizer.json"),
        ({"vocab_size": 10}, "vocab size"),
    ],
)
def test_engines_that_cannot(
    make_grammars: Callable[..., Grammars], changes: dict[str, Any], reason: str
) -> None:
    grammars = make_grammars(**changes)
    with pytest.raises(RequestError, match=reason) as caught:
        asyncio.run(grammars.grammar(regex("a")))
    assert caught.value.parameter == "structured_outputs"


def test_too_many_that_wait_are_refused(
    make_grammars: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.frontend.grammars._MAX_WAITING", 3)
    grammars = make_grammars()

    async def go() -> list[Any]:
        asked = (grammars.grammar(regex(f"a{i}")) for i in range(5))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(go())
    assert [isinstance(each, RequestError) for each in found] == [False] * 3 + [True] * 2
    assert found[4].retry_after > 0


def test_what_is_remembered_is_bounded(
    make_grammars: Callable[..., Grammars], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.frontend.grammars._REMEMBERED", 1000)
    grammars = make_grammars()

    async def go() -> None:
        for i in range(30):
            await grammars.grammar(regex(f"{'a' * 100}{i}"))

    asyncio.run(go())
    assert 1 <= len(grammars._known) <= 5
