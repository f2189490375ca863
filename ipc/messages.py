"""Every message between frontend, core and worker; docs/protocol.md is their prose.

One tagged union per pipe and direction. Messages are MessagePack arrays whose first element is the type's
name. Columns of integers travel as the bytes of little-endian int32 arrays (`pack` and `unpack`): two
microseconds for 256 requests where a list of structs takes thirty.

Rules of the pipes:
- Every request of an `AddRequest` ends with exactly one `Finished`, unless the client aborted it.
- Plans are executed in the order in which they were sent, and answered in that order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import IntEnum
from typing import Literal, TypeAlias

import msgspec

from .config import EngineConfig
from .errors import ErrorInfo

PROTOCOL_VERSION = 4
MAX_GRAMMAR = 1 << 20
"""Characters of `Sampling.grammar`."""


def pack(values: Iterable[int]) -> bytes:
    """Integers as the bytes of an int32 array."""
    return array("i", values).tobytes()


def unpack(column: bytes) -> array[int]:
    """The int32 array that `pack` made. Raises ValueError when the length is not a multiple of 4."""
    values = array("i")
    values.frombytes(column)
    return values


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of the tagged wire types. Subclasses repeat `frozen` for the type checkers."""


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of the untagged parts of messages."""


# --- requests: frontend <-> core ---------------------------------------------------------------------


class ThinkingBudget(Record, frozen=True):
    """A limit on a model's thinking: the tokens between `begin` and `end`."""

    budget: int
    """After so many the token `end` is forced."""
    begin: int
    end: int


class Sampling(Record, frozen=True):
    """The part of `SamplingParams` that the sampler applies. Neutral values switch a stage off."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int = 0
    """Key of the noise, 0 <= seed < 2**63; the frontend draws one for requests that name none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    eos_token_id: int | None = None
    """Ends the request without a stop reason; None with `ignore_eos`."""
    stop_token_ids: list[int] = []
    """End the request and are its stop reason."""
    bias_tokens: bytes = b""
    """int32 token ids, each once"""
    bias_values: bytes = b""
    """float32, what is added to their logits"""
    allowed_token_ids: bytes = b""
    """int32 token ids that alone may come; empty: all may"""
    bad_words: list[list[int]] = []
    """Sequences of token ids that must not be generated."""
    thinking: ThinkingBudget | None = None
    skip_reading_prefix_cache: bool = False
    grammar: str | None = None
    """What the text may be, in llguidance's own words (`ipc/grammars.py`)."""
    logprobs: int | None = None
    """Logprobs of so many of the likeliest tokens, and of the chosen one; None: of none."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first, which is computed anew for it."""
    logprob_token_ids: list[int] = []
    """Instead of the likeliest tokens: these, and the chosen one."""


class AddRequest(Message, frozen=True):
    """Start `n` generations from one prompt; they are numbered `request` .. `request + n - 1`.

    Numbers are the client's own and must not be in use. Generation i is seeded with `sampling.seed + i`.
    """

    request: int
    prompt: bytes
    """int32 token ids"""
    sampling: Sampling
    max_tokens: int
    n: int = 1
    priority: int = 0
    """Lower is earlier; only with `scheduling_policy="priority"`."""
    cache_salt: str = ""
    """Requests share cached prefixes only with those of the same salt."""
    queue_timeout: float | None = None
    """Seconds from its arrival at the core until it must have left the queue."""
    first_token_timeout: float | None = None
    """Seconds until it must have a token."""
    total_timeout: float | None = None
    """Seconds until it must have ended."""
    generated: bytes = b""
    """int32, the tokens that this generation has brought already, from another core; only with `n` 1. What
    follows is what would have followed there: `max_tokens`, `min_tokens` and penalties count them."""


class Abort(Message, frozen=True):
    """Forget these requests. They get no further message, not even `Finished`; unknown ones are ignored."""

    requests: list[int]


CallMethod: TypeAlias = Literal[
    "collective_rpc",
    "is_paused",
    "is_sleeping",
    "pass_turn",
    "pause_generation",
    "ping",
    "reset_prefix_cache",
    "resume_generation",
    "sleep",
    "start_profile",
    "stats",
    "stop_profile",
    "take_turn",
    "wake_up",
]
RpcMethod: TypeAlias = Literal["memory_stats", "rank", "weights_checksum"]
"""What `collective_rpc` may ask of the workers."""
Argument: TypeAlias = str | int | float | bool | list[str] | None


