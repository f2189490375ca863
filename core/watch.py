"""Tells workers that hang from a step that takes long. No clock of its own.

A thread of the worker's that says "I am here" would prove nothing: it speaks while the computation hangs.
What counts is that a step is answered. While none is, workers on CPUs may go on for long, as a large prefill
does; they are alive as long as they use their CPUs. A GPU's step takes seconds at most, and its driver waits
by spinning, so there only the answer counts, and that a rank begins or ends to compile a kernel: the others
may have to wait for it. A stopped process makes no progress whatever it has to do. Of several ranks the one
that is behind the others is to blame: they wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..ipc.inspection import STOPPED, Activity

LOOK_SECONDS = 1.0
BUSY_SECONDS = 600.0
"""A step with signs of life may take so long: large models on CPUs prefill some tokens a second."""
COMPILE_SECONDS = 120.0
"""So long a kernel may be compiled: a second on most hosts, ten on busy ones."""
SUSPICIOUS_SECONDS = 3.0
_BUSY = 0.1
"""CPU seconds in a second that are a sign of life."""


class Verdict(NamedTuple):
    """Seconds without a sign of progress, and whose fault that is."""

    seconds: float
    rank: int | None
    """None: no rank more than the others."""
    text: str


class Compilation(NamedTuple):
    """What a rank said last of its kernels."""

    kernel: str
    """Empty: it is compiled, and nothing else is."""
    since: float
    begun: float = 0.0
    """When `kernel` was named first, of several times in a row."""


class Sight(NamedTuple):
    """A rank at one moment."""

    activity: Activity
    compilation: Compilation
    distance: int
    """How far it has come, in units that only compare with the other ranks'."""


class Watch:
    """Watches one life of the workers; `look` about once a second."""

    def __init__(self, hang_seconds: float, *, computes_on_cpu: bool) -> None:
        self._hang_seconds = hang_seconds
        self._computes_on_cpu = computes_on_cpu
        self._before: dict[int, Sight] = {}
        self._last_look = 0.0
        self._silent = 0.0
        """Seconds without an answer that is due."""
        self._quiet = 0.0
        """The same, without any sign of life."""
        self._was_due = self._was_stopped = False
        """At the last look."""
        self._is_answered = False
        """Since then."""
        self.verdict: Verdict | None = None
        """Set from the first suspicion to the next answer."""

    @property
    def has_hung(self) -> bool:
        return self.verdict is not None and self.verdict.seconds >= self._hang_seconds

    def answered(self) -> None:
        """A result has come."""
        self._is_answered = True

    def look(self, now: float, ranks: Mapping[int, Sight], *, is_due: bool) -> None:
        """`is_due`: a plan is out."""
        # When we have been stopped ourselves, the time until now is not their fault.
        elapsed = min(now - self._last_look, 2 * LOOK_SECONDS)
        self._last_look = now
        stopped = [rank for rank, each in ranks.items() if each.activity.state in STOPPED]
        # Rank 0 may go on answering when another one is stopped: the oracle's ranks do not need each other.
        since_before = (self._was_stopped and bool(stopped)) or (self._was_due and not self._is_answered)
        if since_before and (stopped or is_due):
            self._silent += elapsed
            self._quiet += elapsed
            if not stopped:
                self._excuse(now, elapsed, ranks)
        else:  # what began after the last look has not lasted as long
            self._silent = self._quiet = 0.0
        self._was_due, self._was_stopped, self._is_answered = is_due, bool(stopped), False
        self._before = dict(ranks)
        self.verdict = None
        if self._quiet >= SUSPICIOUS_SECONDS:
            self.verdict = self._judge(now, ranks, stopped)

    def _excuse(self, now: float, elapsed: float, ranks: Mapping[int, Sight]) -> None:
        """Take back the quiet that there is a reason for."""
        least = max(0.0, self._silent - BUSY_SECONDS)
        for rank, each in ranks.items():
            before = self._before.get(rank, each)
            if each.compilation != before.compilation or (
                self._computes_on_cpu and _is_busy(each.activity, before.activity, elapsed)
            ):
                self._quiet = least
            if each.compilation.kernel:
                late = now - each.compilation.since - COMPILE_SECONDS
                self._quiet = min(self._quiet, max(least, late))

    def _judge(self, now: float, ranks: Mapping[int, Sight], stopped: list[int]) -> Verdict:
        states = "; ".join(f"worker {rank}: {each.activity}" for rank, each in sorted(ranks.items()))
        compiling = [rank for rank, each in ranks.items() if each.compilation.kernel]
        if compiling and not stopped:
            rank = min(compiling, key=lambda rank: ranks[rank].compilation.since)
            kernel, since, _ = ranks[rank].compilation
            text = f"worker {rank} is compiling {kernel} for {now - since:.0f} s ({states})"
            return Verdict(self._quiet, rank, text)
        distances = {each.distance for each in ranks.values()}
        behind = [rank for rank, each in ranks.items() if each.distance == min(distances)]
        culprit = stopped[0] if stopped else behind[0] if len(distances) > 1 or len(ranks) == 1 else None
        who = "" if culprit is None or len(ranks) == 1 else f", because of worker {culprit}"
        return Verdict(self._quiet, culprit, f"no progress for {self._quiet:.0f} s{who} ({states})")


def _is_busy(now: Activity, before: Activity, elapsed: float) -> bool:
    """It computes, wants to, or waits for a page of the weights."""
    return now.state in "RD" or now.cpu_seconds - before.cpu_seconds >= _BUSY * elapsed
