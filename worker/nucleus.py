"""top_k and top_p: which tokens stay in the race.

A row's filter is one threshold on its scores: every token at or above it stays. Tokens of equal score
therefore share their fate, so that the outcome does not depend on how a sort breaks ties:
top_k keeps every token that is as likely as the k-th likeliest; top_p then keeps, of those, the shortest run
of the likeliest whose probability (within those) reaches top_p, and all that tie with the run's last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.stay_thresholds import stay_thresholds
from .slots import F64, I64
from .staging import upload

_FIRST_LOOK = 256
"""Candidates at least: enough for nearly every top_p on real text, and fifty times cheaper than a sort."""
_LONGEST_LOOK = 1024
"""Above this many candidates sorting everything is no slower."""


@dataclass(slots=True)
class Nucleus:
    """The parameters of the rows that are filtered."""

    top_k: Tensor
    """int64 [rows, 1]; very large where off"""
    top_p: Tensor
    """float64 [rows, 1]; inf where off"""
    look: int
    """How many candidates to look at before sorting everything."""
    needs_total: bool
    """Some row has no top_k: its probabilities are relative to all tokens."""

    @classmethod
    def of(cls, top_k: I64, top_p: F64, device: torch.device) -> Nucleus:
        """From the columns `top_k` (0: off) and `top_p` (1: off)."""
        off = top_k <= 0
        largest = int(top_k.max(initial=0))
        limits = np.where(off, np.iinfo(np.int64).max, top_k)[:, None]
        wanted = np.where(top_p < 1, top_p, np.inf)[:, None]
        # One candidate more than top_k shows whether the k-th likeliest is tied.
        look = max(_FIRST_LOOK if off.any() else 0, largest + 1)
        return cls(upload(limits, device), upload(wanted, device), look, bool(off.any()))

    def take(self, rows: Tensor) -> Nucleus:
        """The parameters of some of the rows."""
        return Nucleus(self.top_k[rows], self.top_p[rows], self.look, self.needs_total)


def keep_likeliest(scores: Tensor, nucleus: Nucleus) -> tuple[Tensor, Tensor, Tensor]:
    """A look at each row's likeliest tokens, which nearly always suffices.

    Args:
        scores: float32 [rows, vocab], finite.

    Returns: scores [rows, n], -inf in place of those that do not stay; the token ids int64 [rows, n] of their
    columns; and bool [rows], False for rows of which other tokens may stay too: those need `keep_of_all`.
    """
    look = min(nucleus.look, scores.shape[1])
    if look > _LONGEST_LOOK:
        look = 1  # in vain: sorting everything is no slower
    values, token_ids = scores.topk(look, dim=-1)
    threshold, complete = _thresholds(values, scores, nucleus)
    return values.masked_fill_(values < threshold, -torch.inf), token_ids, complete


def keep_of_all(scores: Tensor, nucleus: Nucleus) -> Tensor:
    """The scores [rows, vocab], in place, with -inf for those that do not stay. The host does not wait."""
    if scores.is_cuda:
        ones = torch.ones(len(scores), device=scores.device)
        top_k = torch.where(nucleus.top_k > scores.shape[1], 0, nucleus.top_k).squeeze(1).int()
        off = torch.full_like(ones, -torch.inf)
        thresholds = stay_thresholds(scores, ones, top_k, nucleus.top_p.squeeze(1), off)
        return scores.masked_fill_(scores < thresholds[:, None], -torch.inf)
    threshold, _ = _thresholds(_descending(scores), scores, nucleus)
    return scores.masked_fill_(scores < threshold, -torch.inf)


def _descending(scores: Tensor) -> Tensor:
    # numpy sorts plain floats with vector instructions: 0.1 ms for 49152, torch takes 3.2.
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)


def _thresholds(values: Tensor, scores: Tensor, nucleus: Nucleus) -> tuple[Tensor, Tensor]:
    """Each row's threshold [rows, 1], and whether `values` holds all tokens that reach it [rows].

    Args:
        values: [rows, n], the n highest scores of each row, descending.
    """
    count = values.shape[1]
    by_top_k = nucleus.top_k <= count
    kth = values.gather(1, (nucleus.top_k.clamp(max=count) - 1))
    # Sums in float64: the boundary of top_p is where it is, not where float32 loses count of it.
    weights = (values - values[:, :1]).to(torch.float64).exp_()
    weights.masked_fill_((values < kth) & by_top_k, 0)
    total = weights.sum(dim=-1, keepdim=True)
    if nucleus.needs_total and count < scores.shape[1]:
        everything = (scores - values[:, :1]).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
        total = torch.where(by_top_k, total, everything)
    reached = weights.cumsum(dim=-1)
    needed = nucleus.top_p * total
    # A token stays while what came before it falls short.
    stays = (reached - weights < needed) & (weights > 0)
    last = (stays.sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
    threshold = values.gather(1, last)
    enough = (reached[:, -1:] >= needed) | by_top_k
    complete = enough & (values[:, -1:] < threshold) | (count == scores.shape[1])
    return threshold, complete.squeeze(1)
