"""The workers as the engine sees them: brought up once, and started again whenever one of them fails.

A rank alone is of no use, so all go down together and come up together, with the KV cache of the first start.
What was running on them is the scheduler's to put back. Nothing here waits but `bring_up` and `close`.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo
from ..ipc.inspection import print_stacks
from ..ipc.logs import fields
from ..ipc.messages import Allocate, Command, CommandResult, Fatal, Loaded, Progress, StepPlan, StepResult
from ..ipc.pipe import wait
from .ranks import Ranks, WorkerError
from .watch import LOOK_SECONDS, Watch

LOGGER = logging.getLogger(__name__)

START_SECONDS = 600.0
"""A start, or an end, that takes longer has failed."""
MAX_RESTARTS = 3
"""In a row without progress; one more failure is the engine's end."""
_GRACE = 0.2
"""Seconds that a worker gets to end by itself: it may have something to say, but nothing to save."""
_STEADY_SECONDS = 60.0
"""Workers that served this long did not fail to start, even if nothing was asked of them."""
_BACKOFF = 1.0
"""Seconds by which the wait before a start grows with each failure in a row, from none after the first."""
_ENDING_MS, _STUCK_MS = 5, 1


class _State(Enum):
    ENDING = auto()
    STARTING = auto()
    SERVING = auto()


