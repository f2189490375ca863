"""Which requests may have crashed the workers, and how they are run again. No clock, no messages.

A crash leaves suspects: the requests of the plans in flight. Each is replayed, and is cleared when it gets
past the tokens that those plans would have brought. A suspect that had brought no token since it took its
slot is replayed with no other suspect beside it, the rest together: so a request whose prompt crashes the
workers is known for sure at its first replay, and a crash that no request caused costs those that decode no
time. When a crash leaves several suspects that were suspects before, none is blamed: each is replayed alone.
Suspects go before everybody else, and nobody else is admitted until all are cleared: who has not run yet may
crash the workers too, and the blame would fall on a suspect beside it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .request import Phase, Request, Suspicion


class Blame:
    """Ends requests that crash the workers more than `max_replays` times; lets innocent ones run on."""

    def __init__(self, max_replays: int) -> None:
        self._max_replays = max_replays
        self._suspects: list[Request] = []
        """Those that are not cleared, by arrival; they run, or wait to be run again."""

    def crash(self, in_flight: Iterable[Request]) -> list[Request]:
        """The workers crashed while they computed these; returns those among them that are to end."""
        suspects = list(in_flight)
        again = [request for request in suspects if request.suspicion is not None]
        guilty: list[Request] = []
        for request in suspects:
            before = request.suspicion
            strikes = 1 if before is None else before.strikes + (len(again) == 1)
            if strikes > self._max_replays:
                guilty.append(request)
            until = max(request.num_computed_tokens, len(request.tokens)) + 1
            alone = before is not None or not request.has_brought
            request.suspicion = Suspicion(until, strikes, alone)
        self._suspects = sorted({*self._suspects, *suspects}, key=lambda request: request.order)
        return guilty

    def next_waiting(self) -> Request | None:
        """The suspect that is to be admitted before anybody else."""
        return next((request for request in self._live() if request.phase is Phase.PREEMPTED), None)

    def may_run(self, request: Request) -> bool:
        """False while it would have to share the blame with a suspect."""
        suspects = self._live()
        if not suspects or request.suspicion is None:
            return not suspects
        together = [request, *(other for other in suspects if other.phase is not Phase.PREEMPTED)]
        return len(together) == 1 or not any(each.suspicion and each.suspicion.alone for each in together)

    def look_again(self) -> None:
        """After every result: clear those that got past the crash."""
        for request in self._suspects:
            if request.suspicion is not None and len(request.tokens) >= request.suspicion.until:
                request.suspicion = None
        self._live()

    def _live(self) -> list[Request]:
        """The suspects, without those that are cleared or have ended."""
        if self._suspects:
            self._suspects = [
                request
                for request in self._suspects
                if request.suspicion is not None and request.phase is not Phase.FINISHED
            ]
        return self._suspects
