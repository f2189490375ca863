"""An engine core in which requests are old after a second: `run` stands in for headrace.core.main:run."""

from __future__ import annotations

from headrace.core import main, queue

AGEING_SECONDS = 1.0


def run(payload: bytes) -> None:
    vars(queue)["AGEING_SECONDS"] = AGEING_SECONDS
    main.run(payload)
