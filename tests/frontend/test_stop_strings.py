"""Stop strings: the text ends at the first one, wherever the tokens cut it, and nothing of it is shown."""

from __future__ import annotations

import time

import pytest
from headrace.frontend.stop_strings import StopStrings
from hypothesis import given
from hypothesis import strategies as st


def run(stops: list[str], include: bool, parts: list[str]) -> tuple[list[str], str | None]:
    """The deltas that a reader sees (the last is the flush), and the stop string found."""
    watch = StopStrings(stops, include)
    shown: list[str] = []
    for part in parts:
        shown.append(watch.push(part))
        if watch.found is not None:
            return shown, watch.found
    shown.append(watch.finish())
    return shown, None


@pytest.mark.parametrize(
    ("stops", "include", "parts", "shown", "found"),
    [
        (["END"], False, ["abc", "E", "N", "D", "x"], ["a", "b", "c", ""], "END"),
        (["END"], True, ["abc", "E", "N", "Dx"], ["abc", "E", "N", "D"], "END"),
        (["END"], False, ["abEN"], ["ab", "EN"], None),
        (["."], False, ["ab", "c.d"], ["ab", "c"], "."),
        (["."], True, ["ab", "c.d"], ["ab", "c."], "."),
        (["abcd", "bc"], False, ["zabcd"], ["za"], "bc"),
        (["bc", "abc"], False, ["zabc"], ["za"], "bc"),
        (["abc", "bc"], False, ["zabc"], ["z"], "abc"),
        (["x", "ab"], False, ["a", "bx"], ["", ""], "ab"),
        (["aa"], False, ["a", "a"], ["", ""], "aa"),
    ],
)
def test_stop_strings(
    stops: list[str], include: bool, parts: list[str], shown: list[str], found: str | None
) -> None:
    assert run(stops, include, parts) == (shown, found)


@given(
    text=st.text("ab.", max_size=30),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    size=st.integers(1, 5),
)
def test_text_ends_at_the_stop_string(text: str, stops: list[str], include: bool, size: int) -> None:
    """However the text is cut up: as a search through all of it finds it."""
    shown, found = run(stops, include, [text[i : i + size] for i in range(0, len(text), size)])
    ends = [(text.find(stop) + len(stop), i) for i, stop in enumerate(stops) if stop in text]
    if not ends:
        assert (found, "".join(shown)) == (None, text)
        return
    end, first = min(ends)
    assert found == stops[first]
    assert "".join(shown) == text[: end if include else end - len(found)]


def test_unchecked_text_does_not_stop_but_may_begin_a_stop_string() -> None:
    watch = StopStrings(["abc"], False)
    assert watch.push("abcab", check=False) == "abc"
    assert watch.push("c") == ""
    assert watch.found == "abc"


def test_the_longer_of_two_counts_when_the_shorter_came_unchecked() -> None:
    watch = StopStrings(["ab", "abc"], False)
    assert watch.push("ab", check=False) == ""
    assert watch.push("c") == ""
    assert watch.found == "abc"


def test_ten_thousand_stop_strings_in_a_long_text() -> None:
    stops = [f"stop {number};" for number in range(10_000)]
    text = "".join(f"stop {number} " for number in range(3000)) + "stop 777;"
    shown, found = run(stops, False, [text[i : i + 3] for i in range(0, len(text), 3)])
    assert ("".join(shown), found) == (text.removesuffix("stop 777;"), "stop 777;")


@pytest.mark.parametrize("stop", ["🎡", "車は", "é", "\u200d👩", "\n\n", ".*", "\\"])
def test_characters_that_are_special_somewhere(stop: str) -> None:
    assert run([stop], False, ["a", *stop, "b"])[1] == stop


def test_as_many_and_as_long_as_may_be_hold_nobody_up() -> None:
    """The event loop waits while they are prepared, and at every token."""
    stops = ["ab" * 2046 + f"{number:04}" for number in range(1024)]
    begun = time.process_time()
    first = StopStrings(stops, False)
    several = [first.twin() for _ in range(1000)]
    assert time.process_time() - begun < 0.5  # 2 ms
    watch = several[-1]
    shown = [watch.push("ab") for _ in range(3000)] + [watch.push("0"), watch.push("777")]
    assert time.process_time() - begun < 2.0
    assert watch.found == stops[777]
    assert "".join(shown) == "ab" * (3000 - 2046)
    assert first.found is None
