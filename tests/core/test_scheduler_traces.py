"""Random traces through the scheduler and a worker that checks every KV position it reads.

The toy worker's cache holds, per block and offset, the oracle's state of the whole prefix that ends there. A
plan writes all its positions first and then reads: each row must find, from position 0 to its end, exactly
the states of its own tokens. So a block that is shared by mistake, reused too early or found under a wrong
name fails at the step that reads it, not in some later token.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from headrace.core.request import Deadlines, Phase, Request
from headrace.core.scheduler import Pause, Scheduler
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import RequestError
from headrace.ipc.messages import FinishReason, Sampling, StepPlan, StepResult, pack, unpack
from headrace.ipc.oracle import absorb, next_tokens, oracle_stream
from hypothesis import given, settings
from hypothesis import strategies as st

VOCAB = 23
GREEDY = Sampling(temperature=0)
MakeConfig = Callable[..., EngineConfig]


@dataclass
class Slot:
    tokens: list[int]
    states: list[np.uint64]
    """states[i] is the oracle's state after tokens[: i + 1]."""
    num_computed: int
    table: list[int]
    seed: int

    def append(self, token: int) -> None:
        before = np.array([self.states[-1] if self.states else 0], np.uint64)
        self.states.append(absorb(before, np.array([token]))[0])
        self.tokens.append(token)


