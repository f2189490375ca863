"""Whatever the core sends: a worker that cannot follow says so and ends; no plan reaches foreign memory."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Admit, Fatal, Sampling, StepPlan, pack
from headrace.ipc.pipe import frame
from headrace.worker.in_order import InOrder
from headrace.worker.oracle import OracleBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tests.worker.conftest import Request, StartWorker

NUM_SLOTS, NUM_BLOCKS, MAX_MODEL_LEN = 4, 16, 64


@pytest.mark.parametrize("seed", range(3))
def test_garbage_ends_a_worker_with_a_word(
    start_worker: StartWorker, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes that are no messages, torn messages, and a length that nobody could send."""
    rng = random.Random(seed)
    plan = bytearray(frame(msgspec.msgpack.encode(StepPlan(0, b"", [], b"", pack([0]), pack([1])))))
    match seed % 3:
        case 0:
            data = frame(rng.randbytes(200))
        case 1:
            del plan[rng.randint(6, len(plan) - 1) :]
            plan[:4] = struct.pack("<I", len(plan) - 4)
            data = bytes(plan)
        case _:
            data = struct.pack("<I", rng.randint((1 << 30) + 1, (1 << 32) - 1)) + rng.randbytes(100)
    worker = start_worker()
    worker.start()
    worker.pipe.send_frame(data)
    fatal = worker.recv()
    assert isinstance(fatal, Fatal)
    assert (fatal.phase, fatal.error.kind) == ("waiting for a plan", "dead")
    assert fatal.error.message.startswith("the core sent what cannot be read: ")
    assert worker.ended().endswith("exited with code 1")
    assert capfd.readouterr().err == ""


int32s = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 20)
columns = st.binary(max_size=20) | st.lists(int32s, max_size=6).map(pack)
admits = st.builds(
    Admit,
    slot=st.integers(-2, 5) | st.integers(-(2**63), 2**63 - 1),
    tokens=columns,
    num_prompt_tokens=st.integers(-2, 70),
    num_computed=st.integers(-2, 70),
    blocks=columns,
    sampling=st.just(Sampling()),
)
plans = st.builds(
    StepPlan,
    step=st.integers(0, 3),
    released=columns,
    admitted=st.lists(admits, max_size=2),
    granted=columns,
    slots=st.none() | columns,
    num_tokens=st.none() | columns,
)


@given(plans=st.lists(plans, min_size=1, max_size=4))
@settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_plans_of_every_kind(
    make_config: Callable[..., EngineConfig], new_request: type[Request], plans: list[StepPlan]
) -> None:
    """Each is followed or refused; what was admitted before keeps its tokens and its blocks."""
    config = make_config(max_num_seqs=NUM_SLOTS, max_model_len=MAX_MODEL_LEN)
    runner = InOrder(config, OracleBackend(config))
    runner.allocate(NUM_BLOCKS, MAX_MODEL_LEN)
    request = new_request(3, [1, 2, 3], seed=1)
    request.blocks = [15]
    runner.submit(StepPlan(0, b"", [request.admit()], b"", pack([3]), pack([3])))
    before = runner._slots.tokens[3, :3].copy()
    for plan in plans:
        touches = 3 in np.frombuffer(plan.released[: len(plan.released) // 4 * 4], np.int32)
        try:
            runner.submit(plan)
        except Exception:  # a worker ends with any of them; what matters is that there is no other way out
            return
        if touches:
            return
        assert (runner._slots.tokens[3, :3] == before).all()
        assert runner._slots.block_tables.min() >= 0
        assert runner._slots.block_tables.max() < NUM_BLOCKS
