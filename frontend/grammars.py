"""Grammars: has constraints checked in a process of its own, which is killed when that takes too long.

One process, started at the first request that needs it and restarted after it was killed; what passed is
remembered, and so is what did not. Neither the event loop nor the engine ever waits for what somebody wrote.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from ..ipc.config import EngineConfig
from ..ipc.errors import OverloadedError, RequestError
from ..ipc.grammar_messages import CheckedGrammar, CheckerReady, CheckGrammar, FromChecker
from ..ipc.payloads import CheckerStart
from ..ipc.pipe import Pipe, PipeClosedError, socket_pair
from ..ipc.process import Child, spawn
from .structured_outputs import StructuredOutputsParams

CHECK_SECONDS = 1.5
"""A check that lasts longer is given up. Most take a few milliseconds."""
_START_SECONDS = 60.0
_REMEMBERED = 8 << 20
"""Characters of constraints and grammars."""
_MAX_WAITING = 256


class Grammars:
    """Turns the `structured_outputs` of requests into grammars, for one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._known = _Memory(_REMEMBERED)
        self._checker = _Checker(config)
        self._thread = ThreadPoolExecutor(1, "headrace-grammars")
        self._num_waiting = 0

    async def grammar(self, params: StructuredOutputsParams) -> str:
        """The grammar for `Sampling.grammar`. Raises RequestError."""
        asked = params.to_check(self._config.structured_outputs_config)
        obstacle = self._config.why_no_grammars()
        if obstacle is not None:
            raise _refusal(obstacle, params)
        found = self._known.get(asked)
        if found is None:
            found = await self._check(asked)
        if found.error:
            raise _refusal(found.error, params)
        return found.grammar

    async def _check(self, asked: CheckGrammar) -> CheckedGrammar:
        if self._num_waiting >= _MAX_WAITING:
            message = (
                f"structured_outputs: {_MAX_WAITING} other requests wait for their grammars to be checked"
            )
            raise OverloadedError(
                message, retry_after=1.0, parameter="structured_outputs", limit=_MAX_WAITING
            )
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._check_here, asked)
        finally:
            self._num_waiting -= 1

    def _check_here(self, asked: CheckGrammar) -> CheckedGrammar:
        """On the thread; those that waited behind the same constraint find it known."""
        found = self._known.get(asked)
        if found is None:
            try:
                found = self._checker.check(asked)
            except _CheckerFailedError as error:
                return CheckedGrammar(error=str(error))  # on a quieter machine it may pass
            self._known.put(asked, found)
        return found

    def close(self) -> None:
        """End the process; checks under way and to come are refused. Idempotent."""
        self._checker.close()
        self._thread.shutdown()  # at once: nothing that is asked of a closed checker takes time
        self._checker.end()


class _CheckerFailedError(Exception):
    """A check without an answer."""


class _Checker:
    """The process. For one thread, but for `close`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self.is_closed = False
        self._child: Child | None = None
        self._pipe: Pipe[CheckGrammar, FromChecker]
        self._ready = False

    def check(self, asked: CheckGrammar) -> CheckedGrammar:
        """The process's answer. Raises _CheckerFailedError when there is none, in time or at all."""
        if self._child is None:
            self._spawn()
        try:
            if not self._ready:
                self._await_ready()
            self._pipe.send(asked)
            answer = self._pipe.recv(CHECK_SECONDS)
        except PipeClosedError:
            self.end()
            raise _CheckerFailedError(
                "checking it ended the process that did, for want of memory it seems"
            ) from None
        if not isinstance(answer, CheckedGrammar):
            self.end()
            self._spawn()  # the next finds it warm
            raise _CheckerFailedError(f"checking it lasted longer than {CHECK_SECONDS:g} s")
        return answer

    def close(self) -> None:
        """End what runs, and let nothing follow; `end` remains to be called."""
        with self._lock:
            self.is_closed = True
            if self._child is not None:
                self._child.stop(grace=0)

    def _spawn(self) -> None:
        with self._lock:
            if self.is_closed:
                raise _CheckerFailedError("the engine was shut down")
            ours, theirs = socket_pair()
            with theirs:
                start = CheckerStart(self._config, theirs.fileno())
                entry = "headrace.frontend.grammar_checker:run"
                self._child = spawn("grammar checker", entry, start, pass_fds=[theirs.fileno()])
            self._pipe = Pipe(ours, FromChecker)
            self._ready = False

    def _await_ready(self) -> None:
        message = self._pipe.recv(_START_SECONDS)
        error = message.error if isinstance(message, CheckerReady) else "the grammar checker did not start"
        if error:
            self.end()
            raise _CheckerFailedError(error)
        self._ready = True

    def end(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            if self._child is not None:
                self._child.stop(grace=0)
                self._pipe.close()
                self._child = None


class _Memory:
    """What was answered lately, for any thread."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._left = size
        self._answers: OrderedDict[CheckGrammar, CheckedGrammar] = OrderedDict()

    def get(self, asked: CheckGrammar) -> CheckedGrammar | None:
        with self._lock:
            answer = self._answers.get(asked)
            if answer is not None:
                self._answers.move_to_end(asked)
            return answer

    def __len__(self) -> int:
        return len(self._answers)

    def put(self, asked: CheckGrammar, answer: CheckedGrammar) -> None:
        with self._lock:
            self._answers[asked] = answer
            self._left -= _size(asked, answer)
            while self._left < 0:
                self._left += _size(*self._answers.popitem(last=False))


def _size(asked: CheckGrammar, answer: CheckedGrammar) -> int:
    return len(asked.text) + len(answer.grammar) + len(answer.error)


def _refusal(reason: str, params: StructuredOutputsParams) -> RequestError:
    return RequestError(
        f"structured_outputs: {reason}", parameter="structured_outputs", value=f"{params!r:.200}"
    )