class Workers:
    """All ranks, life after life. `bring_up`, then `send` and `recv`; what these raise, `fail` answers."""

    def __init__(self, config: EngineConfig) -> None:
        self.num_restarts = 0
        self._config = config
        self._ranks: Ranks | None = None
        self._allocate: Allocate | None = None
        self._state = _State.STARTING
        self._since = time.monotonic()
        """When that state began."""
        self._is_stuck = False
        """A plan waits for room in a pipe."""
        self._has_answered = False
        """In this life."""
        self._num_due = 0
        """Plans without an answer."""
        self._num_busy = 0
        """Ranks that have not answered a command: it may take as long as a start."""
        self._asked_at = 0.0
        self._watch = Watch(config.hang_seconds, computes_on_cpu=config.device == "cpu")
        self._next_look = 0.0
        self._failures: list[WorkerError] = []
        """Those since there was progress."""

    def bring_up(
        self, size_cache: Callable[[Sequence[Loaded]], Allocate], progress: Callable[[Progress], None]
    ) -> Allocate:
        """The first start; returns when all ranks take plans. `size_cache` may raise, too."""
        self._ranks = ranks = Ranks(self._config, self._remember(size_cache), progress)
        self._enter(_State.STARTING)
        while not ranks.advance():
            left = self._since + START_SECONDS - time.monotonic()
            if left < 0:
                raise ranks.laggard()
            wait(ranks.descriptors(), left)
        self._enter(_State.SERVING)
        assert self._allocate is not None
        return self._allocate

    @property
    def are_serving(self) -> bool:
        """They take plans."""
        return self._state is _State.SERVING

    @property
    def trouble(self) -> str:
        """Why requests make no progress; empty when they do."""
        if self.are_serving:
            return "" if self._watch.verdict is None else self._watch.verdict.text
        seconds = time.monotonic() - self._since
        return f"the workers are {self._state.name.lower()} for {seconds:.1f} s, after {self._failures[-1]}"

    def descriptors(self) -> list[int]:
        """To poll for reading; they change with the workers' lives."""
        return [] if self._ranks is None or self._state is _State.ENDING else self._ranks.descriptors()

    @property
    def patience_ms(self) -> int:
        """How long to poll at most before `recv` is called again."""
        if self._state is _State.ENDING:
            return _ENDING_MS
        return _STUCK_MS if self._is_stuck else 1000

    def send(self, message: StepPlan | Command) -> None:
        """Give every rank a plan or a command; only while they serve."""
        assert self._ranks is not None
        self._ranks.send(message)
        self._is_stuck = not self._ranks.flush()
        if isinstance(message, StepPlan):
            self._num_due += 1
        else:
            self._num_busy = self._config.tensor_parallel_size
            self._asked_at = time.monotonic()

    def recv(self) -> StepResult | CommandResult | None:
        """The next result if it is there. While they do not serve: take the next step towards it."""
        if not self.are_serving:
            self._revive()
            return None
        assert self._ranks is not None
        if self._is_stuck:
            self._is_stuck = not self._ranks.flush()
        result = self._ranks.recv()
        if isinstance(result, StepResult):
            self._has_answered = True
            self._watch.answered()
            self._num_due -= 1
        elif isinstance(result, CommandResult):
            self._num_busy -= 1
        elif result is None:
            self._look()
        return result

    def _look(self) -> None:
        """About once a second: do they still work?"""
        assert self._ranks is not None
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        if self._num_busy and now - self._asked_at > START_SECONDS:
            raise self._ranks.failure(0, "took too long for a command")
        is_due = self._num_due > 0 and not self._num_busy
        self._watch.look(now, self._ranks.look(), is_due=is_due)
        if self._watch.has_hung and self._watch.verdict is not None:
            self._show_stacks(self._ranks.pids())
            verdict = self._watch.verdict
            raise self._ranks.failure(verdict.rank, f"hangs: {verdict.text}")

    def _show_stacks(self, pids: dict[int, int]) -> None:
        LOGGER.error("workers hang: stacks follow", extra=fields(core=os.getpid(), workers=pids))
        faulthandler.dump_traceback()
        for pid in pids.values():
            print_stacks(pid)

    def fail(self, error: WorkerError, *, progress: bool = False) -> None:
        """They are of no use any more because of `error`: take all down, for `recv` to start them again.

        `progress`: a request that crashed them was found. Raises the first cause after too many failures.
        """
        steady = self.are_serving and time.monotonic() - self._since > _STEADY_SECONDS
        if progress or steady or self._has_answered:
            self._failures.clear()
        self._failures.append(error)
        if len(self._failures) > MAX_RESTARTS:
            raise self._failures[0]
        LOGGER.error("workers failed: restarting", extra=fields(error=str(error)))
        if self._ranks is not None:
            self._ranks.hang_up()
        self._has_answered = self._is_stuck = False
        self._num_due = self._num_busy = 0
        self.num_restarts += 1
        self._enter(_State.ENDING)

    def close(self) -> None:
        """End all. Idempotent, never raises."""
        if self._ranks is not None:
            self._ranks.close(_GRACE)

    def _revive(self) -> None:
        ranks, seconds = self._ranks, time.monotonic() - self._since
        assert ranks is not None
        if self._state is _State.ENDING:
            if ranks.is_gone():
                # What failed at once may take a moment to pass: memory that another process still holds.
                if seconds >= (len(self._failures) - 1) * _BACKOFF:
                    ranks.close()
                    self._start_again()
            elif seconds > START_SECONDS:
                raise ranks.failure(0, "cannot be killed")
            elif seconds > _GRACE:
                ranks.kill()
        elif ranks.advance():
            self._enter(_State.SERVING)
            LOGGER.warning("workers serve again", extra=fields(start_seconds=round(seconds, 1)))
        elif seconds > START_SECONDS:
            raise ranks.laggard()

    def _start_again(self) -> None:
        """With as many KV blocks as before: requests were accepted because they fit into these."""
        self._enter(_State.STARTING)
        try:
            self._ranks = Ranks(self._config, lambda loaded: self._the_same(), _log_phase)
        except OSError as error:
            raise WorkerError(Fatal(None, "start", ErrorInfo.of(error))) from error

    def _remember(
        self, size_cache: Callable[[Sequence[Loaded]], Allocate]
    ) -> Callable[[Sequence[Loaded]], Allocate]:
        def size(loaded: Sequence[Loaded]) -> Allocate:
            self._allocate = size_cache(loaded)
            return self._allocate

        return size

    def _the_same(self) -> Allocate:
        assert self._allocate is not None
        return self._allocate

    def _enter(self, state: _State) -> None:
        self._state = state
        self._since = time.monotonic()
        if state is _State.SERVING:
            self._watch = Watch(self._config.hang_seconds, computes_on_cpu=self._config.device == "cpu")


def _log_phase(progress: Progress) -> None:
    LOGGER.info("starting", extra=fields(who=f"worker {progress.rank}", phase=progress.phase))
