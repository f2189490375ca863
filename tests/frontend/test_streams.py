"""Requests and their streams: each ends exactly once, readers may lag, outputs never change."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import tokenizers
from headrace import EngineDeadError, RequestError, RequestOutput, RequestOutputKind
from headrace.frontend.detokenizer import DecoderFactory
from headrace.frontend.logprobs import LogprobsAsked, WireRow
from headrace.frontend.repetition import RepetitionDetectionParams
from headrace.frontend.request_table import RequestTable
from headrace.frontend.requests import Request
from headrace.frontend.stop_strings import StopStrings
from headrace.frontend.streams import RequestStream
from headrace.frontend.tokenizer import Tokenizer
from headrace.ipc.errors import ErrorInfo
from headrace.ipc.messages import Finished, FinishReason, Started, StepOutputs, pack
from tokenizers import decoders, models

DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


class Bench:
    """A table with requests in it, and the hand of the core."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.table = RequestTable()
        self.aborted: list[str] = []
        self._decoders = None if tokenizer is None else DecoderFactory(tokenizer)

    def add(
        self,
        name: str,
        kind: RequestOutputKind,
        n: int = 1,
        stop: list[str] | None = None,
        include: bool = False,
        min_tokens: int = 0,
        repetition: RepetitionDetectionParams | None = None,
        prompt_token_ids: Sequence[int] = (1, 2),
        logprobs: LogprobsAsked | None = None,
    ) -> Request:
        request = Request(name, "p", list(prompt_token_ids), kind, include, self.table.metrics)
        self.table.reserve(request)
        request.begin(
            [self._decoders(True) if self._decoders else None for _ in range(n)],
            [StopStrings(stop, include) if stop else None for _ in range(n)],
            min_tokens,
            max_tokens=None,
            repetition=repetition,
            logprobs=logprobs,
        )
        self.table.number(request)
        return request

    def step(self, tokens: dict[int, int], *ends: Finished, started: Iterable[Started] = ()) -> list[int]:
        message = StepOutputs(pack(tokens), pack(tokens.values()), list(started), list(ends))
        return self.table.apply(message)

    def stream(self, request: Request) -> RequestStream:
        async def start() -> Request:
            return request

        def abort(request: Request) -> None:
            self.aborted.append(request.request_id)
            self.table.drop(request)
            request.abort()

        return RequestStream(request.request_id, start, abort, abort)


def end(
    number: int, reason: FinishReason = FinishReason.LENGTH, stop_token_id: int | None = None
) -> Finished:
    return Finished(number, reason, stop_token_id)


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def seen(output: RequestOutput) -> list[tuple[int, list[int], str | None]]:
    return [(part.index, part.token_ids, part.finish_reason) for part in output.outputs]


async def turn() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_three_kinds() -> None:
    async def main() -> None:
        bench = Bench()
        kinds = (DELTA, CUMULATIVE, FINAL)
        tasks = [asyncio.create_task(collect(bench.stream(bench.add(str(k), k)))) for k in kinds]
        await turn()
        bench.step({0: 10, 1: 10, 2: 10}, started=[Started(0, 7, 0.0)])
        await turn()
        bench.step({0: 11, 1: 11, 2: 11})
        bench.step({0: 12, 1: 12, 2: 12}, end(0), end(1), end(2))
        delta, cumulative, final = [await task for task in tasks]
        assert [seen(output) for output in delta] == [[(0, [10], None)], [(0, [11, 12], "length")]]
        assert [seen(o) for o in cumulative] == [[(0, [10], None)], [(0, [10, 11, 12], "length")]]
        assert [seen(output) for output in final] == [[(0, [10, 11, 12], "length")]]
        assert [output.finished for output in delta] == [False, True]
        assert delta[0].num_cached_tokens == 7
        assert (delta[0].prompt, delta[0].prompt_token_ids) == ("p", [1, 2])
        assert len(bench.table) == 0
        assert bench.aborted == []

    asyncio.run(main())


def test_repetition_ends_a_completion_unless_it_ends_anyway() -> None:
    async def main() -> None:
        bench = Bench()
        wanted = RepetitionDetectionParams(max_pattern_size=1, min_count=2)
        stream = bench.stream(bench.add("a", FINAL, n=3, repetition=wanted))
        assert bench.step({0: 1, 1: 1, 2: 1}) == []
        assert bench.step({0: 1, 1: 1, 2: 2}, end(1)) == [0]  # the core is told to abort it
        bench.step({0: 9, 2: 3}, end(2))
        (output,) = await collect(stream)
        assert seen(output) == [(0, [1, 1], "repetition"), (1, [1, 1], "length"), (2, [1, 2, 3], "length")]
        assert output.outputs[0].stop_reason == "repetition_detected"

    asyncio.run(main())