@dataclass
class ToyWorker:
    block_size: int
    budget: int
    slots: dict[int, Slot] = field(default_factory=dict)
    kv: dict[tuple[int, int], np.uint64] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)

    def _forget(self, blocks: list[int]) -> None:
        """What a block held before it was given out anew must not be read again."""
        for block in blocks:
            for offset in range(self.block_size):
                self.kv.pop((block, offset), None)

    def execute(self, plan: StepPlan) -> StepResult:
        self._apply(plan)
        counts = [1] * len(self.rows) if plan.num_tokens is None else list(unpack(plan.num_tokens))
        assert len(set(self.rows)) == len(self.rows) == len(counts) > 0
        assert min(counts) > 0
        assert sum(counts) <= self.budget
        for row, count in zip(self.rows, counts, strict=True):
            slot = self.slots[row]
            end = slot.num_computed + count
            assert end <= len(slot.tokens)
            for position in range(slot.num_computed, end):
                self.kv[self._place(slot, position)] = slot.states[position]
            slot.num_computed = end
        return StepResult(plan.step, pack(self._sample()))

    def _apply(self, plan: StepPlan) -> None:
        for released in unpack(plan.released):
            del self.slots[released]
        for admit in plan.admitted:
            assert admit.slot not in self.slots
            slot = Slot([], [], admit.num_computed, list(unpack(admit.blocks)), admit.sampling.seed)
            for token in unpack(admit.tokens):
                slot.append(token)
            assert admit.num_computed < len(slot.tokens)
            self._forget(slot.table[admit.num_computed // self.block_size :])
            self.slots[admit.slot] = slot
        granted = unpack(plan.granted)
        for which, block in zip(granted[::2], granted[1::2], strict=True):
            self.slots[which].table.append(block)
            self._forget([block])
        if plan.slots is not None:
            self.rows = list(unpack(plan.slots))
        else:
            assert plan.num_tokens is None

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.table[position // self.block_size], position % self.block_size

    def _sample(self) -> list[int]:
        sampled: list[int] = []
        for row in self.rows:
            slot = self.slots[row]
            for position in range(slot.num_computed):
                assert self.kv.get(self._place(slot, position)) == slot.states[position]
            if slot.num_computed == len(slot.tokens):
                states, seeds = np.array([slot.states[-1]]), np.array([slot.seed], np.uint64)
                positions = np.array([len(slot.tokens)], np.uint64)
                slot.append(int(next_tokens(states, seeds, positions, VOCAB)[0]))
                sampled.append(slot.tokens[-1])
        return sampled


class Rig:
    """A scheduler with its toy worker; remembers what every request got."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_in_flight: int) -> None:
        self.num_blocks = num_blocks
        self.max_in_flight = max_in_flight
        self.scheduler = Scheduler(config, num_blocks, config.max_model_len, max_in_flight)
        self.worker = ToyWorker(config.block_size, config.max_num_batched_tokens)
        self.results: deque[StepResult] = deque()
        self.requests: list[Request] = []
        self.streams: dict[Request, list[int]] = {}
        self.ends: dict[Request, tuple[FinishReason, int | None]] = {}
        self.aborted: set[Request] = set()
        self.max_model_len = config.max_model_len
        self.started: set[Request] = set()
        self.now = 0.0

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        priority: int = 0,
        *,
        client: bytes = b"",
        **changes: Any,
    ) -> Request | None:
        tokens = array("i", prompt)
        request = Request(
            client, len(self.requests), tokens, sampling, max_tokens, priority, self.now, **changes
        )
        try:
            self.scheduler.check(request)
            self.scheduler.check_room([request])
        except RequestError:
            return None
        self.scheduler.add(request)
        self.requests.append(request)
        self.streams[request] = []
        return request

    def abort(self, request: Request) -> None:
        if request not in self.ends:
            self.aborted.add(request)
        self.scheduler.abort(request)

    def send(self) -> StepPlan | None:
        before = {request for request in self.requests if request.phase is not Phase.WAITING}
        plan = self.scheduler.schedule(self.now)
        if self.scheduler.paused is not Pause.NOTHING:
            assert {r for r in self.requests if r.phase is not Phase.WAITING} == before
        if plan is not None:
            assert self.scheduler.paused is not Pause.EVERYTHING
            self.results.append(self.worker.execute(plan))
        assert self.scheduler.num_in_flight == len(self.results) <= self.max_in_flight
        return plan

    def answer(self) -> None:
        if not self.results:
            return
        outputs = self.scheduler.update(self.results.popleft())
        for request in outputs.started:
            assert request not in self.started
            self.started.add(request)
        for request, token in zip(outputs.rows, outputs.tokens, strict=True):
            assert request not in self.ends
            assert request not in self.aborted
            assert request in self.started
            self.streams[request].append(token)
        for ended in outputs.ended:
            assert ended.request not in self.ends
            self.ends[ended.request] = (ended.reason, ended.stop_token_id)

    def crash(self) -> None:
        """The worker loses everything, and a new one takes its place."""
        self.worker = ToyWorker(self.worker.block_size, self.worker.budget)
        self.results.clear()
        outputs = self.scheduler.restart()
        assert not outputs.ended
        assert not self.started & set(outputs.started)
        self.started.update(outputs.started)

    def wait(self, seconds: float) -> None:
        """Let time pass; whoever misses a deadline ends."""
        self.now += seconds
        due = {request for request in self.requests if self.is_live(request) and request.misses(self.now)}
        soonest = self.scheduler.next_deadline
        assert not due or (soonest is not None and soonest <= self.now)
        ended = self.scheduler.expire(self.now)
        assert {each.request for each in ended} == due
        for each in ended:
            self.ends[each.request] = (each.reason, each.stop_token_id)

    def is_live(self, request: Request) -> bool:
        return request not in self.ends and request not in self.aborted

    def check(self) -> None:
        """No block lost, none held by who should hold none, none shared across salts."""
        salts: dict[int, str] = {}
        for request in self.requests:
            for block in request.block_table:
                assert salts.setdefault(block, request.cache_salt) == request.cache_salt
        held = {block for request in self.requests for block in request.block_table}
        assert self.scheduler.stats().num_free_blocks == self.num_blocks - len(held)
        for request in self.requests:
            assert (request.phase is Phase.RUNNING) == bool(request.block_table)
            assert len(set(request.block_table)) == len(request.block_table)

    def finish(self) -> None:
        """Run to the end and compare every stream with the only right one."""
        self.scheduler.paused = Pause.NOTHING
        while self.send() is not None or self.results:
            self.answer()
            self.check()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, self.num_blocks)
        assert self.scheduler.reset_prefix_cache()
        assert self.ends.keys() | self.aborted == set(self.requests)
        for request in self.requests:
            tokens, reason, stop = self.expected(request)
            if self.ends.get(request, (None,))[0] is FinishReason.TIMEOUT:
                assert any(deadline is not None for deadline in request.deadlines)
                assert self.streams[request] == tokens[: len(self.streams[request])]
            elif request in self.aborted:
                assert self.streams[request] == tokens[: len(self.streams[request])]
            else:
                assert (self.streams[request], *self.ends[request]) == (tokens, reason, stop)

    def expected(self, request: Request) -> tuple[list[int], FinishReason, int | None]:
        prompt, sampling = request.tokens[: request.num_prompt_tokens], request.sampling
        longest = min(request.max_tokens, self.max_model_len - len(prompt))
        tokens = oracle_stream(list(prompt), sampling.seed, longest, VOCAB)
        for i, token in enumerate(tokens[sampling.min_tokens :], start=sampling.min_tokens):
            if token == sampling.eos_token_id:
                return tokens[: i + 1], FinishReason.STOP, None
            if token in sampling.stop_token_ids:
                return tokens[: i + 1], FinishReason.STOP, token
        return tokens, FinishReason.LENGTH, None


@dataclass(frozen=True)
class Setting:
    num_blocks: int
    block_size: int
    max_num_seqs: int
    budget: int
    chunked: bool
    caching: bool
    priority: bool
    max_in_flight: int = 2
    max_queued_requests: int = 1000
    max_queued_tokens: int = 100_000

    def rig(self, make_config: MakeConfig) -> Rig:
        config = make_config(
            vocab_size=VOCAB,
            max_model_len=self.num_blocks * self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            enable_chunked_prefill=self.chunked,
            enable_prefix_caching=self.caching,
            scheduling_policy="priority" if self.priority else "fcfs",
            block_size=self.block_size,
            max_replays=100,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
        )
        return Rig(config, self.num_blocks, self.max_in_flight)


SETTINGS = st.builds(
    Setting,
    num_blocks=st.integers(2, 14),
    block_size=st.sampled_from([1, 2, 4]),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 24),
    chunked=st.booleans(),
    caching=st.booleans(),
    priority=st.booleans(),
    max_in_flight=st.integers(1, 4),
    max_queued_requests=st.sampled_from([1, 3, 1000]),
    max_queued_tokens=st.sampled_from([5, 40, 100_000]),
)


def add_any(rig: Rig, choose: random.Random) -> None:
    """A request of any kind; half of them continue an earlier stream."""
    longest = rig.max_model_len
    prompt = [choose.randrange(2) for _ in range(choose.randint(1, max(1, longest // 2)))]
    if rig.requests and choose.random() < 0.5:
        prompt = list(choose.choice(rig.requests).tokens[:longest]) + prompt[:2]
    if choose.random() < 0.7:
        prompt = prompt[: longest // 2 + 1]
    sampling = Sampling(
        seed=choose.choice([0, 0, 1, 2]),
        min_tokens=choose.choice([0, 0, 3]),
        eos_token_id=choose.choice([None, 5]),
        stop_token_ids=choose.choice([[], [5], [7, 11]]),
        skip_reading_prefix_cache=choose.random() < 0.1,
    )
    deadlines = Deadlines(
        *(rig.now + choose.choice([0.0, 3.0, 30.0]) if choose.random() < 0.15 else None for _ in range(3))
    )
    rig.add(
        prompt,
        choose.choice([1, 2, 5, 30]),
        sampling,
        choose.randrange(3),
        client=choose.choice([b"a", b"a", b"a", b"b", b"c"]),
        cache_salt=choose.choice(["", "", "", "pepper"]),
        deadlines=deadlines,
    )


def trace(rig: Rig, choose: random.Random, num_requests: int, *, crashes: bool = False) -> None:
    """Adds, aborts, pauses, resets, waits, plans, answers and crashes in random order."""
    actions = 0
    while len(rig.requests) < num_requests and actions < 40 * num_requests:
        actions += 1
        action = choose.random()
        if action < 0.3:
            add_any(rig, choose)
        elif action < 0.34 and rig.requests:
            rig.abort(choose.choice(rig.requests[-8:]))
        elif action < 0.36:
            assert rig.scheduler.reset_prefix_cache() == (
                rig.scheduler.stats().num_free_blocks == rig.num_blocks
            )
        elif action < 0.37:
            assert rig.scheduler.reset_prefix_cache(reset_running=True)
        elif action < 0.4:
            rig.wait(choose.choice([0.5, 2.0, 12.0]))
        elif action < 0.42:
            rig.scheduler.paused = choose.choice(list(Pause))
        elif action < 0.43 and crashes:
            rig.crash()
        elif action < 0.72:
            if choose.random() < 0.1:
                rig.scheduler.paused = Pause.NOTHING
            rig.send()
        else:
            rig.answer()
        rig.check()
    rig.finish()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(setting=SETTINGS, seed=st.integers(0, 1 << 30), num_requests=st.integers(1, 24))
def test_short_traces(make_config: MakeConfig, setting: Setting, seed: int, num_requests: int) -> None:
    trace(setting.rig(make_config), random.Random(seed), num_requests)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(setting=SETTINGS, seed=st.integers(0, 1 << 30), num_requests=st.integers(1, 24))
def test_traces_with_crashes(make_config: MakeConfig, setting: Setting, seed: int, num_requests: int) -> None:
    trace(setting.rig(make_config), random.Random(seed), num_requests, crashes=True)


@pytest.mark.parametrize("seed", range(6))
def test_long_traces(make_config: MakeConfig, seed: int) -> None:
    """Enough requests over few blocks that preemption and eviction happen all the time."""
    choose = random.Random(seed)
    setting = Setting(
        num_blocks=choose.randint(8, 16),
        block_size=choose.choice([2, 4]),
        max_num_seqs=8,
        budget=choose.randint(8, 40),
        chunked=seed % 2 == 0,
        caching=seed != 2,
        priority=seed % 3 == 0,
    )
    rig = setting.rig(make_config)
    trace(rig, choose, 400)
    stats = rig.scheduler.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_cache_hits > 0) == setting.caching


def test_a_stream_is_the_same_alone_and_in_company(make_config: MakeConfig) -> None:
    setting = Setting(12, 2, 6, 16, chunked=True, caching=True, priority=False)
    prompts = [[1, 2, 3, i % 3] for i in range(12)]
    together = setting.rig(make_config)
    crowd = [together.add(prompt, 9) for prompt in prompts]
    together.finish()
    for prompt, member in zip(prompts, crowd, strict=True):
        solo = setting.rig(make_config)
        alone = solo.add(prompt, 9)
        solo.finish()
        assert alone is not None
        assert member is not None
        assert solo.streams[alone] == together.streams[member]
    assert together.scheduler.stats().num_preemptions > 0
