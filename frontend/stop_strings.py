"""Stop strings: found in text that arrives in parts, whatever the cuts. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence


class StopStrings:
    """Finds the first of some strings to be complete, and shows no text that would have to be taken away.

    Of two that are complete at once the one named first counts. Text that may turn out to be the start of a
    stop string (the longest one's length - 1) is held back; with `include` there is nothing to take away.
    Each part costs what it is long, however long the text has grown.
    """

    __slots__ = ("_hold", "_include", "_keep", "_pattern", "_stops", "_window", "found")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._pattern = re.compile("|".join(map(re.escape, stops)))
        self._include = include
        self._hold = not include
        self._keep = max(map(len, stops)) - 1
        self._window = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, new: str, check: bool = True) -> str:
        """The text that can be shown now. Without `check` no stop string may end in `new`."""
        known = len(self._window)
        text = self._window + new
        if check and new and (cut := self._find(text, known)) is not None:
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
        if self._pattern.search(text) is None:  # one look for all of them, which nearly always suffices
            return None
        ends = [
            (at + len(stop), place)
            for place, stop in enumerate(self._stops)
            if (at := text.find(stop, max(known - len(stop) + 1, 0))) >= 0
        ]
        if not ends:  # it came while stop strings did not count
            return None
        end, place = min(ends)
        self.found = self._stops[place]
        return end if self._include else end - len(self.found)
