"""Logprobs: which tokens a row wants them of, and their values and ranks out of the row's scores.

Rows that want the same number of entries are one group, so that nothing is padded. On a GPU nothing waits:
the columns go to pinned memory behind the step and are read when its tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..ipc.config import LogprobsMode
from ..ipc.messages import Logprobs, PromptLogprobs, pack
from .rules import PromptRow, Wish
from .token_rules import Upload

_ALIGNED = 4
"""Rows of a multiple of so many numbers are aligned alike. On GPUs torch adds up a row in an order that its
alignment decides: the same row would have other logprobs in another place.
"""


def scores_to_show(logits: Tensor, mode: LogprobsMode) -> Tensor:
    """float32 [rows, vocab]: the logits themselves, or their log-softmax."""
    if mode.endswith("logits"):
        return logits
    missing = -logits.shape[1] % _ALIGNED if logits.is_cuda else 0
    if not missing:
        return logits.log_softmax(dim=-1)
    return F.pad(logits, (0, missing), value=-torch.inf).log_softmax(dim=-1)[:, : logits.shape[1]]


@dataclass(slots=True)
class Entries:
    """Columns of some rows with equally many entries; the first is the chosen token."""

    rows: NDArray[np.int64]
    token_ids: Tensor
    """int64 [rows, entries]"""
    values: Tensor
    """float32 [rows, entries]"""
    ranks: Tensor
    """int64 [rows, entries]: 1 + how many tokens of the vocabulary have a larger value"""

    def send_home(self) -> Entries:
        """The same on the host, once the work launched so far is done."""
        return Entries(self.rows, _home(self.token_ids), _home(self.values), _home(self.ranks))


def to_wire(parts: Iterable[Entries]) -> Logprobs | None:
    """All as one message; None when there is nothing. The parts are on the host."""
    parts = [part for part in parts if len(part.rows)]
    if not parts:
        return None
    widths = [np.full(len(part.rows), part.values.shape[1], np.int32) for part in parts]
    return Logprobs(
        rows=pack(row for part in parts for row in part.rows.tolist()),
        counts=b"".join(width.tobytes() for width in widths),
        token_ids=b"".join(part.token_ids.numpy().astype(np.int32).tobytes() for part in parts),
        values=b"".join(part.values.numpy().astype(np.float32).tobytes() for part in parts),
        ranks=b"".join(part.ranks.numpy().astype(np.int32).tobytes() for part in parts),
    )


def prompt_to_wire(prompts: Iterable[PromptRow], parts: Sequence[Entries]) -> list[PromptLogprobs]:
    """A message for each prompt; the parts' rows number the prompts' positions one after the other."""
    messages: list[PromptLogprobs] = []
    at = 0
    for prompt in prompts:
        for part in parts:
            inside = (part.rows >= at) & (part.rows < at + prompt.length)
            if inside.any():
                positions = part.rows[inside] - at + prompt.start + 1
                picked = Entries(positions, part.token_ids[inside], part.values[inside], part.ranks[inside])
                columns = to_wire([picked])
                assert columns is not None
                messages.append(PromptLogprobs(prompt.row, columns))
        at += prompt.length
    return messages


def prompt_wishes(prompts: Iterable[PromptRow]) -> dict[int, Wish]:
    """The wish of each of the prompts' positions, one prompt after the other."""
    return dict(enumerate(prompt.wish for prompt in prompts for _ in range(prompt.length)))


class LogprobStage:
    """The wishes of some rows of a batch."""

    def __init__(self, wishes: Mapping[int, Wish], upload: Upload) -> None:
        """`wishes` by row; at least one."""
        rows = np.array(list(wishes), np.int64)
        self.rows = upload(rows)
        """int64 [n], the rows that want something"""
        kinds: dict[Wish, list[int]] = {}
        for place, wish in enumerate(wishes.values()):
            kinds.setdefault(wish, []).append(place)
        self._groups = [
            (
                wish.most,
                upload(np.array([wish.token_ids], np.int64)) if wish.token_ids else None,
                rows[places],
                upload(np.array(places, np.int64)) if len(kinds) > 1 else None,
            )
            for wish, places in kinds.items()
        ]

    def gather(self, scores: Tensor, chosen: Tensor) -> list[Entries]:
        """What the rows want.

        Args:
            scores: float32 [n, vocab], of `rows`.
            chosen: int64 [n], the tokens that were drawn, or that follow in a prompt.
        """
        found: list[Entries] = []
        for most, token_ids, rows, places in self._groups:
            mine = scores if places is None else scores[places]
            first = (chosen if places is None else chosen[places])[:, None]
            if token_ids is None:
                found.append(_likeliest(mine, first, rows, most))
            else:
                found.append(_of_tokens(mine, torch.cat((first, token_ids.expand(len(rows), -1)), 1), rows))
        return found


def _likeliest(scores: Tensor, chosen: Tensor, rows: NDArray[np.int64], count: int) -> Entries:
    value = scores.gather(1, chosen)
    rank = (scores > value).sum(dim=-1, keepdim=True) + 1
    if not count:
        return Entries(rows, chosen, value, rank)
    values, tokens = scores.topk(min(count, scores.shape[1]), dim=-1)
    ranks = _ranks_among(values.flip(-1), values)
    return Entries(
        rows, torch.cat((chosen, tokens), 1), torch.cat((value, values), 1), torch.cat((rank, ranks), 1)
    )


def _of_tokens(scores: Tensor, tokens: Tensor, rows: NDArray[np.int64]) -> Entries:
    values = scores.gather(1, tokens)
    return Entries(rows, tokens, values, _ranks_among(scores.sort(dim=-1).values, values))


def _ranks_among(ascending: Tensor, values: Tensor) -> Tensor:
    not_larger = torch.searchsorted(ascending.contiguous(), values.contiguous(), right=True)
    return ascending.shape[1] - not_larger + 1


def _home(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
