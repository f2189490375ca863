"""An engine core with bugs: `run` stands in for headrace.core.main:run.

Every process and every message is real, and what is asked of it is legal. At a prompt that begins with one of
the tokens of `BUGS` the core raises what nobody expects, in the part of its loop that has that name.
"""

from __future__ import annotations

from headrace.core import engine, main
from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.core.steps import Outputs
from headrace.ipc.messages import Call, StepPlan, StepResult

BUGS = {"check": 990, "schedule": 991, "update": 992}
"""When it is taken in; when it runs; when its tokens come."""
BAD_CALL = "is_paused"


class BuggyScheduler(Scheduler):
    def check(self, request: Request) -> None:
        super().check(request)
        fail("check", [request])

    def schedule(self, now: float) -> StepPlan | None:
        plan = super().schedule(now)
        if plan is not None:
            fail("schedule", self._running())
        return plan

    def update(self, result: StepResult) -> Outputs:
        outputs = super().update(result)
        fail("update", outputs.rows)
        return outputs


class BuggyEngine(engine.Engine):
    def _answer(self, identity: bytes, call: Call) -> None:
        assert call.method != BAD_CALL, "a bug"
        super()._answer(identity, call)


def fail(place: str, requests: list[Request]) -> None:
    assert not any(request.tokens[0] == BUGS[place] for request in requests), "a bug"


def run(payload: bytes) -> None:
    vars(engine)["Scheduler"] = BuggyScheduler
    vars(main)["Engine"] = BuggyEngine
    main.run(payload)
