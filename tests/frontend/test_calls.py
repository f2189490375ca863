"""What a client has asked its core: answered, asked again when cores are lost, and ended with an error."""

from __future__ import annotations

import asyncio

import pytest
from headrace import EngineDeadError, RequestCrashedError
from headrace.frontend.calls import PendingCall, PendingCalls
from headrace.ipc.messages import Reply


def test_a_call_is_asked_again_but_not_for_ever() -> None:
    async def main() -> None:
        calls = PendingCalls()
        lost, answered = calls.begin("stats", {}), calls.begin("ping", {})
        reply = Reply(answered.message.call)
        calls.answer(reply)
        assert not calls.have_lost_cores
        calls.lose_core(1, "killed")
        assert calls.have_lost_cores
        assert calls.unanswered() == [lost.message]
        assert not lost.reply.done()
        calls.lose_core(1, "killed again")
        with pytest.raises(RequestCrashedError, match=r"2 engine cores were lost .*: killed again"):
            await lost.reply
        assert await answered.reply is reply
        for call in (lost, answered):
            calls.end(call)
        assert not calls.have_lost_cores

    asyncio.run(main())


def test_the_end_reaches_all_whose_loop_runs() -> None:
    calls = PendingCalls()

    async def begin() -> PendingCall:
        return calls.begin("stats", {})

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()

    async def main() -> None:
        call = calls.begin("ping", {})
        calls.fail_all("gone")
        with pytest.raises(EngineDeadError, match="gone"):
            await call.reply
        assert calls.unanswered() == []

    asyncio.run(main())
