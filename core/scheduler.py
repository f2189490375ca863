"""The scheduler: which tokens run in the next step, and what became of those that ran.

Sans I/O: requests and results go in, plans and outputs come out; the caller sends every plan to the workers
in the order in which it got them, and owns the clock.

Each step gives tokens to requests until a budget is spent: first one to each decoding request, then chunks
of the prompts under way, then of newly admitted ones. Up to `MAX_IN_FLIGHT` plans are ahead of their results:
lengths are known in advance, so only a stop token is noticed late, and the one token after it is dropped.

Two facts make sharing and reusing blocks simple. Plans run in order, so a freed block may be granted in the
next plan although one in flight still writes to it. Within a plan all KV is written before any is read, so a
row may share a prefix block that an earlier row of the same plan fills.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import compress
from typing import NamedTuple

import numpy as np

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, HeadraceError, RequestCrashedError, RequestError
from ..ipc.messages import Admit, FinishReason, Stats, StepPlan, StepResult, pack, unpack
from .blame import Blame
from .block_pool import BlockPool, extend_hashes
from .request import Phase, Request

MAX_IN_FLIGHT = 2
_CRASHED = ErrorInfo.of(RequestCrashedError("the workers crashed each time when they computed this request"))


class Ended(NamedTuple):
    """A request that ended by itself."""

    request: Request
    reason: FinishReason
    stop_token_id: int | None
    error: ErrorInfo | None = None


class BadResultError(HeadraceError):
    """A worker's answer does not fit its plan; nothing of it was used."""


@dataclass(slots=True)
class Outputs:
    """What one step brought. `rows` is the same object as long as the same requests run."""

    rows: list[Request]
    """The requests that got a token; do not change it."""
    tokens: array[int]
    """int32[len(rows)]"""
    started: list[Request]
    """Left the queue for the first time."""
    ended: list[Ended]


@dataclass(slots=True)
class _Step:
    """A plan being made, and later in flight."""

    number: int
    budget: int
    """Tokens that may still be scheduled."""
    preempted: bool = False
    granted: array[int] = field(default_factory=lambda: array("i"))
    admitted: list[Admit] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    """Rows that compute prompt tokens, and how many."""
    sampling: list[Request] = field(default_factory=list)
    """Rows that sample, in order."""
    started: list[Request] = field(default_factory=list)
    last: list[Request] = field(default_factory=list)
    """Rows that sample their request's last token."""


