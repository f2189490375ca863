"""The stage of sampling for what a request says once and for all about tokens: which may come, and biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rules import TokenRules

Upload: TypeAlias = Callable[[NDArray[Any]], Tensor]


class TokenRuleStage:
    """The rules of a batch's rows, on the device."""

    def __init__(self, rules: Mapping[int, TokenRules], vocab_size: int, upload: Upload) -> None:
        """`rules` by row; at least one."""
        restricted = [row for row, rule in rules.items() if len(rule.allowed)]
        self._restricted = upload(np.array(restricted, np.int64)) if restricted else None
        if restricted:
            forbidden = np.ones((len(restricted), vocab_size), np.bool_)
            for place, row in enumerate(restricted):
                forbidden[place, rules[row].allowed] = False
            self._forbidden = upload(forbidden)
        counts = [len(rule.biased) for rule in rules.values()]
        self._biased: tuple[Tensor, Tensor] | None = None
        if sum(counts):
            rows = np.repeat(np.array(list(rules), np.int64), counts)
            tokens = np.concatenate([rule.biased for rule in rules.values()])
            self._biased = upload(rows), upload(tokens)
            self._biases = upload(np.concatenate([rule.biases for rule in rules.values()]))

    def apply(self, logits: Tensor) -> None:
        """In place on float32 [rows, vocab]."""
        if self._restricted is not None:
            logits[self._restricted] = logits[self._restricted].masked_fill_(self._forbidden, -torch.inf)
        if self._biased is not None:
            logits.index_put_(self._biased, logits[self._biased] + self._biases)
