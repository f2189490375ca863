"""The pool against a naive model, and the rules of eviction."""

from __future__ import annotations

from array import array
from hashlib import sha256

from headrace.core.block_pool import BlockPool, extend_hashes
from hypothesis import given, settings
from hypothesis import strategies as st


def _hashes(tokens: list[int], block_size: int) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", tokens), block_size, len(tokens) // block_size)
    return hashes


def test_a_digest_names_the_whole_prefix() -> None:
    first = _hashes([1, 2, 3, 4], 2)
    other_head = _hashes([9, 2, 3, 4], 2)
    assert first[0] == sha256(b"\0" * 32 + array("i", [1, 2]).tobytes()).digest()
    assert first[1] == sha256(first[0] + array("i", [3, 4]).tobytes()).digest()
    assert first[1] != other_head[1]  # same tokens, different past


def test_hashes_grow_in_place() -> None:
    grown = _hashes([1, 2, 3, 4], 2)[:1]
    extend_hashes(grown, array("i", [1, 2, 3, 4, 5]), 2, 2)
    assert grown == _hashes([1, 2, 3, 4], 2)


def test_unnamed_blocks_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4)
    hashes = _hashes([0, 1, 2], 1)
    chain = pool.take(3)
    for block, digest in zip(chain, hashes, strict=True):
        pool.name(block, digest)
    pool.give_back(chain)
    assert pool.num_free == 4
    assert pool.take(1) != [chain[0]]  # the unnamed one
    assert pool.take(1) == [chain[2]]  # the tail before its head
    assert pool.find(hashes) == chain[:2]


def test_using_a_prefix_makes_it_recent() -> None:
    pool = BlockPool(2)
    blocks, (first, second) = pool.take(2), _hashes([0, 1], 1)
    pool.name(blocks[0], first)
    pool.name(blocks[1], second)
    pool.give_back(blocks[1:])
    pool.give_back(blocks[:1])
    pool.share(blocks[1:])
    pool.give_back(blocks[1:])
    assert pool.take(1) == blocks[:1]


def test_the_first_block_of_a_content_keeps_its_name() -> None:
    pool = BlockPool(2)
    (digest,) = _hashes([7], 1)
    first, copy = pool.take(2)
    pool.name(first, digest)
    pool.name(copy, digest)
    assert pool.find([digest]) == [first]


def test_reset_only_when_nothing_is_held() -> None:
    pool = BlockPool(2)
    (digest,) = _hashes([7], 1)
    held = pool.take(1)
    pool.name(held[0], digest)
    assert not pool.reset()
    assert pool.find([digest]) == held
    pool.give_back(held)
    assert pool.reset()
    assert pool.find([digest]) == []
    assert sorted(pool.take(2)) == [0, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_random_use_against_a_model(operations: list[tuple[int, int, int]]) -> None:
    """Tables come and go over six possible prefixes; counts, contents and freedom stay right."""
    pool, size = BlockPool(8), 1
    tables: list[list[int]] = []
    contents: dict[int, bytes] = {}  # what was last named in a block
    for kind, which, length in operations:
        hashes = _hashes([which, which + 1, which + 2, which + 3], size)[: length + 1]
        if kind == 0 and tables:
            pool.give_back(tables.pop(which % len(tables)))
        elif kind == 1:
            shared = pool.find(hashes)
            assert [contents[block] for block in shared] == hashes[: len(shared)]
            own = len(hashes) - len(shared)
            if own > pool.num_free_without(shared):
                continue
            pool.share(shared)
            taken = pool.take(own)
            held = {block for table in tables for block in table} | set(shared)
            assert not held & set(taken)
            tables.append(shared + taken)
            for block, digest in zip(tables[-1], hashes, strict=True):
                if block in taken:
                    contents.pop(block, None)
                    if not pool.find([digest]):
                        contents[block] = digest
                        pool.name(block, digest)
        elif kind == 2:
            assert pool.reset() == (not tables)
        counts = [sum(block in table for table in tables) for block in range(8)]
        assert [pool.references(block) for block in range(8)] == counts
        assert pool.num_free == counts.count(0)