def test_a_message_may_bring_several_tokens_of_a_request() -> None:
    async def main() -> None:
        bench = Bench()
        task = asyncio.create_task(collect(bench.stream(bench.add("a", DELTA))))
        await turn()
        bench.table.apply(StepOutputs(pack([0, 0]), pack([5, 6]), [], [end(0)]))
        assert [seen(output) for output in await task] == [[(0, [5, 6], "length")]]

    asyncio.run(main())


def test_an_output_never_changes() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.stream(bench.add("a", CUMULATIVE))
        bench.step({0: 1})
        first = await anext(stream)
        first.outputs[0].token_ids.append(99)  # a reader may do with its list what it likes
        bench.step({0: 2}, end(0))
        assert seen(await anext(stream)) == [(0, [1, 2], "length")]
        with pytest.raises(AttributeError):
            first.finished = True  # type: ignore[misc]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_several_completions() -> None:
    async def main() -> None:
        bench = Bench()
        delta = bench.stream(bench.add("d", DELTA, n=2))
        cumulative = bench.stream(bench.add("c", CUMULATIVE, n=2))
        final = bench.stream(bench.add("f", FINAL, n=2))
        bench.step({1: 5, 3: 5, 5: 5})
        assert seen(await anext(delta)) == [(1, [5], None)]
        assert seen(await anext(cumulative)) == [(0, [], None), (1, [5], None)]
        bench.step({1: 6, 3: 6, 5: 6}, end(1), end(3), end(5))
        assert seen(await anext(delta)) == [(1, [6], "length")]
        bench.step({0: 7, 2: 7, 4: 7}, end(0), end(2), end(4))
        assert seen(await anext(delta)) == [(0, [7], "length")]
        both = [(0, [7], "length"), (1, [5, 6], "length")]
        assert seen(await anext(cumulative)) == both
        assert seen(await anext(final)) == both
        assert len(bench.table) == 0

    asyncio.run(main())


def test_the_first_output_has_the_prompts_logprobs() -> None:
    """Completion 0 brings them; the others may be faster, and it may end before."""

    def rows(*positions: int) -> dict[int, WireRow]:
        return {position: WireRow([5], [-1.0], [1]) for position in positions}

    async def main() -> None:
        bench = Bench()
        asked = LogprobsAsked(sampled=False, prompt=True, flat=False, texts=None)
        for name in ("known", "unknown"):
            request = bench.add(name, DELTA, n=2, prompt_token_ids=[1, 2, 3], logprobs=asked)
            task = asyncio.create_task(collect(bench.stream(request)))
            first = request.first_number
            await turn()
            request.note_prompt_logprobs(rows(1))
            bench.step({first + 1: 8})
            bench.step({}, end(first + 1))
            assert not request.has_output
            if name == "known":
                request.note_prompt_logprobs(rows(1, 2))  # the first for the second time: a replay
                bench.step({first: 9})
                await turn()
            bench.step({}, end(first))
            outputs = await task
            assert [part.token_ids for part in outputs[0].outputs] == (
                [[9], [8]] if name == "known" else [[], [8]]
            )
            assert [len(output.prompt_logprobs or ()) for output in outputs] == (
                [3, 0] if name == "known" else [0]
            )

    asyncio.run(main())


@pytest.mark.parametrize(("include", "text"), [(False, "fox"), (True, "fox jumps")])
def test_the_token_that_stops_has_no_text(tokenizer: Tokenizer, include: bool, text: str) -> None:
    async def main() -> None:
        bench = Bench(tokenizer)
        fox, jumps = tokenizer.encode("fox"), tokenizer.encode(" jumps")
        for stop in (None, ["never"]):
            request = bench.add("a", DELTA, stop=stop, include=include)
            number, stream = request.first_number, bench.stream(request)
            for token in fox + jumps[:-1]:
                bench.step({number: token})
            bench.step({number: jumps[-1]}, end(number, FinishReason.STOP, jumps[-1]))
            output = await anext(stream)
            expected = text if include else tokenizer.decode(fox + jumps[:-1])
            assert output.outputs[0].text == expected
            assert output.outputs[0].token_ids == fox + jumps
            assert output.outputs[0].stop_reason == jumps[-1]

    asyncio.run(main())


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL])
def test_stop_string_ends_it_and_tells_the_core(tokenizer: Tokenizer, kind: RequestOutputKind) -> None:
    async def main() -> None:
        bench = Bench(tokenizer)
        stream = bench.stream(bench.add("a", kind, stop=["dog"]))
        ids = tokenizer.encode("lazy dog, 1234")
        aborts: list[int] = []
        task = asyncio.create_task(collect(stream))
        for token in ids:
            await turn()
            aborts += bench.step({0: token})
        outputs = await task
        parts = [output.outputs[0] for output in outputs]
        assert aborts == [0]
        assert ("".join(part.text for part in parts) if kind is DELTA else parts[-1].text) == "lazy "
        assert (parts[-1].finish_reason, parts[-1].stop_reason) == ("stop", "dog")
        assert len(bench.table) == 0

    asyncio.run(main())


