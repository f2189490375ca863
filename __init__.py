"""Headrace: an LLM inference engine for programs that write `async for output in engine.generate(...)`.

Lazy on purpose: a worker process imports `headrace.worker` and must not pay for the frontend, and a program
that only asks for the version must not pay for either.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .frontend.async_llm import AsyncLLM, AsyncLLMEngine
    from .frontend.beam_search import BeamSearchParams
    from .frontend.engine_args import AsyncEngineArgs, EngineArgs
    from .frontend.llm import LLM
    from .frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from .frontend.sampling_params import RequestOutputKind, SamplingParams
    from .frontend.structured_outputs import StructuredOutputsParams
    from .frontend.timeouts import RequestTimeouts
    from .ipc.config import StructuredOutputsConfig
    from .ipc.errors import (
        ConfigError,
        DrainingError,
        EngineDeadError,
        EngineUnhealthyError,
        HeadraceError,
        OverloadedError,
        RequestCrashedError,
        RequestError,
    )

__version__ = "0.1.0"

_HOME = {
    "LLM": ".frontend.llm",
    "BeamSearchParams": ".frontend.beam_search",
    "AsyncEngineArgs": ".frontend.engine_args",
    "AsyncLLM": ".frontend.async_llm",
    "AsyncLLMEngine": ".frontend.async_llm",
    "CompletionOutput": ".frontend.outputs",
    "ConfigError": ".ipc.errors",
    "DrainingError": ".ipc.errors",
    "EngineArgs": ".frontend.engine_args",
    "EngineDeadError": ".ipc.errors",
    "EngineUnhealthyError": ".ipc.errors",
    "HeadraceError": ".ipc.errors",
    "OverloadedError": ".ipc.errors",
    "RequestCrashedError": ".ipc.errors",
    "RequestError": ".ipc.errors",
    "RequestMetrics": ".frontend.outputs",
    "RequestOutput": ".frontend.outputs",
    "RequestTimeouts": ".frontend.timeouts",
    "RequestOutputKind": ".frontend.sampling_params",
    "SamplingParams": ".frontend.sampling_params",
    "StructuredOutputsConfig": ".ipc.config",
    "StructuredOutputsParams": ".frontend.structured_outputs",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "DrainingError",
    "EngineArgs",
    "EngineDeadError",
    "EngineUnhealthyError",
    "HeadraceError",
    "OverloadedError",
    "RequestCrashedError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RequestTimeouts",
    "SamplingParams",
    "StructuredOutputsConfig",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