class Call(Message, frozen=True):
    """Ask the core something; answered by one `Reply` with the same number."""

    call: int
    method: str
    """A `CallMethod`; others are answered by an error."""
    arguments: dict[str, Argument] = {}


class Hello(Message, frozen=True):
    """A client's first message, answered by `Welcome` or `Refused`. Its shape never changes."""

    protocol: int
    client: str
    """What to call the client in logs."""


class Bye(Message, frozen=True):
    """The client leaves: all its requests are aborted."""


class EngineInfo(Record, frozen=True):
    """What only the running engine knows."""

    max_model_len: int
    num_blocks: int
    pid: int
    version: str
    """Headrace's version in the core."""
    life: str = ""
    """No other core's: who has lost the connection knows whether it has lost the core. Empty: unknown."""


class Welcome(Message, frozen=True):
    """The client may send requests. Carries the whole configuration: an address is all it needs."""

    protocol: int
    config: EngineConfig
    info: EngineInfo


class Refused(Message, frozen=True):
    """The core will not talk to this client. Its shape never changes."""

    protocol: int
    message: str


class FinishReason(IntEnum):
    """Why a request ended; `str()` gives the public name."""

    STOP = 0
    """End-of-sequence token, stop token or (in the frontend) stop string."""
    LENGTH = 1
    """`max_tokens` or the context length."""
    ABORT = 2
    ERROR = 3
    TIMEOUT = 4
    """One of its timeouts passed."""
    REPETITION = 5
    """The output repeats itself (found by the frontend)."""

    def __str__(self) -> str:
        return self.name.lower()


class Started(Record, frozen=True):
    """A request left the queue for the first time."""

    request: int
    num_cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    queued_seconds: float


class Finished(Record, frozen=True):
    """A request ended, after the tokens of the same message."""

    request: int
    reason: FinishReason
    stop_token_id: int | None = None
    """Set when one of `stop_token_ids` ended it."""
    error: ErrorInfo | None = None


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Bounds for counting steps by their tokens, vLLM's."""


class Stats(Record, frozen=True):
    """The engine at one moment; counters run from its start."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens found."""
    draining: bool = False
    """The core is about to end: requests at work are finished, new ones refused."""
    num_restarts: int = 0
    """Of the workers, after they had died or hung."""
    num_replays: int = 0
    """Requests that were run again after that."""
    sleep_level: int | None = None
    """None: awake; 1, 2: the weights are on the host, or nowhere; 0: it only takes no work."""
    step_tokens: int = 0
    """Tokens of all steps."""
    steps_by_tokens: list[int] = []
    """How many steps had at most `STEP_TOKENS[i]` tokens, and more than the bound before; the last, more."""


class ClientStats(Record, frozen=True):
    """One client's share of the engine; counters run from its Hello."""

    name: str
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    """KV blocks of its requests; a block that clients share counts for each."""
    generation_tokens: int = 0
    connected_seconds: float = 0.0
    id: int = 0
    """Clients are numbered as they come; no number is used twice."""


class Logprobs(Record, frozen=True):
    """Logprobs of some rows, as columns. A row's first entry is the token that was chosen or stands there."""

    rows: bytes
    """int32[n]: rows of the message's tokens; in a prompt, positions of the tokens"""
    counts: bytes
    """int32[n], how many entries each has"""
    token_ids: bytes
    """int32[sum of counts]"""
    values: bytes
    """float32[sum of counts]"""
    ranks: bytes
    """int32[sum of counts]: 1 + how many tokens of the vocabulary have a larger value"""


class PromptLogprobs(Record, frozen=True):
    """Some of the logprobs of a prompt. Positions come in order, but some may come again."""

    request: int
    """Between core and worker: the row of the plan."""
    logprobs: Logprobs


class StepOutputs(Message, frozen=True):
    """What one engine step brought one client."""

    requests: bytes
    """int32[n], the requests that got a token"""
    tokens: bytes
    """int32[n], their tokens"""
    started: list[Started] = []
    finished: list[Finished] = []
    logprobs: Logprobs | None = None
    """Of the tokens of requests that asked for them."""
    prompt_logprobs: list[PromptLogprobs] = []


class Reply(Message, frozen=True):
    """The answer to a `Call`."""

    call: int
    ok: bool = True
    stats: Stats | None = None
    error: ErrorInfo | None = None
    """Why nothing was done."""
    results: list[dict[str, Argument]] = []
    """One for each rank, when the workers were asked."""
    clients: list[ClientStats] = []
    """With `stats`: everyone who is connected."""
    unhealthy: str = ""
    """To a ping: why requests make no progress at present; empty when all is well."""


