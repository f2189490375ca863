"""A step on the device: when its tokens are there, and what it is answered with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..ipc.messages import FailedRow, StepResult
from .device_step import Shown
from .logprobs import prompt_to_wire, to_wire
from .rules import PromptRow
from .slots import I32, I64


class Drawn(NamedTuple):
    """What the host's part of a draw brought."""

    shown: Shown = Shown((), ())
    failed: Sequence[FailedRow] = ()


Draw: TypeAlias = Callable[[], Drawn]


class UnderWay:
    """A step whose kernels are queued, but perhaps not those that draw its tokens.

    Where rules need the tokens of the step before, these are first sent to the core, and only then is the
    draw prepared: the core plans the step after the next meanwhile, and the device runs the model.
    """

    def __init__(
        self,
        step: int,
        event: torch.cuda.Event,
        row: Tensor,
        places: I64 | slice,
        prompts: Sequence[PromptRow] = (),
    ) -> None:
        """The step's tokens will be at `places` of `row`, int32 and pinned, once `event` has come."""
        self._step, self._event, self._row, self._places = step, event, row, places
        self._prompts = prompts
        self._drawn = Drawn()
        self._draw: Draw | None = None
        self._before: UnderWay | None = None

    def launched(self) -> None:
        """All its kernels are queued."""
        self._event.record()

    def draw_later(self, draw: Draw, before: UnderWay | None) -> None:
        """`draw` remains to be called; it waits for the step `before`."""
        self._draw, self._before = draw, before
        self._draw_if_possible()

    def settle(self) -> None:
        """Queue what remains of its kernels; waits for the step before."""
        if self._draw is not None:
            draw, self._draw, self._before = self._draw, None, None
            self._drawn = draw()
            self.launched()

    def ready(self) -> bool:
        """The tokens are there; never blocks."""
        self._draw_if_possible()
        return self._draw is None and bool(self._event.query())

    def tokens(self) -> bytes:
        self.settle()
        self._event.synchronize()
        tokens: I32 = self._row.numpy()[self._places]
        return tokens.tobytes()

    def result(self) -> StepResult:
        tokens = self.tokens()
        (sampled, prompts), failed = self._drawn
        messages = prompt_to_wire(self._prompts, prompts)
        return StepResult(self._step, tokens, list(failed), to_wire(sampled), messages)

    def _draw_if_possible(self) -> None:
        if self._draw is not None and (self._before is None or self._before.ready()):
            self.settle()