class Scheduler:
    """Continuous batching over `num_blocks` KV blocks. No sequence grows beyond `max_model_len` tokens."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._max_in_flight = max_in_flight
        self._block_size = config.block_size
        self._budget = config.max_num_batched_tokens
        self._chunked = config.enable_chunked_prefill
        self._caching = config.enable_prefix_caching
        self._by_priority = config.scheduling_policy == "priority"
        self._max_model_len = max_model_len
        self._vocab_size = config.vocab_size
        self._pool = BlockPool(num_blocks)
        self._blame = Blame(config.max_replays)
        # No more running requests than a step has tokens: every decoding row runs in every step.
        self._num_slots = min(config.max_num_seqs, self._budget)
        self._free_slots = _all_slots(self._num_slots)
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # heap
        self._prefilling: list[Request] = []
        # Rebound, never changed in place: plans in flight and `Outputs` refer to it.
        self._decoding: list[Request] = []
        self._stale = False  # the two lists hold requests that no longer run
        self._in_flight: deque[_Step] = deque()
        self._released = array("i")  # slots for the next plan to name
        self._last_rows: list[Request] | None = None
        self._last_slots = b""
        self._num_live_waiting = 0
        self._num_draining = 0
        self._num_added = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_replays = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._cache_queries = 0
        self._cache_hits = 0

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not in."""
        return len(self._in_flight)

    # --- requests -----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never run."""
        self.check(request)
        request.order = (request.priority if self._by_priority else 0, self._num_added)
        self._num_added += 1
        self._num_replays += request.num_output_tokens > 0
        self._num_live_waiting += 1
        heappush(self._waiting, (request.order, request))

    def check(self, request: Request) -> None:
        """Raise RequestError, with the arithmetic, when a new request can never run."""
        request.max_total_tokens = min(request.max_total_tokens, self._max_model_len)
        self._check_prompt(request)
        # The last token's KV is never needed.
        prompt, total, size = request.num_prompt_tokens, request.max_total_tokens, self._block_size
        blocks, available = -(-(total - 1) // size), self._pool.num_blocks
        if blocks > available:
            message = (
                f"prompt {prompt} + max_tokens {total - prompt} = {total} tokens need {blocks} KV blocks of "
                f"{size} tokens; the cache has {available} ({available * size} tokens)"
            )
            raise RequestError(message, parameter="max_tokens", value=total - prompt, limit=available * size)

    def abort(self, request: Request) -> None:
        """Forget a request in whatever phase; its blocks are free on return."""
        if request.phase is not Phase.FINISHED:
            self._finish(request)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False while requests hold blocks."""
        return self._pool.reset()

    def stats(self) -> Stats:
        return Stats(
            num_running=len(self._running()) + self._num_draining,
            num_waiting=self._num_live_waiting,
            num_free_blocks=self._pool.num_free,
            num_blocks=self._pool.num_blocks,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._cache_queries,
            prefix_cache_hits=self._cache_hits,
            num_replays=self._num_replays,
        )

    def _check_prompt(self, request: Request) -> None:
        prompt, limit = len(request.tokens), self._max_model_len - 1
        if prompt > limit:
            message = (
                f"the prompt has {prompt} tokens; max_model_len {self._max_model_len} leaves room for {limit}"
            )
            raise RequestError(message, parameter="prompt", value=prompt, limit=limit)
        prompt = request.num_prompt_tokens
        if prompt > self._budget and not self._chunked:
            message = (
                f"the prompt has {prompt} tokens; without chunked prefill it must fit in one step of "
                f"max_num_batched_tokens {self._budget}"
            )
            raise RequestError(message, parameter="prompt", value=prompt, limit=self._budget)

    # --- plans --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to run or enough is in flight."""
        if len(self._in_flight) == self._max_in_flight:
            return None
        self._sweep()
        step = _Step(self._num_steps, self._budget)
        self._run_decodes(step)
        self._run_prefills(step)
        if not step.preempted:
            self._admit_waiting(step, now)
        if not self._decoding and not step.chunks:
            return None
        return self._seal(step)

    def _run_decodes(self, step: _Step) -> None:
        """One token for every decoding request, preempting others where there are no blocks to grow into."""
        due = [r for r in self._decoding if r.num_computed_tokens == r.attention_at]
        if due:
            due.sort(key=_order)  # victims come from the end, so nobody loses what this step gave it
            for request in due:
                if request.phase is Phase.RUNNING:
                    self._grow(request, step)
            self._sweep()
        for request in self._decoding:
            request.num_computed_tokens += 1
        step.budget -= len(self._decoding)

    def _grow(self, request: Request, step: _Step) -> None:
        """Give a decoding request the block for its next position, if it needs one."""
        table, size = request.block_table, self._block_size
        if request.num_computed_tokens == len(table) * size:
            self._name_full_blocks(request)
            while not self._pool.num_free:
                victim = max(self._running(), key=_order)
                self._preempt(victim)
                step.preempted = True
                if victim is request:
                    return
            table += self._pool.take(1)
            step.granted.extend((request.slot, table[-1]))
        if request.num_computed_tokens == request.max_total_tokens - 2:
            step.last.append(request)
        self._set_attention(request)

    def _set_attention(self, request: Request) -> None:
        """A decoding request is next looked at when it needs a block or samples its last token."""
        end = len(request.block_table) * self._block_size
        request.attention_at = min(end, request.max_total_tokens - 2)

    def _run_prefills(self, step: _Step) -> None:
        self._prefilling.sort(key=_order)
        for request in self._prefilling:
            if step.budget:
                self._run_chunk(request, step)

    def _run_chunk(self, request: Request, step: _Step) -> None:
        count = min(len(request.tokens) - request.num_computed_tokens, step.budget)
        request.num_computed_tokens += count
        step.budget -= count
        step.chunks.append((request, count))
        self._name_full_blocks(request)

    def _admit_waiting(self, step: _Step, now: float) -> None:
        """Admit from the queue's head, in strict order: what does not fit waits, and all behind it."""
        while self._waiting and self._free_slots and step.budget:
            _, request = self._waiting[0]
            if request.phase is not Phase.FINISHED:
                if request.num_pending_tokens or not self._blame.may_run(request):
                    return
                if not self._admit(request, step):
                    return
                self._num_live_waiting -= 1
                if request.phase is Phase.WAITING:
                    self._count_start(request, step, now)
                request.move(Phase.RUNNING)
                self._blame.runs(request)
                self._prefilling.append(request)
                self._run_chunk(request, step)
            heappop(self._waiting)

    def _admit(self, request: Request, step: _Step) -> bool:
        """Give a waiting request a slot and blocks for all its tokens, if there are enough.

        Blocks for all, so that two prompts under way never wait for each other's; and one block is left for
        each running request, so that an admission is not undone by the next steps' growth.
        """
        size, total = self._block_size, len(request.tokens)
        shared = self._find_prefix(request)
        computed = len(shared) * size
        # A preempted request may have outgrown the budget: that one is chunked whatever the setting.
        if total - computed > step.budget and not self._chunked and total - computed <= self._budget:
            return False
        own = -(-total // size) - len(shared)
        reserve = len(self._decoding) + len(self._prefilling)
        if own + reserve > self._pool.num_free_without(shared):
            return False
        self._pool.share(shared)
        request.block_table = shared + self._pool.take(own)
        request.num_computed_tokens = computed
        request.num_named_blocks = len(shared)
        request.slot = self._free_slots.pop()
        request.slot_length = total
        step.admitted.append(
            Admit(
                slot=request.slot,
                tokens=request.tokens.tobytes(),
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed=computed,
                blocks=pack(request.block_table),
                sampling=request.sampling,
            )
        )
        return True

    def _count_start(self, request: Request, step: _Step, now: float) -> None:
        request.queued_seconds = now - request.arrival_time
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        step.started.append(request)
        self._prompt_tokens += request.num_prompt_tokens
        if self._caching:
            self._cache_queries += request.num_prompt_tokens
            self._cache_hits += request.num_cached_tokens

    def _seal(self, step: _Step) -> StepPlan:
        """Make the message, and take the requests where this step brings them."""
        slots, num_tokens = self._compose(step)
        plan = StepPlan(
            step=step.number,
            released=self._released.tobytes(),
            admitted=step.admitted,
            granted=step.granted.tobytes(),
            slots=slots,
            num_tokens=num_tokens,
        )
        self._released = array("i")
        if step.chunks:
            self._end_prefills(step)
        step.sampling = self._decoding
        for request in step.last:
            self._vacate(request)
            request.move(Phase.DRAINING)
            self._num_draining += 1
        self._in_flight.append(step)
        self._num_steps += 1
        return plan

    def _compose(self, step: _Step) -> tuple[bytes | None, bytes | None]:
        """The plan's `slots` and `num_tokens`."""
        if self._decoding is self._last_rows and not step.chunks:
            return None, None
        rows = [*self._decoding, *(request for request, _ in step.chunks)]
        counts = [1] * len(self._decoding) + [count for _, count in step.chunks]
        slots = pack([request.slot for request in rows])
        self._last_rows = None if step.chunks else self._decoding
        if slots == self._last_slots and sum(counts) == len(rows):
            return None, None
        self._last_slots = slots
        return slots, pack(counts)

    def _end_prefills(self, step: _Step) -> None:
        """Requests whose known tokens are all computed sample in this step, and decode from the next."""
        whole = [r for r, _ in step.chunks if r.num_computed_tokens == len(r.tokens)]
        if not whole:
            return
        for request in whole:
            if request.num_computed_tokens == request.max_total_tokens - 1:
                step.last.append(request)
            self._set_attention(request)
        self._decoding = self._decoding + whole
        self._prefilling = [r for r in self._prefilling if r.num_computed_tokens < len(r.tokens)]

    # --- results ------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> Outputs:
        """Take in the oldest plan's result. Raises BadResultError when it cannot be that plan's."""
        self._check_result(result)
        step = self._in_flight.popleft()
        started = [request for request in step.started if request.phase is not Phase.FINISHED]
        ended: list[Ended] = []
        dropped: set[Request] = set()
        rows, tokens = step.sampling, unpack(result.tokens)
        for failed in result.failed:
            self._fail(rows[failed.row], failed.error, ended)
        running = Phase.RUNNING  # the loop runs for every token: 256 rows take some 30 microseconds
        for request, token in zip(rows, tokens, strict=True):
            if request.phase is running and token not in request.stop_ids:
                request.tokens.append(token)
            elif request.phase is Phase.FINISHED:
                dropped.add(request)
            else:
                self._take_token(request, token, ended)
        if dropped:
            kept = [row not in dropped for row in rows]
            rows, tokens = list(compress(rows, kept)), array("i", compress(tokens, kept))
        self._generation_tokens += len(rows)
        self._blame.look_again()
        return Outputs(rows, tokens, started, ended)

    def _check_result(self, result: StepResult) -> None:
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.number != result.step or len(result.tokens) != 4 * len(step.sampling):
            expected = "none" if step is None else f"{step.number} with {len(step.sampling)} tokens"
            got = f"{result.step} with {len(result.tokens) / 4:g}"
            raise BadResultError(f"the answer to step {got}; expected {expected}")
        # As unsigned numbers negative ones are large.
        if result.tokens and int(np.frombuffer(result.tokens, np.uint32).max()) >= self._vocab_size:
            raise BadResultError(f"the answer to step {result.step} has tokens out of the vocabulary")
        if any(not 0 <= failed.row < len(step.sampling) for failed in result.failed):
            raise BadResultError(f"the answer to step {result.step} names rows that it has not")

    def _take_token(self, request: Request, token: int, ended: list[Ended]) -> None:
        """A token that may end its request, or comes after a preemption."""
        sampling = request.sampling
        # Before it counts, as the sampler's mask does. A grammar may end the text earlier.
        tells = request.num_output_tokens >= sampling.min_tokens or sampling.grammar is not None
        request.tokens.append(token)
        if request.phase is Phase.PREEMPTED:
            request.num_pending_tokens -= 1
        if tells and token in request.stop_ids:
            eos = token == sampling.eos_token_id
            ended.append(Ended(request, FinishReason.STOP, None if eos else token))
        elif len(request.tokens) == request.max_total_tokens:
            ended.append(Ended(request, FinishReason.LENGTH, None))
        else:
            return
        self._finish(request)

    def _fail(self, request: Request, error: ErrorInfo, ended: list[Ended]) -> None:
        """The worker cannot go on with it; its token of this step is dropped."""
        if request.phase is not Phase.FINISHED:
            ended.append(Ended(request, FinishReason.ERROR, None, error))
            self._finish(request)

    # --- new workers --------------------------------------------------------------------------------

    def restart(self) -> Outputs:
        """The workers are new and know nothing: all that ran is back in the queue, no block is in use.

        Plans in flight are forgotten. Returns what the clients have to hear of it: who started in those
        plans, and who ends because it crashed the workers too often.
        """
        in_flight: dict[Request, None] = {}  # a set that keeps the order
        started: list[Request] = []
        for step in self._in_flight:
            in_flight.update(dict.fromkeys(step.sampling))
            in_flight.update((request, None) for request, _ in step.chunks)
            started += [request for request in step.started if request.phase is not Phase.FINISHED]
        lost = [request for request in in_flight if request.phase is not Phase.FINISHED]
        guilty = self._blame.crash(lost)
        for request in dict.fromkeys(lost + self._running()):
            self._put_back(request)
        self._num_replays += len(lost) - len(guilty)
        self._forget_workers()
        ended = [Ended(request, FinishReason.ERROR, None, _CRASHED) for request in guilty]
        for request in guilty:
            self._finish(request)
        return Outputs([], array("i"), started, ended)

    def _put_back(self, request: Request) -> None:
        """Queue a request whose slot and blocks went with the workers."""
        request.slot = -1
        request.block_table = []
        request.num_pending_tokens = 0
        if request.phase is not Phase.PREEMPTED:
            request.move(Phase.PREEMPTED)
            self._num_live_waiting += 1
            heappush(self._waiting, (request.order, request))

    def _forget_workers(self) -> None:
        self._pool = BlockPool(self._pool.num_blocks)
        self._free_slots = _all_slots(self._num_slots)
        self._released = array("i")
        self._prefilling, self._decoding, self._stale = [], [], False
        self._in_flight.clear()
        self._last_rows, self._last_slots = None, b""
        self._num_draining = 0

    # --- leaving ------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        if request.phase is Phase.RUNNING:
            self._vacate(request)
        elif request.phase is Phase.DRAINING:
            self._num_draining -= 1
        else:
            self._num_live_waiting -= 1
        request.move(Phase.FINISHED)
        if len(self._waiting) > 2 * self._num_live_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].phase is not Phase.FINISHED]
            heapify(self._waiting)

    def _preempt(self, request: Request) -> None:
        """Put a running request back into the queue; it will be recomputed from all its tokens."""
        self._vacate(request)
        request.num_pending_tokens = max(0, request.num_computed_tokens + 1 - len(request.tokens))
        request.move(Phase.PREEMPTED)
        self._num_preemptions += 1
        self._num_live_waiting += 1
        heappush(self._waiting, (request.order, request))

    def _vacate(self, request: Request) -> None:
        """Take a running request's slot and blocks away; what they hold stays findable."""
        self._name_full_blocks(request)
        self._pool.give_back(request.block_table)
        request.block_table = []
        self._released.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1
        self._stale = True

    def _running(self) -> list[Request]:
        return [r for r in self._decoding + self._prefilling if r.phase is Phase.RUNNING]

    def _sweep(self) -> None:
        """Drop what no longer runs from the lists."""
        if self._stale:
            self._decoding = [r for r in self._decoding if r.phase is Phase.RUNNING]
            self._prefilling = [r for r in self._prefilling if r.phase is Phase.RUNNING]
            self._stale = False

    # --- the prefix cache ---------------------------------------------------------------------------

    def _find_prefix(self, request: Request) -> list[int]:
        """Blocks that hold the request's first tokens; at least one token is left to compute."""
        if not self._caching or request.sampling.skip_reading_prefix_cache:
            return []
        count = (len(request.tokens) - 1) // self._block_size
        extend_hashes(request.block_hashes, request.tokens, self._block_size, count)
        return self._pool.find(request.block_hashes[:count])

    def _name_full_blocks(self, request: Request) -> None:
        """Make blocks findable whose positions are all scheduled and whose tokens are all known."""
        if not self._caching:
            return
        full = min(request.num_computed_tokens, len(request.tokens)) // self._block_size
        if full > request.num_named_blocks:
            hashes, table = request.block_hashes, request.block_table
            extend_hashes(hashes, request.tokens, self._block_size, full)
            for i in range(request.num_named_blocks, full):
                self._pool.name(table[i], hashes[i])
            request.num_named_blocks = full


def _all_slots(count: int) -> list[int]:
    """Free slots, the lowest last: the next to be taken."""
    return list(range(count - 1, -1, -1))


def _order(request: Request) -> tuple[int, int]:
    return request.order
