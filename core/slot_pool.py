"""Slots and KV blocks, given to the requests that run and taken back. Knows no plans, no order, no clock."""

from __future__ import annotations

from array import array

from ..ipc.messages import Admit, pack
from .block_pool import BlockPool
from .logprobs import MAX_ENTRIES, entries_per_token
from .prefix_cache import PrefixCache
from .request import Request


class SlotPool:
    """`num_slots` slots over `num_blocks` blocks.

    Attributes:
        blocks, cache: the blocks, and what is found in them.
        num_moves: changes whenever a request comes or goes.
    """

    def __init__(self, num_slots: int, num_blocks: int, block_size: int, caching: bool) -> None:
        self.num_moves = 0
        self._num_slots = num_slots
        self._block_size = block_size
        self._caching = caching
        self._num_blocks = num_blocks
        self._empty()

    def _empty(self) -> None:
        self.blocks = BlockPool(self._num_blocks)
        self.cache = PrefixCache(self.blocks, self._block_size, self._caching)
        self._free = list(range(self._num_slots - 1, -1, -1))  # the lowest last: the next to be taken
        self._released = array("i")
        self._logprob_entries = 0  # that a step of all that run brings

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take_released(self) -> bytes:
        """int32, the slots given back since the last call."""
        released, self._released = self._released, array("i")
        return released.tobytes()

    def has_room(self, request: Request, found: list[int], reserve: int) -> bool:
        """There is a slot, and blocks for all the request's tokens beside the `found` ones and `reserve`."""
        own = -(-len(request.tokens) // self._block_size) - len(found)
        entries = entries_per_token(request.sampling)
        return (
            bool(self._free)
            and own + reserve <= self.blocks.num_free_without(found)
            and (not self._logprob_entries or self._logprob_entries + entries <= MAX_ENTRIES)
        )

    def give(self, request: Request, found: list[int]) -> Admit:
        """A slot and blocks, the first of them the `found` ones. Only where `has_room`."""
        own = -(-len(request.tokens) // self._block_size) - len(found)
        self.blocks.share(found)
        request.block_table = found + self.blocks.take(own)
        request.num_computed_tokens = request.num_charged_tokens = len(found) * self._block_size
        request.num_named_blocks = len(found)
        request.slot = self._free.pop()
        request.slot_length = len(request.tokens)
        self._logprob_entries += entries_per_token(request.sampling)
        self.num_moves += 1
        return Admit(
            slot=request.slot,
            tokens=request.tokens.tobytes(),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed=request.num_computed_tokens,
            blocks=pack(request.block_table),
            sampling=request.sampling,
        )

    def take_back(self, request: Request) -> None:
        """Its slot and blocks; what they hold stays findable."""
        self.cache.name_full_blocks(request)
        self.blocks.give_back(request.block_table)
        request.block_table = []
        self._logprob_entries -= entries_per_token(request.sampling)
        self._released.append(request.slot)
        self._free.append(request.slot)
        request.slot = -1
        self.num_moves += 1

    def clear(self) -> None:
        """Nobody holds anything any more, and nothing is left in the blocks: the workers have lost it."""
        self._empty()
        self.num_moves += 1
