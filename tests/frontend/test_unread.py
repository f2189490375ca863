"""Requests that nobody reads are forgotten in the end, and only such."""

from __future__ import annotations

import pytest
from headrace.frontend.metrics import FrontendMetrics
from headrace.frontend.requests import Request
from headrace.frontend.sampling_params import RequestOutputKind
from headrace.frontend.unread import MAX_ENDED, UnreadRequests
from headrace.ipc.errors import RequestError

METRICS = FrontendMetrics()


def request(name: str, *, ended: bool) -> Request:
    made = Request(name, None, [1], RequestOutputKind.DELTA, False, METRICS)
    if ended:
        made.fail(RuntimeError("its end"))
    assert made.ended is ended
    return made


def test_the_latest_that_have_ended_are_kept_and_all_that_run() -> None:
    unread = UnreadRequests()
    running, first = request("running", ended=False), request("first", ended=True)
    for one in (running, first):
        unread.add(one)
    for number in range(3 * MAX_ENDED):
        unread.add(request(str(number), ended=True))
        assert len(unread) <= 2 * MAX_ENDED + 1
    assert unread.find("running") is running
    for number in range(2 * MAX_ENDED, 3 * MAX_ENDED):
        assert unread.find(str(number)).request_id == str(number)
    with pytest.raises(RequestError, match="no request 'first' waits to be read"):
        unread.find("first")
    assert unread.claim(first) is first  # by the stream that add_request has returned


def test_one_reader_for_each() -> None:
    unread = UnreadRequests()
    first, second = request("a", ended=True), request("a", ended=False)
    unread.add(first)
    unread.add(second)  # the same id anew
    assert unread.claim(first) is first
    assert unread.claim(unread.find("a")) is second
    with pytest.raises(RequestError, match="no request 'a' waits to be read"):
        unread.claim(second)
    assert len(unread) == 0


def test_an_id_that_is_used_again_is_the_latest() -> None:
    unread = UnreadRequests()
    unread.add(request("again", ended=True))
    for number in range(MAX_ENDED):
        unread.add(request(str(number), ended=True))
    again = request("again", ended=True)
    unread.add(again)
    for number in range(MAX_ENDED, 2 * MAX_ENDED - 1):
        unread.add(request(str(number), ended=True))
    assert len(unread) == MAX_ENDED  # others have been forgotten
    assert unread.find("again") is again