class Dying(Message, frozen=True):
    """The core cannot go on; the last message it sends."""

    error: ErrorInfo


ToCore: TypeAlias = Hello | AddRequest | Abort | Call | Bye
FromCore: TypeAlias = Welcome | Refused | StepOutputs | Reply | Dying


# --- steps: core <-> worker --------------------------------------------------------------------------


class Admit(Record, frozen=True):
    """A request takes a slot. Its row starts at position `num_computed`."""

    slot: int
    tokens: bytes
    """int32, the prompt and, after a preemption, the tokens generated so far"""
    num_prompt_tokens: int
    num_computed: int
    """Leading tokens whose KV is already in `blocks`."""
    blocks: bytes
    """int32 block ids of its table so far"""
    sampling: Sampling


class StepPlan(Message, frozen=True):
    """One forward pass, as the difference to what the worker already knows. Applied in field order.

    A row samples a token exactly when it reaches the end of its slot's tokens; the sampled token is appended
    to them on the worker, so the next plan may run the row on before the core has seen the token.
    """

    step: int
    released: bytes
    """int32 slots whose requests ended or were preempted"""
    admitted: list[Admit]
    granted: bytes
    """int32 pairs (slot, block id): blocks appended to the tables of running slots, in order"""
    slots: bytes | None
    """int32[rows], the slots that run; None: the rows of the step before, one token each"""
    num_tokens: bytes | None
    """int32[rows], how many tokens each computes"""


class FailedRow(Record, frozen=True):
    """A request that cannot go on: the token of its row means nothing."""

    row: int
    """Among the sampling rows."""
    error: ErrorInfo


class StepResult(Message, frozen=True):
    """The answer to the plan with the same number; only rank 0 sends it."""

    step: int
    tokens: bytes
    """int32, one token for each sampling row, in the plan's row order"""
    failed: list[FailedRow] = []
    logprobs: Logprobs | None = None
    """Of the sampling rows that want them."""
    prompt_logprobs: list[PromptLogprobs] = []


class Loaded(Message, frozen=True):
    """The weights are on the device."""

    rank: int
    num_blocks: int
    """KV blocks that fit here."""
    block_bytes: int
    arithmetic: str
    """How `num_blocks` came about, for error messages."""


class Allocate(Message, frozen=True):
    """Make the KV cache, of the smallest rank's size."""

    num_blocks: int
    max_model_len: int


class WorkerReady(Message, frozen=True):
    """The worker takes plans."""

    rank: int


class Command(Message, frozen=True):
    """Something to do besides steps; every rank gets it when no step is under way, and answers it."""

    number: int
    name: RpcMethod | Literal["sleep", "start_profile", "stop_profile", "wake_up"]
    arguments: dict[str, Argument] = {}


class CommandResult(Message, frozen=True):
    """The answer to the command with the same number."""

    rank: int
    number: int
    result: dict[str, Argument] = {}
    error: ErrorInfo | None = None


class Prepared(Message, frozen=True):
    """A rank of several has used idle time: it can run steps in `count` more ways than at its start."""

    rank: int
    count: int
    """The first so many of a list that is the same on all ranks."""


class UsePrepared(Message, frozen=True):
    """All ranks have prepared the first `count`. Between the same two plans on all ranks: how a step is run
    decides what the ranks exchange in it.
    """

    count: int


class Progress(Message, frozen=True):
    """A phase of the start-up begins."""

    rank: int | None
    """None: the core itself"""
    phase: str


class Compiling(Message, frozen=True):
    """A rank compiles a kernel, and answers nothing until that has ended."""

    rank: int
    kernel: str
    """Empty: it has ended. Of several at once a name for them all, again whenever one of them is done."""


class Fatal(Message, frozen=True):
    """The sender ends because of this."""

    rank: int | None
    phase: str
    error: ErrorInfo
    at: float = 0.0
    """When it failed (time.monotonic, the same clock for all processes of a host)."""


class Ready(Message, frozen=True):
    """The core serves at `address`."""

    address: str
    info: EngineInfo


ToWorker: TypeAlias = Allocate | StepPlan | UsePrepared | Command
FromWorker: TypeAlias = (
    Progress | Loaded | WorkerReady | StepResult | Prepared | Compiling | CommandResult | Fatal
)
FromStarting: TypeAlias = Progress | Ready | Fatal
