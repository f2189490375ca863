"""Stop strings: found in text that arrives in parts, whatever the cuts. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first of some strings to be complete, and shows no text that would have to be taken away.

    Of two that are complete at once the one named first counts. Text that may turn out to be the start of a
    stop string (the longest one's length - 1) is held back; with `include` there is nothing to take away.
    A character costs a look-up, or, where stop strings end in it, one for each of their different lengths.
    """

    __slots__ = ("_hold", "_include", "_keep", "_lengths", "_places", "_window", "found")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._places = {stop: place for place, stop in reversed(list(enumerate(stops)))}
        self._lengths: dict[str, set[int]] = {}
        """Of the stop strings that end in a character."""
        for stop in stops:
            self._lengths.setdefault(stop[-1], set()).add(len(stop))
        self._keep = max(map(len, stops)) - 1
        self._begin(include)

    def twin(self) -> StopStrings:
        """The same strings for another text, at once: there may be many of both."""
        twin = StopStrings.__new__(StopStrings)
        twin._places, twin._lengths, twin._keep = self._places, self._lengths, self._keep
        twin._begin(self._include)
        return twin

    def _begin(self, include: bool) -> None:
        self._include = include
        self._hold = not include
        self._window = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, new: str, check: bool = True) -> str:
        """The text that can be shown now. Without `check` no stop string may end in `new`."""
        known = len(self._window)
        text = self._window + new
        may_end = check and not self._lengths.keys().isdisjoint(new)
        if may_end and (cut := self._find(text, known)) is not None:
            self._window = ""
            return text[0 if self._hold else known : cut]
        split = max(len(text) - self._keep, 0)
        self._window = text[split:]
        return text[:split] if self._hold else new

    def finish(self) -> str:
        """What was held back."""
        held = self._window if self._hold else ""
        self._window = ""
        return held

    def _find(self, text: str, known: int) -> int | None:
        """Where the text ends: at the stop string that is complete first, beyond `known`."""
        for end in range(known + 1, len(text) + 1):
            if (lengths := self._lengths.get(text[end - 1])) is None:
                continue
            tails = [text[end - length : end] for length in lengths if length <= end]
            if found := [tail for tail in tails if tail in self._places]:
                self.found = min(found, key=self._places.__getitem__)
                return end if self._include else end - len(self.found)
        return None
