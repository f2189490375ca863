"""The stage of sampling for rules that the host applies: what they do not allow becomes -inf."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.forbid_tokens import forbid_tokens
from .constraints import Constraints, Masks
from .staging import Staging, aligned


class MaskStage:
    """Has the masks of a step filled, and applies them.

    For a GPU they are written into pinned memory, one copy takes them to memory that stays, and they are bits
    all the way.
    """

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device)
        self._reserved = np.empty(0, np.int32)
        self._there = torch.empty(0, dtype=torch.int32, device=device)

    def apply(
        self,
        logits: Tensor,
        constraints: Constraints,
        slots: NDArray[np.int64],
        vocab_size: int,
        first: int = 0,
    ) -> None:
        """In place on the logits of these slots, a row each. Waits for the tokens of the steps before.

        Args:
            logits: [len(slots), columns]; float32 on a CPU. On a GPU column 0 may be token `first`.
        """
        if logits.device.type == "cpu":
            masks = constraints.masks(slots, vocab_size)
            if masks is not None:
                _forbid_on_cpu(logits, masks)
            return
        masks = constraints.masks(slots, vocab_size, partial(self._reserve, len(slots)))
        if masks is None:
            return
        size, behind = masks.allowed.size, aligned(masks.allowed.size)
        self._reserved[behind:] = masks.mask_of_row
        there = self._there[: len(self._reserved)]
        self._staging.send_reserved(there)
        forbid_tokens(logits, there[:size].view(masks.allowed.shape), there[behind:], first)

    def _reserve(self, rows: int, masks: int, words: int) -> NDArray[np.int32]:
        """Room for the masks, behind which it is noted which is whose."""
        self._reserved = self._staging.reserve(aligned(masks * words) + rows)
        if len(self._there) < len(self._reserved):
            self._there = torch.empty(2 * len(self._reserved), dtype=torch.int32, device=self._there.device)
        return self._reserved[: masks * words].reshape(masks, words)


def _forbid_on_cpu(logits: Tensor, masks: Masks) -> None:
    """A byte a token: torch would make four, several times."""
    rows = np.flatnonzero(masks.mask_of_row >= 0)
    words = masks.allowed[masks.mask_of_row[rows]]
    bits = np.unpackbits(~words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    forbidden = torch.from_numpy(bits.view(np.bool_))
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = torch.from_numpy(rows)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