def test_min_tokens_holds_stop_strings_off(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        bench = Bench(tokenizer)
        ids = tokenizer.encode("a,a,a,a")
        stream = bench.stream(bench.add("a", FINAL, stop=[","], min_tokens=len(ids) // 2 + 1))
        for token in ids:
            bench.step({0: token})
        (output,) = await collect(stream)
        assert output.outputs[0].text == "a,a,a"

    asyncio.run(main())


def test_held_back_text_is_flushed_once(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        bench = Bench(tokenizer)
        ids = tokenizer.encode("The quick brown fox")
        stream = bench.stream(bench.add("a", DELTA, stop=["x marks the spot"]))
        task = asyncio.create_task(collect(stream))
        for token in ids[:-1]:
            await turn()
            bench.step({0: token})
        bench.step({0: ids[-1]}, end(0))
        assert "".join(output.outputs[0].text for output in await task) == "The quick brown fox"

    asyncio.run(main())


@pytest.fixture
def broken_tokenizer() -> Tokenizer:
    """Token 1 begins a character, token 2 does so after an "a"."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "Ã": 1, "aÃ": 2}, merges=[("a", "Ã")]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("stop", "token", "text", "reason"), [("a", 2, "", "stop"), ("zz", 1, "\ufffd", "length")]
)
def test_a_character_that_stays_incomplete(
    broken_tokenizer: Tokenizer, stop: str, token: int, text: str, reason: str
) -> None:
    """It is shown at the end, but for what follows a stop string."""

    async def main() -> None:
        bench = Bench(broken_tokenizer)
        task = asyncio.create_task(collect(bench.stream(bench.add("a", FINAL, stop=[stop]))))
        await turn()
        bench.step({0: token}, end(0))
        (output,) = await task
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == (text, reason)

    asyncio.run(main())


def test_stop_string_in_the_last_token_wins_over_the_length(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        bench = Bench(tokenizer)
        (token,) = tokenizer.encode(",")
        stream = bench.stream(bench.add("a", DELTA, stop=[","]))
        assert bench.step({0: token}, end(0)) == []
        assert (await anext(stream)).outputs[0].stop_reason == ","

    asyncio.run(main())


def test_abort_ends_the_stream_with_an_output() -> None:
    async def main() -> None:
        bench = Bench()
        request = bench.add("a", DELTA)
        task = asyncio.create_task(collect(bench.stream(request)))
        await turn()
        bench.step({0: 5})
        assert bench.table.drop(request) == [0]
        request.abort()
        assert [seen(output) for output in await task] == [[(0, [5], "abort")]]
        assert bench.step({0: 6}, end(0)) == []  # what was on its way is forgotten

    asyncio.run(main())


def test_every_way_to_leave_aborts() -> None:
    async def main() -> None:
        bench = Bench()

        async def read(stream: RequestStream) -> None:
            async for _ in stream:
                pass

        cancelled = asyncio.create_task(read(bench.stream(bench.add("cancelled", DELTA))))
        await turn()
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)

        closed = bench.stream(bench.add("closed", DELTA))
        bench.step({1: 5})
        await anext(closed)
        await closed.aclose()
        await closed.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(closed)

        bench.add("context", DELTA)
        request = bench.table.get("context")
        assert request is not None
        async with bench.stream(request) as stream:
            bench.step({2: 5})
            await anext(stream)

        dropped = bench.stream(bench.add("dropped", DELTA))
        bench.step({3: 5})
        await anext(dropped)
        del dropped
        gc.collect()

        late = bench.stream(bench.add("late", DELTA))
        waiting = asyncio.wait_for(anext(late), 0.001)
        with pytest.raises(TimeoutError):
            await waiting
        assert bench.aborted == ["cancelled", "closed", "context", "dropped", "late"]
        assert len(bench.table) == 0

    asyncio.run(main())


def test_leaving_while_it_starts_aborts() -> None:
    async def main() -> None:
        bench = Bench()
        request, may_start = bench.add("a", DELTA), asyncio.Event()

        async def start() -> Request:
            await may_start.wait()
            return request

        def abort(request: Request) -> None:
            bench.aborted += [request.request_id]
            request.abort()

        stream = RequestStream("a", start, abort, abort)
        task = asyncio.create_task(collect(stream))
        await turn()
        await stream.aclose()
        may_start.set()
        async with asyncio.timeout(10):
            assert [seen(output) for output in await task] == [[(0, [], "abort")]]
        assert bench.aborted == ["a"]

    asyncio.run(main())


def test_readers_on_a_loop_that_is_closed() -> None:
    """They are gone; what comes for them disturbs nobody, and aborts them."""
    bench = Bench()
    readers: list[asyncio.Task[Any]] = []

    async def leave() -> None:
        readers.append(asyncio.create_task(collect(bench.stream(bench.add("left", DELTA)))))
        readers.append(asyncio.create_task(bench.table.wait_until_empty()))
        await turn()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    readers.clear()

    async def main() -> None:
        waiting = asyncio.create_task(bench.table.wait_until_empty())
        good = asyncio.create_task(collect(bench.stream(bench.add("good", DELTA))))
        await turn()
        bench.step({0: 5, 1: 6})
        gc.collect()
        assert bench.aborted == ["left"]
        bench.step({1: 7}, end(1))
        assert [seen(output) for output in await good] == [[(0, [6, 7], "length")]]
        await waiting

    asyncio.run(main())


def test_one_reader_at_a_time() -> None:
    async def main() -> None:
        bench = Bench()
        stream = bench.stream(bench.add("a", DELTA))
        first = asyncio.create_task(collect(stream))
        await turn()
        with pytest.raises(RuntimeError, match="already has a reader"):
            await anext(stream)
        bench.step({0: 1}, end(0))
        assert len(await first) == 1

    asyncio.run(main())


def test_errors_reach_their_reader_alone() -> None:
    async def main() -> None:
        bench = Bench()
        bad, good = bench.stream(bench.add("bad", DELTA, n=2)), bench.stream(bench.add("good", DELTA))
        error = ErrorInfo("request", "too long", "prompt", "9", "8")
        assert bench.step({2: 5}, Finished(0, FinishReason.ERROR, None, error)) == [1]
        with pytest.raises(RequestError, match="too long") as caught:
            await anext(bad)
        assert (caught.value.parameter, caught.value.limit) == ("prompt", "8")
        assert seen(await anext(good)) == [(0, [5], None)]
        other = bench.stream(bench.add("other", DELTA))
        bench.table.fail_all(EngineDeadError("gone"))
        with pytest.raises(EngineDeadError, match="gone") as dead:
            await anext(good)
        with pytest.raises(EngineDeadError, match="gone") as dead_too:
            await anext(other)
        assert dead.value is not dead_too.value  # each has a traceback of its own
        assert len(bench.table) == 0

    asyncio.run(main())


def test_waiting_for_the_end_of_all() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.table.wait_until_empty()
        bench.add("a", FINAL)
        task = asyncio.create_task(bench.table.wait_until_empty())
        await turn()
        assert not task.done()
        bench.step({0: 5}, end(0))
        await task

    asyncio.run(main())


def test_numbers_start_again_before_int32_ends() -> None:
    bench = Bench()
    bench.table._next_number = 2**31 - 2
    assert bench.add("a", DELTA).first_number == 2**31 - 2
    assert bench.add("b", DELTA, n=2).first_number == 0


def test_timings_are_of_one_clock_and_in_order() -> None:
    async def run() -> None:
        bench = Bench()
        before = time.monotonic()
        request = bench.add("a", CUMULATIVE, n=2)
        waiting = bench.stream(request)
        bench.step({0: 5}, started=[Started(0, 1, 0.0)])
        first = (await anext(waiting)).metrics
        assert first is not None
        assert (first.num_generation_tokens, first.mean_inter_token_latency) == (1, None)
        assert first.first_token_ts == first.last_token_ts
        bench.step({0: 6, 1: 7}, started=[Started(1, 1, 1000.0)])  # the later start does not count
        bench.step({}, end(0), end(1))
        last = (await collect(waiting))[-1].metrics
        assert last is not None
        assert last.num_generation_tokens == 3
        times = [before, last.queued_ts, last.scheduled_ts, last.first_token_ts, last.last_token_ts]
        assert times == sorted(times)
        assert last.first_token_ts == first.first_token_ts
        assert last.mean_inter_token_latency == (last.last_token_ts - last.first_token_ts) / 2
        assert last.total_seconds == last.last_token_ts - last.queued_ts

    asyncio.run(run())


def test_a_request_that_waits_has_no_timings_but_its_arrival() -> None:
    async def run() -> None:
        bench = Bench()
        request = bench.add("a", CUMULATIVE)
        request.abort()
        metrics = request.take().metrics
        assert metrics is not None
        assert abs(metrics.arrival_time - time.time()) < 60
        assert (metrics.queued_seconds, metrics.prefill_seconds, metrics.first_token_latency) == (None,) * 3
        assert metrics.total_seconds is None

    asyncio.run(run())
