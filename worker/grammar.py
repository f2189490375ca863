"""Structured output: the rule that a request's text follows a grammar.

Vocabulary and grammars are read on a thread; a request waits for its own where its first token is drawn. What
a grammar may cost is bounded by `ipc.grammars`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np
from numpy.typing import NDArray

from ..ipc import grammars
from ..ipc.config import EngineConfig
from ..ipc.messages import Sampling

_KEPT = 64
"""Grammars that are kept for the requests to come."""


class Grammars:
    """The grammars of one worker."""

    def __init__(self, config: EngineConfig) -> None:
        """Begin to read the vocabulary."""
        self._ends = frozenset(config.eos_token_ids)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._vocabulary = self._thread.submit(grammars.read_vocabulary, config)
        self._built: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()

    def start(self, sampling: Sampling) -> Grammar:
        """The rule of a new request, whose `grammar` is not None. Never waits."""
        grammar = sampling.grammar
        assert grammar is not None
        built = self._built.pop(grammar, None) or self._thread.submit(self._build, grammar)
        self._built[grammar] = built
        if len(self._built) > _KEPT:
            self._built.popitem(last=False)
        stops = sampling.stop_token_ids
        if sampling.eos_token_id is not None:
            stops = [sampling.eos_token_id, *stops]
        return Grammar(built, self._ends, sampling.min_tokens, stops)

    def _build(self, grammar: str) -> llguidance.LLMatcher:
        return grammars.new_matcher(self._vocabulary.result(), grammar)


class Grammar:
    """The rule that the text so far can be continued to one that the grammar describes.

    When nothing can follow, only end-of-sequence tokens may, whatever `min_tokens` says; until then it holds
    back `stops`.
    """

    def __init__(
        self,
        built: Future[llguidance.LLMatcher],
        ends: Container[int],
        min_tokens: int,
        stops: Sequence[int],
    ) -> None:
        self._built = built
        self._ends = ends
        self._matcher: llguidance.LLMatcher | None = None
        self._unmatched: list[int] = []
        self._num_held_back = min_tokens
        """Coming tokens that none of the stops should be."""
        self._stops = stops

    def accept(self, token: int) -> None:
        self._unmatched.append(token)
        self._num_held_back -= 1

    def write(self, mask: NDArray[np.int32]) -> None:
        """Write what may come next; what `mask` holds does not matter.

        Raises RequestError for a grammar that cannot be built, or takes too much work on the way.
        """
        if self._matcher is None:
            self._matcher = self._built.result().deep_copy()
        for token in self._unmatched:
            # Behind the end there may be any number of these: the request ignores them, or steps ran ahead.
            if not (self._matcher.is_stopped() and token in self._ends):
                self._matcher.consume_token(token)
        self._unmatched = []
        grammars.fill_mask(self._matcher, mask)
        if self._num_held_back > 0:
            self._hold_back(mask)

    def _hold_back(self, mask: NDArray[np.int32]) -> None:
        """Clear the stops, unless they are all that is left."""
        others = mask.copy()
        words = others.view(np.uint32)
        for token in self._stops:
            words[token >> 5] &= ~np.uint32(1 << (token & 31))
        if others.any():
            mask[:] = others
