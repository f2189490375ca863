"""The KV blocks: who uses which, and which hold a prefix worth keeping.

Pure bookkeeping: a block is a number, its content is named by a digest of all tokens from the start of the
sequence to the block's end. It knows nothing of requests, plans or devices.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = b"\0" * 32


def root_of(salt: str) -> bytes:
    """What the first block's digest begins with: requests of different salts share no name."""
    return hashlib.sha256(salt.encode()).digest() if salt else _ROOT


def extend_hashes(
    hashes: list[bytes], tokens: array[int], block_size: int, num_blocks: int, root: bytes = _ROOT
) -> None:
    """Append digests until `hashes` names the first `num_blocks` blocks of `tokens` (int32)."""
    for i in range(len(hashes), num_blocks):
        digest = hashlib.sha256(hashes[-1] if hashes else root)
        digest.update(tokens[i * block_size : (i + 1) * block_size])
        hashes.append(digest.digest())


class BlockPool:
    """`num_blocks` blocks, numbered from 0, each with a reference count.

    A block without references is free. If its content has a name it stays findable until the block is
    needed for something else; unnamed blocks are taken first, then the named ones, least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        self._unnamed = list(range(num_blocks - 1, -1, -1))
        self._named: OrderedDict[int, None] = OrderedDict()  # free blocks with a name, oldest first

    @property
    def num_free(self) -> int:
        return len(self._unnamed) + len(self._named)

    @property
    def num_unnamed(self) -> int:
        """Free blocks that hold nothing worth keeping."""
        return len(self._unnamed)

    def references(self, block: int) -> int:
        return self._references[block]

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix. Takes nothing."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._by_name.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, shared: Sequence[int]) -> int:
        """How many blocks would be free once `shared` are taken."""
        return self.num_free - sum(not self._references[block] for block in shared)

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each of these found blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._named[block]
            self._references[block] += 1

    def take(self, count: int) -> list[int]:
        """`count` blocks of one's own, their old content forgotten; at most `num_free`."""
        taken: list[int] = []
        for _ in range(count):
            if self._unnamed:
                block = self._unnamed.pop()
            else:
                block, _ = self._named.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a table. A prefix's tail is evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._names[block] is None:
                    self._unnamed.append(block)
                else:
                    self._named[block] = None
            assert self._references[block] >= 0, f"block {block} was given back twice"

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable. The first block of a content keeps the name, copies stay unnamed."""
        if digest not in self._by_name:
            assert self._names[block] is None, f"block {block} got a second content while it was held"
            self._by_name[digest] = block
            self._names[block] = digest

    def reset(self) -> bool:
        """Forget all contents. False, and nothing changes, while any block is in use."""
        if self.num_free != self.num_blocks:
            return False
        for block in self._named:
            self._forget(block)
        self._unnamed.extend(self._named)
        self._named.clear()
        return True

    def _forget(self, block: int) -> None:
        digest = self._names[block]
        assert digest is not None
        del self._by_name[digest]
        self._names[block] = None
