"""What is refused before it is queued: requests that can never run, and those that find no room."""

from __future__ import annotations

from ..ipc.config import EngineConfig
from ..ipc.errors import OverloadedError, RequestError
from .request import Request

_SHORTEST_RETRY, _LONGEST_RETRY = 1.0, 60.0


class Limits:
    """The bounds of an engine of `num_blocks` KV blocks; no sequence outgrows `max_model_len` tokens."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._max_model_len = max_model_len

    def check(self, request: Request) -> None:
        """Raise RequestError, with the arithmetic, when a new request can never run."""
        request.max_total_tokens = min(request.max_total_tokens, self._max_model_len)
        self._check_prompt(request)
        # The last token's KV is never needed.
        prompt, total, size = request.num_prompt_tokens, request.max_total_tokens, self._config.block_size
        blocks, available = -(-(total - 1) // size), self._num_blocks
        if blocks > available:
            message = (
                f"prompt {prompt} + max_tokens {total - prompt} = {total} tokens need {blocks} KV blocks of "
                f"{size} tokens; the cache has {available} ({available * size} tokens)"
            )
            raise RequestError(message, parameter="max_tokens", value=total - prompt, limit=available * size)

    def check_room(self, num_waiting: int, num_tokens: int, last_wait: float) -> None:
        """Raise OverloadedError when more would wait than may.

        Args:
            num_waiting: requests that would wait for a slot, the new ones included.
            num_tokens: their prompts' tokens.
            last_wait: seconds that the last one to start had waited.
        """
        for name, count, limit in (
            ("max_queued_requests", num_waiting, self._config.max_queued_requests),
            ("max_queued_tokens", num_tokens, self._config.max_queued_tokens),
        ):
            if count > limit:
                # The queue's length over its wait is how fast it moves (Little's law).
                seconds = last_wait * (count - limit) / count
                raise OverloadedError(
                    f"the queue is full: {name} is {limit}, and {count} would wait",
                    retry_after=min(max(seconds, _SHORTEST_RETRY), _LONGEST_RETRY),
                    parameter=name,
                    value=count,
                    limit=limit,
                )

    def _check_prompt(self, request: Request) -> None:
        prompt, limit = len(request.tokens), self._max_model_len - 1
        if prompt > limit:
            message = (
                f"the prompt has {prompt} tokens; max_model_len {self._max_model_len} leaves room for {limit}"
            )
            raise RequestError(message, parameter="prompt", value=prompt, limit=limit)
        prompt, budget = request.num_prompt_tokens, self._config.max_num_batched_tokens
        if prompt > budget and not self._config.enable_chunked_prefill:
            message = (
                f"the prompt has {prompt} tokens; without chunked prefill it must fit in one step of "
                f"max_num_batched_tokens {budget}"
            )
            raise RequestError(message, parameter="prompt", value=prompt, limit=budget)
