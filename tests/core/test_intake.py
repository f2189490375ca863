"""What a client may send: each limit, and one beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from headrace.core.intake import MAX_SALT, MAX_STOP_TOKEN_IDS, make_requests
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import RequestError
from headrace.ipc.messages import AddRequest, Sampling, pack
from hypothesis import given, settings
from hypothesis import strategies as st

MakeConfig = Callable[..., EngineConfig]
GOOD = AddRequest(0, pack([1, 2]), Sampling(), 4)
TIMEOUTS = ("queue_timeout", "first_token_timeout", "total_timeout")


def test_what_a_message_becomes(make_config: MakeConfig) -> None:
    message = msgspec.structs.replace(
        GOOD, n=2, cache_salt="s", queue_timeout=1.0, first_token_timeout=2.0, total_timeout=3.0
    )
    first, second = make_requests(b"c", message, make_config(), now=100.0)
    for request in (first, second):
        assert request.deadlines == (101.0, 102.0, 103.0)
        assert request.cache_salt == "s"
        assert request.arrival_time == 100.0
    assert (first.number, second.number) == (0, 1)


def test_many_generations_share_their_stop_tokens(make_config: MakeConfig) -> None:
    """Of thousands, copies of a long list would fill the memory."""
    sampling = Sampling(eos_token_id=3, stop_token_ids=[1, 2])
    message = msgspec.structs.replace(GOOD, n=3, sampling=sampling)
    first, *others = make_requests(b"c", message, make_config(), now=0.0)
    assert first.stop_ids == {1, 2, 3}
    assert all(request.stop_ids is first.stop_ids for request in others)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        *(({name: value}, name) for name in TIMEOUTS for value in (-0.1, math.nan, math.inf, 1.1e9)),
        ({"cache_salt": "s" * (MAX_SALT + 1)}, "cache_salt"),
        ({"sampling": Sampling(stop_token_ids=[1] * (MAX_STOP_TOKEN_IDS + 1))}, "stop_token_ids"),
        ({"generated": pack([5] * 4)}, "generated"),
        ({"generated": pack([5]), "n": 2}, "generated"),
        ({"generated": pack([1000])}, "generated"),
        ({"priority": 2**31}, "priority"),
        ({"priority": -(2**31)}, "priority"),
    ],
)
def test_beyond_the_limits(make_config: MakeConfig, changes: dict[str, Any], parameter: str) -> None:
    config = make_config(scheduling_policy="priority")
    with pytest.raises(RequestError) as caught:
        list(make_requests(b"c", msgspec.structs.replace(GOOD, **changes), config, 0.0))
    assert caught.value.parameter == parameter
    assert caught.value.limit is not None


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in TIMEOUTS for value in (0.0, 1e9)),
        {"cache_salt": "s" * MAX_SALT},
        {"sampling": Sampling(stop_token_ids=[1] * MAX_STOP_TOKEN_IDS)},
        {"generated": pack([5] * 3)},
        {"priority": 2**31 - 1},
        {"priority": 1 - 2**31},
    ],
)
def test_at_the_limits(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    config = make_config(scheduling_policy="priority")
    assert list(make_requests(b"c", msgspec.structs.replace(GOOD, **changes), config, 0.0))


def test_priorities_are_refused_where_they_would_do_nothing(make_config: MakeConfig) -> None:
    with pytest.raises(RequestError, match="priority"):
        list(make_requests(b"c", msgspec.structs.replace(GOOD, priority=1), make_config(), 0.0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    timeouts=st.lists(st.none() | st.floats(), min_size=3, max_size=3),
    salt=st.text(max_size=2000),
    priority=st.integers(-(2**40), 2**40),
)
def test_any_message_is_taken_or_refused(
    make_config: MakeConfig, timeouts: list[float | None], salt: str, priority: int
) -> None:
    changes = {**dict(zip(TIMEOUTS, timeouts, strict=True)), "cache_salt": salt, "priority": priority}
    config = make_config(scheduling_policy="priority")
    message = msgspec.structs.replace(GOOD, **changes)
    legal = all(seconds is None or 0 <= seconds <= 1e9 for seconds in timeouts)
    if not legal or len(salt) > MAX_SALT or abs(priority) >= 2**31:
        with pytest.raises(RequestError):
            list(make_requests(b"c", message, config, 5.0))
        return
    (request,) = make_requests(b"c", message, config, 5.0)
    for moment, seconds in zip(request.deadlines, timeouts, strict=True):
        assert moment == (None if seconds is None else 5.0 + seconds)
