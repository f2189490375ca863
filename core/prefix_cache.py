"""Which blocks hold the beginning of a request, and which of a request's blocks others may use."""

from __future__ import annotations

from .block_pool import BlockPool, extend_hashes
from .request import Request


class PrefixCache:
    """The prefixes that `pool` holds, by the content of requests."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._enabled = enabled

    def find(self, request: Request) -> list[int]:
        """Blocks that hold the request's first tokens; at least one token is left to compute."""
        sampling = request.sampling
        if not self._enabled or sampling.skip_reading_prefix_cache or sampling.prompt_logprobs is not None:
            return []
        count = (len(request.tokens) - 1) // self._block_size
        extend_hashes(request.block_hashes, request.tokens, self._block_size, count, request.cache_root)
        return self._pool.find(request.block_hashes[:count])

    def name_full_blocks(self, request: Request) -> None:
        """Make blocks findable whose positions are all scheduled and whose tokens are all known."""
        if not self._enabled:
            return
        full = min(request.num_computed_tokens, len(request.tokens)) // self._block_size
        if full > request.num_named_blocks:
            hashes, table = request.block_hashes, request.block_table
            extend_hashes(hashes, request.tokens, self._block_size, full, request.cache_root)
            for i in range(request.num_named_blocks, full):
                self._pool.name(table[i], hashes[i])
            request.num_named_blocks = full
