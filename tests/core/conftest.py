"""A scheduler of a small engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from headrace.core.scheduler import Scheduler
from headrace.ipc.config import EngineConfig

from .plans import MakeScheduler


@pytest.fixture
def make(make_config: Callable[..., EngineConfig]) -> MakeScheduler:
    def make_scheduler(num_blocks: int = 16, **changes: object) -> Scheduler:
        config = make_config(**changes)
        return Scheduler(config, num_blocks, config.max_model_len)

    return make_scheduler
