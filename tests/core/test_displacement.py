"""Who must make room: as few as possible, and only where that helps."""

from __future__ import annotations

from array import array

from headrace.core.block_pool import BlockPool
from headrace.core.displacement import choose_victims
from headrace.core.request import Request
from headrace.ipc.messages import Sampling

SIZE = 4


def running(level: int, blocks: list[int], num_computed: int) -> Request:
    """One that has computed so many tokens, into these blocks."""
    request = Request(b"", level, array("i", [1] * num_computed), Sampling(), 40)
    request.order, request.block_table, request.num_computed_tokens = (level, level), blocks, num_computed
    return request


def choose(
    pool: BlockPool, crowd: list[Request], *, length: int = 8, num_row_tokens: int = 1, budget: int = 64
) -> list[int]:
    """The levels of those that go for a request of level 0 which finds a slot."""
    urgent = Request(b"", 0, array("i", [1] * length), Sampling(), 4)
    victims = choose_victims(
        urgent,
        crowd,
        pool,
        [],
        block_size=SIZE,
        num_free_slots=1,
        num_row_tokens=num_row_tokens,
        budget=budget,
    )
    return [victim.order[0] for victim in victims]


def test_each_that_stays_keeps_a_block_to_grow_into() -> None:
    """Two, when it stands at the end of its last: one now, and one for the step after."""
    pool = BlockPool(10)
    crowd = [running(level, pool.take(2), 7) for level in (1, 2, 3)]
    assert choose(pool, crowd) == [3]  # two blocks of its own and three in reserve; four are free
    crowd[0].num_computed_tokens = crowd[1].num_computed_tokens = 8
    assert choose(pool, crowd) == [3]
    assert choose(pool, crowd, length=12) == [3, 2]


def test_it_needs_tokens_of_the_step_beside_those_that_decode() -> None:
    pool = BlockPool(100)
    crowd = [running(level, pool.take(2), 7) for level in (1, 2, 3)]
    assert choose(pool, crowd, num_row_tokens=61) == []
    assert choose(pool, crowd, num_row_tokens=62) == [3]
    assert choose(pool, crowd, num_row_tokens=63) == [3, 2]


def test_a_block_that_two_victims_share_is_free_when_both_are_gone() -> None:
    pool = BlockPool(6)
    shared = pool.take(2)
    crowd = [running(1, [*shared, *pool.take(1)], 9), running(2, [*shared, *pool.take(1)], 9)]
    pool.share(shared)
    assert choose(pool, crowd) == [2]  # two are free, one comes, one stays in reserve
    assert choose(pool, crowd, length=24) == [2, 1]
    assert choose(pool, crowd, length=25) == []
