"""Finding a mark in text that arrives in pieces."""

from __future__ import annotations


def split_before(text: str, mark: str) -> tuple[str, str, str]:
    """(what comes before the mark, the mark, what follows it).

    Without the mark: (what cannot belong to it, "", the end that may be its beginning).
    """
    before, found, after = text.partition(mark)
    if found:
        return before, found, after
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return text[:-length], "", text[-length:]
    return text, "", ""
