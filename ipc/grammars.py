"""Grammars on both sides: how the vocabulary is read, and how much the matching of one request may cost.

The frontend tries a grammar before it sends it, in a process that may be killed; the workers match it. Both
do it here, under the same limits, which count work and not time: what one accepts, all accept, on every rank
and on every machine.
"""

from __future__ import annotations

import llguidance
import numpy as np
from numpy.typing import NDArray

from .config import EngineConfig
from .errors import RequestError

_LIMITS = llguidance.LLParserLimits(
    # 50,000 units are a millisecond: what a grammar may cost when it is built ...
    initial_lexer_fuel=1_000_000,
    max_grammar_size=100_000,
    # ... and at each token, where JSON costs a tenth of one.
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    # Two kilobytes each.
    max_lexer_states=50_000,
    verbose_errors=False,
)


def read_vocabulary(config: EngineConfig) -> llguidance.LLTokenizer:
    """The vocabulary of the config's tokenizer, which must exist. Holds the interpreter for 0.2 s and more.

    Raises ValueError for a file that is none, or a kind of tokenizer that llguidance does not know.
    """
    assert config.tokenizer_json is not None
    return llguidance.LLTokenizer(
        config.tokenizer_json, n_vocab=config.vocab_size, eos_token=config.eos_token_ids
    )


def new_matcher(vocabulary: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Build the grammar; others may run meanwhile. Raises RequestError."""
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    check(matcher)
    return matcher


def check(matcher: llguidance.LLMatcher) -> None:
    """Raises RequestError when the matcher has given up, which it does for good."""
    if matcher.is_error():
        reason = matcher.get_error().partition("\n<")[0].strip()
        raise RequestError(f"structured_outputs: {reason}", parameter="structured_outputs")


def fill_mask(matcher: llguidance.LLMatcher, mask: NDArray[np.int32]) -> None:
    """Set the bits of the tokens that may come next, and no others. Raises RequestError.

    Args:
        mask: int32 [ceil(vocabulary / 32)], contiguous.
    """
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    check(matcher)
