"""Servers that share a port: the sum of what they have counted never falls."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from headrace.frontend.metrics import Counter, FrontendMetrics, Histogram
from headrace.frontend.server.board import Board, make_place


@pytest.fixture
def places() -> Iterator[list[int]]:
    made = [make_place() for _ in range(3)]
    yield made
    for place in made:
        os.close(place)


def counted(board: Board, metrics: FrontendMetrics) -> tuple[int, int, float]:
    """Generated tokens; number and sum of the gaps between them."""
    records = {record.name: record for record in board.total(metrics.records({"engine": "0"}))}
    tokens, gaps = records["vllm:generation_tokens"], records["vllm:inter_token_latency_seconds"]
    assert isinstance(tokens, Counter)
    assert isinstance(gaps, Histogram)
    assert gaps.buckets["+Inf"] == gaps.count
    return tokens.value, gaps.count, gaps.sum


def test_any_server_tells_the_sum(places: list[int]) -> None:
    boards = [Board(places, place) for place in places]
    servers = [FrontendMetrics() for _ in places]
    for number, metrics in enumerate(servers):
        metrics.generated(10**number)
        metrics.gap(0.5)
    assert counted(boards[0], servers[0]) == (1, 1, 0.5)  # nobody has written yet
    for board, metrics in zip(boards, servers, strict=True):
        board.write(metrics.records({"engine": "0"}))
    assert {counted(board, metrics) for board, metrics in zip(boards, servers, strict=True)} == {
        (111, 3, 1.5)
    }


def test_a_successor_goes_on_from_where_the_dead_one_was(places: list[int]) -> None:
    first = FrontendMetrics()
    first.generated(5)
    Board(places, places[0]).write(first.records({"engine": "0"}))
    second, board = FrontendMetrics(), Board(places, places[0])
    second.generated(2)
    assert counted(board, second)[0] == 7
    board.write(second.records({"engine": "0"}))
    assert counted(Board(places, places[1]), FrontendMetrics())[0] == 7


def test_what_is_half_written_does_not_count(places: list[int]) -> None:
    metrics = FrontendMetrics()
    metrics.generated(5)
    writer, reader = Board(places, places[0]), Board(places, places[1])
    writer.write(metrics.records({"engine": "0"}))
    assert counted(reader, FrontendMetrics())[0] == 5
    os.pwrite(places[0], b"\xff", 20)
    assert counted(reader, FrontendMetrics())[0] == 5  # what was there before
    assert counted(Board(places, places[2]), FrontendMetrics())[0] == 0
