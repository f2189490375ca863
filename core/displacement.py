"""Who must make room for a more urgent request. Pure: it only counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .block_pool import BlockPool
from .request import Request


def choose_victims(
    urgent: Request,
    running: Sequence[Request],
    pool: BlockPool,
    found: Sequence[int],
    *,
    block_size: int,
    num_free_slots: int,
    num_row_tokens: int,
    budget: int,
) -> list[Request]:
    """The fewest of the least urgent running requests without which `urgent` can be admitted.

    Empty when it needs nobody's place, or when all that are less urgent would not be enough.

    Args:
        found: cached blocks that hold the beginning of `urgent`.
        num_row_tokens: tokens that it must compute in its first step.
        budget: tokens of a step, of which each decoding request takes one.
    """
    lesser = sorted((r for r in running if r.order[0] > urgent.priority), key=lambda r: r.order)
    staying = set(running)
    own = -(-len(urgent.tokens) // block_size) - len(found)
    shared = frozenset(found)
    usable = pool.num_free_without(found)
    leaving: Counter[int] = Counter()
    victims: list[Request] = []
    while True:
        # As admission will find it, after those at the end of a block have grown by one more.
        growth = sum(r.num_computed_tokens == len(r.block_table) * block_size for r in staying)
        has_slot = bool(victims or num_free_slots)
        has_blocks = own + len(staying) + growth <= usable
        if has_slot and has_blocks and num_row_tokens + len(staying) <= budget:
            return victims
        if not lesser:
            return []
        victim = lesser.pop()
        victims.append(victim)
        staying.remove(victim)
        leaving.update(victim.block_table)
        freed = (b for b in victim.block_table if leaving[b] == pool.references(b))
        usable += sum(block not in shared for block in freed)
