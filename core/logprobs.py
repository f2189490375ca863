"""Logprobs on their way through the core: cut into rows, put together for each client, and held to a size.

The core does not look at them. What it must see to is that no step brings more than a message can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..ipc.messages import Logprobs, Sampling, StepResult, pack

MAX_ENTRIES = 1 << 21
"""Of one step: 24 MiB of prompts, and as much of generated tokens, where a frame may have 64."""
_LEAST_FOR_PROMPT = MAX_ENTRIES // 256
"""A position of a prompt counts for as many at least: its logits have to lie somewhere."""


class LogprobRow(NamedTuple):
    """One row's entries as they travel."""

    token_ids: bytes
    values: bytes
    ranks: bytes


def entries_per_token(sampling: Sampling) -> int:
    """How many logprobs a step brings for such a request."""
    if sampling.logprobs is None and not sampling.logprob_token_ids:
        return 0
    return 1 + max(sampling.logprobs or 0, len(sampling.logprob_token_ids))


def entries_per_position(sampling: Sampling) -> int:
    """How many entries of a step's `MAX_ENTRIES` a position of such a prompt counts for."""
    if sampling.prompt_logprobs is None:
        return 0
    return max(1 + sampling.prompt_logprobs, _LEAST_FOR_PROMPT)


def check_rows(result: StepResult, sampling: range, chunks: range) -> None:
    """Raises ValueError when a worker's logprobs do not fit together, or are of rows that there are not."""
    known = all(row in sampling for row in rows_of(result.logprobs))
    for prompt in result.prompt_logprobs:
        known = known and bool(rows_of(prompt.logprobs)) and prompt.request in chunks
    if not known:
        raise ValueError("logprobs of rows that it has not")


def rows_of(columns: Logprobs | None) -> dict[int, LogprobRow]:
    """The rows by their numbers. Raises ValueError when the columns do not fit together."""
    if columns is None:
        return {}
    numbers, counts = np.frombuffer(columns.rows, np.int32), np.frombuffer(columns.counts, np.int32)
    ends = 4 * np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    sizes = {len(columns.token_ids), len(columns.values), len(columns.ranks)}
    if len(numbers) != len(counts) or (counts < 1).any() or sizes != {total}:
        raise ValueError(f"logprobs of {len(numbers)} rows with columns of {sorted(sizes)} bytes")
    rows: dict[int, LogprobRow] = {}
    begin = 0
    for number, end in zip(numbers.tolist(), ends.tolist(), strict=True):
        columns_here = (columns.token_ids, columns.values, columns.ranks)
        rows[number] = LogprobRow(*(column[begin:end] for column in columns_here))
        begin = end
    return rows


def put_together(rows: Mapping[int, LogprobRow]) -> Logprobs | None:
    """The opposite; None when there are no rows."""
    if not rows:
        return None
    return Logprobs(
        rows=pack(rows),
        counts=pack(len(row.token_ids) // 4 for row in rows.values()),
        token_ids=b"".join(row.token_ids for row in rows.values()),
        values=b"".join(row.values for row in rows.values()),
        ranks=b"".join(row.ranks for row in rows.values()),
    )
