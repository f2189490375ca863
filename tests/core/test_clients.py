"""A step's outputs, divided among those who asked."""

from __future__ import annotations

from array import array

from headrace.core.clients import Client, Splitter
from headrace.core.request import Phase, Request
from headrace.core.steps import Ended, Outputs
from headrace.ipc.errors import ErrorInfo
from headrace.ipc.messages import Finished, FinishReason, Sampling, Started, StepOutputs, pack


def request(client: bytes, number: int) -> Request:
    return Request(client, number, array("i", [1]), Sampling(), 4)


def outputs(rows: list[Request], *tokens: int) -> Outputs:
    return Outputs(rows, array("i", tokens), [], [])


def test_each_client_gets_its_rows_in_order() -> None:
    rows = [request(b"a", 5), request(b"b", 5), request(b"a", 2)]
    splitter = Splitter()
    for tokens in ((10, 11, 12), (20, 21, 22)):  # the second time the division is known
        assert splitter.split(outputs(rows, *tokens)) == {
            b"a": StepOutputs(pack([5, 2]), pack([tokens[0], tokens[2]])),
            b"b": StepOutputs(pack([5]), pack([tokens[1]])),
        }


def test_other_rows_are_divided_anew() -> None:
    splitter = Splitter()
    splitter.split(outputs([request(b"a", 1)], 7))
    assert splitter.split(outputs([request(b"b", 2)], 8)) == {b"b": StepOutputs(pack([2]), pack([8]))}


def test_a_start_without_a_token_and_an_end() -> None:
    first, second = request(b"a", 1), request(b"b", 2)
    second.num_cached_tokens, second.queued_seconds = 16, 0.5
    step = Outputs([first], array("i", [7]), [second], [Ended(first, FinishReason.STOP, 7)])
    assert Splitter().split(step) == {
        b"a": StepOutputs(pack([1]), pack([7]), [], [Finished(1, FinishReason.STOP, 7)]),
        b"b": StepOutputs(b"", b"", [Started(2, 16, 0.5)]),
    }


def test_an_end_without_a_token_reaches_its_client() -> None:
    rows = [request(b"a", 1)]
    error = ErrorInfo("request", "cannot go on")
    step = Outputs(rows, array("i", [7]), [], [Ended(request(b"b", 2), FinishReason.ERROR, None, error)])
    assert Splitter().split(step)[b"b"] == StepOutputs(
        b"", b"", [], [Finished(2, FinishReason.ERROR, None, error)]
    )


def test_a_step_without_news_says_nothing() -> None:
    assert Splitter().split(outputs([])) == {}


def test_a_request_whose_last_tokens_are_on_their_way_still_runs() -> None:
    client = Client(1, "a", since=5.0)
    client.requests = {number: request(b"a", number) for number in range(3)}
    for each in list(client.requests.values())[:2]:
        each.move(Phase.RUNNING)
    client.requests[0].move(Phase.DRAINING)
    stats = client.stats(7.0)
    assert (stats.num_running, stats.num_waiting, stats.connected_seconds) == (2, 1, 2.0)
