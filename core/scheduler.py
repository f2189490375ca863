"""The scheduler: which tokens run in the next step, and what became of those that ran.

Sans I/O: requests and results go in, plans and outputs come out; the caller sends every plan to the workers
in the order in which it got them, and owns the clock.

Each step gives tokens to requests until a budget is spent: first one to each decoding request, then chunks
of the prompts under way, then of newly admitted ones. While requests decode, prompts get a share of it
only: a stream waits as long as a step takes. Whose turn it is to be admitted is the queue's to say.
Up to `MAX_IN_FLIGHT` plans are ahead of their results: lengths are known in advance, so only a stop token is
noticed late, and the one token after it is dropped.

Two facts make sharing and reusing blocks simple. Plans run in order, so a freed block may be granted in the
next plan although one in flight still writes to it. Within a plan all KV is written before any is read, so a
row may share a prefix block that an earlier row of the same plan fills.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum, auto
from itertools import compress

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, RequestCrashedError
from ..ipc.messages import FinishReason, Stats, StepPlan, StepResult, unpack
from .admission import Admission
from .blame import Blame
from .counters import Counters
from .deadlines import DeadlineQueue
from .limits import Limits
from .logprobs import entries_per_position, rows_of
from .queue import WaitingQueue
from .request import Phase, Request
from .slot_pool import SlotPool
from .steps import Ended, Outputs, PlanColumns, Step, check_result, take_prompt_logprobs

MAX_IN_FLIGHT = 2
SMALLEST_SHARE = 512
"""Prompt tokens beside decoding requests that no budget is too small for; of a larger one a quarter for each
tensor-parallel rank."""
_CRASHED = ErrorInfo.of(RequestCrashedError("the workers crashed each time when they computed this request"))


class Pause(Enum):
    """What is held back."""

    NOTHING = auto()
    NEW = auto()
    """Requests that have not started."""
    EVERYTHING = auto()


class Scheduler:
    """Continuous batching over `num_blocks` KV blocks. No sequence grows beyond `max_model_len` tokens."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self.paused = Pause.NOTHING
        self._max_in_flight = max_in_flight
        self._block_size = config.block_size
        self._budget = config.max_num_batched_tokens
        # Ranks shorten a step, but not what it costs to launch it: they take more tokens in the same time.
        share = max(self._budget * config.tensor_parallel_size // 4, SMALLEST_SHARE)
        self._prompt_share = min(self._budget, share)
        self._chunked = config.enable_chunked_prefill
        self._caching = config.enable_prefix_caching
        self._by_priority = config.scheduling_policy == "priority"
        self._limits = Limits(config, num_blocks, max_model_len)
        self._vocab_size = config.vocab_size
        self._blame = Blame(config.max_replays)
        # No more running requests than a step has tokens: every decoding row runs in every step.
        num_slots = min(config.max_num_seqs, self._budget)
        self._slots = SlotPool(num_slots, num_blocks, config.block_size, self._caching)
        self._queue = WaitingQueue(self._by_priority)
        self._admission = Admission(config, self._queue, self._slots, self._blame)
        self._deadlines = DeadlineQueue()
        self._prefilling: list[Request] = []
        # Rebound, never changed in place: plans in flight and `Outputs` refer to it.
        self._decoding: list[Request] = []
        self._stale = False  # the two lists hold requests that no longer run
        self._in_flight: deque[Step] = deque()
        self._columns = PlanColumns()
        self._num_draining = 0
        self._last_wait = 0.0  # seconds that the last to start had waited
        self._counters = Counters()

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not in."""
        return len(self._in_flight)

    # --- requests -----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never run."""
        self.check(request)
        self._counters.num_replays += request.num_output_tokens > 0
        self._queue.enter(request)
        self._deadlines.add(request)

    def check(self, request: Request) -> None:
        """Raise RequestError, with the arithmetic, when a new request can never run."""
        self._limits.check(request)

    def check_room(self, requests: Sequence[Request]) -> None:
        """Raise OverloadedError unless there is a free slot or room in the queue for each of these."""
        num_waiting = len(self._queue) + len(requests) - self._slots.num_free
        if num_waiting > 0:
            new = sum(request.num_prompt_tokens for request in requests)
            self._limits.check_room(num_waiting, self._queue.num_prompt_tokens + new, self._last_wait)

    def abort(self, request: Request) -> None:
        """Forget a request in whatever phase; its blocks are free on return."""
        if request.phase is not Phase.FINISHED:
            self._finish(request)

    @property
    def next_deadline(self) -> float | None:
        """When to call `expire` (time.monotonic), at the latest."""
        return self._deadlines.soonest

    def expire(self, now: float) -> list[Ended]:
        """End the requests that have missed a deadline; their blocks are free on return."""
        missed = self._deadlines.pop_missed(now)
        for request in missed:
            self._finish(request)
        return [Ended(request, FinishReason.TIMEOUT, None) for request in missed]

    def reset_prefix_cache(self, reset_running: bool = False) -> bool:
        """Forget all cached prefixes; False while requests hold blocks.

        With `reset_running` these give them up, to be computed again.
        """
        if reset_running:
            for request in self._running():
                self._preempt(request)
        return self._slots.blocks.reset()

    def forget_cache(self) -> None:
        """With nothing in flight, the workers give up cache and slots: what ran is to be computed again."""
        assert not self._in_flight
        for request in self._running():
            self._preempt(request)
        self._forget_workers()

    @property
    def has_started_requests(self) -> bool:
        """Some have run, and have not ended."""
        return bool(self._running() or self._num_draining or self._queue.next_preempted())

    def stats(self) -> Stats:
        return Stats(
            num_running=len(self._running()) + self._num_draining,
            num_waiting=len(self._queue),
            num_free_blocks=self._slots.blocks.num_free,
            num_blocks=self._slots.blocks.num_blocks,
            **asdict(self._counters),
        )

    # --- plans --------------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None when there is nothing to run or enough is in flight."""
        if len(self._in_flight) == self._max_in_flight or self.paused is Pause.EVERYTHING:
            return None
        self._sweep()
        step = Step(self._counters.num_steps, self._budget)
        urgent = self._displace() if self._by_priority else None
        self._run_decodes(step)
        self._run_prompts(step, now, urgent)
        if not self._decoding and not step.chunks:
            return None
        return self._seal(step)

    def _run_decodes(self, step: Step) -> None:
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
        if self._decoding and self._chunked:
            step.budget = min(step.budget, self._prompt_share)

    def _grow(self, request: Request, step: Step) -> None:
        """Give a decoding request the block for its next position, if it needs one."""
        table, size = request.block_table, self._block_size
        if request.num_computed_tokens == len(table) * size:
            self._slots.cache.name_full_blocks(request)
            _settle(request)
            while not self._slots.blocks.num_free:
                victim = max(self._running(), key=_order)
                self._preempt(victim)
                step.preempted = True
                if victim is request:
                    return
            table += self._slots.blocks.take(1)
            step.granted.extend((request.slot, table[-1]))
        if request.num_computed_tokens == request.max_total_tokens - 2:
            step.last.append(request)
        self._set_attention(request)

    def _set_attention(self, request: Request) -> None:
        """A decoding request is next looked at when it needs a block or samples its last token."""
        end = len(request.block_table) * self._block_size
        request.attention_at = min(end, request.max_total_tokens - 2)

    def _run_prompts(self, step: Step, now: float, urgent: Request | None) -> None:
        """Chunks of the prompts under way, then of new ones; of two levels the more urgent first."""
        under_way = sorted(self._prefilling, key=_order)
        admits = not step.preempted
        if admits and urgent is not None:
            admits = self._admit_one(urgent, step, now)
        for request in under_way:
            if admits and self._by_priority:
                self._admit_waiting(step, now, before=request)
            if not step.budget:
                return
            self._run_chunk(request, step)
        if admits:
            self._admit_waiting(step, now)

    def _run_chunk(self, request: Request, step: Step) -> None:
        count = min(len(request.tokens) - request.num_computed_tokens, step.budget)
        if entries := entries_per_position(request.sampling):
            count = min(count, step.logprob_room // entries)
            step.logprob_room -= count * entries
            if not count:
                return
        request.num_computed_tokens += count
        step.budget -= count
        step.chunks.append((request, count))
        self._slots.cache.name_full_blocks(request)
        _settle(request)

    # --- admission ----------------------------------------------------------------------------------

    def _displace(self) -> Request | None:
        """Preempt the least urgent if that makes room for the most urgent in line; returns that one."""
        urgent = self._admission.most_urgent() if self.paused is Pause.NOTHING else None
        if urgent is None:
            return None
        victims = self._admission.victims(urgent, self._running())
        for victim in victims:
            self._preempt(victim)
        self._sweep()
        return urgent if victims else None

    def _admit_waiting(self, step: Step, now: float, before: Request | None = None) -> None:
        """Admit those whose turn it is, until one does not fit.

        With `before`, only those that are more urgent than this running one.
        """
        while self._slots.num_free and step.budget:
            head = self._admission.head(now, only_preempted=self.paused is Pause.NEW)
            if head is None or (before is not None and head.priority >= before.order[0]):
                return
            if not self._admit_one(head, step, now):
                return

    def _admit_one(self, head: Request, step: Step, now: float) -> bool:
        """Give the head, or who may pass it, a slot and blocks, and run its first chunk; False: it waits."""
        num_running = len(self._decoding) + len(self._prefilling)
        is_held = self.paused is Pause.NEW
        chosen = self._admission.choose(head, step.budget, num_running, only_preempted=is_held)
        if chosen is None:
            return False
        request, found = chosen
        step.admitted.append(self._slots.give(request, found))
        self._queue.take(request, now)
        if request.phase is Phase.WAITING:
            self._count_start(request, step, now)
        request.move(Phase.RUNNING)
        self._prefilling.append(request)
        self._run_chunk(request, step)
        return True

    def _count_start(self, request: Request, step: Step, now: float) -> None:
        request.queued_seconds = self._last_wait = now - request.arrival_time
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        step.started.append(request)
        self._counters.count_start(request, looked_up=self._caching)

    def _seal(self, step: Step) -> StepPlan:
        """Make the message, and take the requests where this step brings them."""
        slots, num_tokens = self._columns.of(self._decoding, step.chunks)
        plan = StepPlan(
            step=step.number,
            released=self._slots.take_released(),
            admitted=step.admitted,
            granted=step.granted.tobytes(),
            slots=slots,
            num_tokens=num_tokens,
        )
        step.num_decodes = len(self._decoding)
        if step.chunks:
            self._end_prefills(step)
        step.sampling = self._decoding
        for request in step.last:
            self._vacate(request)
            request.move(Phase.DRAINING)
            self._num_draining += 1
        self._in_flight.append(step)
        self._counters.count_step(step.num_decodes + sum(count for _, count in step.chunks))
        return plan

    def _end_prefills(self, step: Step) -> None:
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
        check_result(self._in_flight[0] if self._in_flight else None, result, self._vocab_size)
        step = self._in_flight.popleft()
        started = [request for request in step.started if request.phase is not Phase.FINISHED]
        ended: list[Ended] = []
        dropped: set[Request] = set()
        rows, tokens = step.sampling, unpack(result.tokens)
        prompts = take_prompt_logprobs(step, result)  # before a token ends their request
        for failed in result.failed:
            self._fail(rows[failed.row], failed.error, ended)
        logprobs = {rows[row]: found for row, found in rows_of(result.logprobs).items()}
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
            logprobs = {request: found for request, found in logprobs.items() if request not in dropped}
        self._counters.generation_tokens += len(rows)
        self._blame.look_again()
        return Outputs(rows, tokens, started, ended, logprobs, prompts)

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
        self._counters.num_replays += len(lost) - len(guilty)
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
            self._queue.push(request)

    def _forget_workers(self) -> None:
        self._slots.clear()
        self._prefilling, self._decoding, self._stale = [], [], False
        self._in_flight.clear()
        self._columns = PlanColumns()
        self._num_draining = 0

    # --- leaving ------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        if request.phase is Phase.RUNNING:
            self._vacate(request)
        elif request.phase is Phase.DRAINING:
            self._num_draining -= 1
        else:
            self._queue.remove(request)
        self._queue.leave(request)
        request.move(Phase.FINISHED)
        self._deadlines.forget(request)

    def _preempt(self, request: Request) -> None:
        """Put a running request back into the queue; it will be recomputed from all its tokens."""
        self._vacate(request)
        request.num_pending_tokens = max(0, request.num_computed_tokens + 1 - len(request.tokens))
        request.move(Phase.PREEMPTED)
        self._counters.num_preemptions += 1
        self._queue.push(request)

    def _vacate(self, request: Request) -> None:
        """Take a running request's slot and blocks away."""
        _settle(request)
        self._slots.take_back(request)
        self._stale = True

    def _running(self) -> list[Request]:
        return [r for r in self._decoding + self._prefilling if r.phase is Phase.RUNNING]

    def _sweep(self) -> None:
        """Drop what no longer runs from the lists."""
        if self._stale:
            self._decoding = [r for r in self._decoding if r.phase is Phase.RUNNING]
            self._prefilling = [r for r in self._prefilling if r.phase is Phase.RUNNING]
            self._stale = False


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _settle(request: Request) -> None:
    """Charge its client for what has been scheduled."""
    request.share.num_tokens += request.num_computed_tokens - request.num_charged_tokens
    request.num_charged_tokens = request.num_computed_tokens
