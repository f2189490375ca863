"""The wire between clients and core, byte for byte: `golden_frames.json` changes only with the version."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import (
    ConfigError,
    DrainingError,
    EngineDeadError,
    ErrorInfo,
    OverloadedError,
    RequestCrashedError,
    RequestError,
)
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Bye,
    Call,
    ClientStats,
    Dying,
    EngineInfo,
    Finished,
    FinishReason,
    FromCore,
    Hello,
    Logprobs,
    PromptLogprobs,
    Refused,
    Reply,
    Sampling,
    Started,
    Stats,
    StepOutputs,
    StepPlan,
    ThinkingBudget,
    ToCore,
    Welcome,
    pack,
    unpack,
)

CONFIG = EngineConfig(
    model="m",
    model_path="/m",
    served_model_name="m",
    tokenizer=None,
    hf_config={},
    architecture="A",
    vocab_size=10,
    eos_token_ids=[2],
    default_sampling={"top_p": 0.5},
    dtype="bfloat16",
    device="cpu",
    load_format="oracle",
    seed=0,
    tensor_parallel_size=1,
    enforce_eager=False,
    max_model_len=64,
    max_model_len_is_explicit=True,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    enable_chunked_prefill=True,
    enable_prefix_caching=True,
    scheduling_policy="fcfs",
    max_queued_requests=100,
    max_queued_tokens=10_000,
    block_size=16,
    num_gpu_blocks_override=None,
    gpu_memory_utilization=0.9,
    kv_cache_memory_bytes=None,
    torch_profiler_dir=None,
    log_stats=True,
    max_logprobs=20,
    logprobs_mode="raw_logprobs",
)
SAMPLING = Sampling(
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    min_p=0.1,
    seed=7,
    presence_penalty=0.25,
    frequency_penalty=-0.5,
    repetition_penalty=1.5,
    min_tokens=3,
    eos_token_id=2,
    stop_token_ids=[4, 5],
    bias_tokens=pack([6]),
    bias_values=array("f", [-1.5]).tobytes(),
    allowed_token_ids=pack([6, 7]),
    bad_words=[[8], [9, 8]],
    thinking=ThinkingBudget(10, 8, 9),
    skip_reading_prefix_cache=True,
    grammar="start: /a/",
    logprobs=1,
    prompt_logprobs=0,
    logprob_token_ids=[3],
)
LOGPROBS = Logprobs(pack([0]), pack([2]), pack([9, 5]), array("f", [-1.5, -0.5]).tobytes(), pack([2, 1]))
ERROR = ErrorInfo("request", "n must be >= 1, got 0", "n", "0", ">= 1")
TO_CORE: list[ToCore] = [
    Hello(PROTOCOL_VERSION, "doc"),
    AddRequest(7, pack([1, 2, -3]), SAMPLING, 8, 2, -1, "salt", 0.5, 2.0, None, pack([4])),
    Abort([7, 8]),
    Call(3, "stats", {"a": 1, "b": ["c"]}),
    Bye(),
]
FROM_CORE: list[FromCore] = [
    Welcome(PROTOCOL_VERSION, CONFIG, EngineInfo(64, 100, 4321, "0.1.0", "f00d")),
    Refused(PROTOCOL_VERSION, "no"),
    StepOutputs(
        pack([7]),
        pack([9]),
        [Started(7, 16, 0.5)],
        [Finished(7, FinishReason.STOP, 9), Finished(8, FinishReason.ERROR, None, ERROR)],
        LOGPROBS,
        [PromptLogprobs(8, LOGPROBS)],
    ),
    Reply(
        3,
        True,
        Stats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, True, 11, 12, 1, 13, [14, 15]),
        None,
        [{"rank": 0}],
        [ClientStats("doc", 1, 2, 3, 4, 0.5, 6)],
        "recovering",
    ),
    Dying(ErrorInfo("dead", "worker 0 was killed by SIGKILL")),
]
GOLDEN: dict[str, str] = json.loads(Path(__file__).with_name("golden_frames.json").read_text())


@pytest.mark.parametrize(
    ("message", "union"),
    [*((message, ToCore) for message in TO_CORE), *((message, FromCore) for message in FROM_CORE)],
    ids=lambda value: type(value).__name__,
)
def test_golden_frames(message: msgspec.Struct, union: Any) -> None:
    golden = bytes.fromhex(GOLDEN[f"{PROTOCOL_VERSION} {type(message).__name__}"])
    assert msgspec.msgpack.encode(message) == golden
    assert msgspec.msgpack.decode(golden, type=union) == message


def test_every_message_has_a_golden_frame() -> None:
    members = {member.__name__ for union in (ToCore, FromCore) for member in get_args(union)}
    assert {name.split()[1] for name in GOLDEN} == members


def test_defaults_may_be_left_out_and_more_is_ignored() -> None:
    short = msgspec.msgpack.encode(["AddRequest", 1, pack([1]), [0.0], 8])
    assert msgspec.msgpack.decode(short, type=ToCore) == AddRequest(1, pack([1]), Sampling(0.0), 8)
    long = msgspec.msgpack.encode(["Bye", "and", "more"])
    assert msgspec.msgpack.decode(long, type=ToCore) == Bye()


def test_columns_are_int32() -> None:
    assert pack([1, -2]) == b"\x01\0\0\0\xfe\xff\xff\xff"
    assert list(unpack(pack([1, -2]))) == [1, -2]
    with pytest.raises(ValueError, match="multiple"):
        unpack(b"abc")
    with pytest.raises(OverflowError):
        pack([1 << 31])


def test_plans_keep_none_apart_from_empty() -> None:
    for slots in (None, b""):
        plan = StepPlan(1, b"", [], b"", slots, None)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan).slots == slots


def test_errors_travel() -> None:
    refused = RequestError("n must be >= 1, got 0", parameter="n", value=0, limit=">= 1")
    back = ErrorInfo.of(refused).exception()
    assert isinstance(back, RequestError)
    assert (str(back), back.parameter, back.value, back.limit) == (str(refused), "n", "0", ">= 1")
    for error in (
        ConfigError("x"),
        RequestError("x"),
        RequestCrashedError("x"),
        OverloadedError("x", retry_after=1),
        DrainingError("x", retry_after=1),
    ):
        there = ErrorInfo.of(error).exception()
        assert (type(there), there.code) == (type(error), ErrorInfo.of(error).kind)
    full = ErrorInfo.of(OverloadedError("full", retry_after=2.5, parameter="max_queued_requests", limit=8))
    overloaded = full.exception()
    assert type(overloaded) is OverloadedError
    assert (overloaded.retry_after, overloaded.parameter, overloaded.limit) == (
        2.5,
        "max_queued_requests",
        "8",
    )
    dead = ErrorInfo.of(KeyError("slot")).exception()
    assert isinstance(dead, EngineDeadError)
    assert str(dead) == "KeyError: 'slot'"
    assert str(FinishReason.LENGTH) == "length"
