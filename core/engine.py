"""The engine's loop: messages in, plans to the workers, tokens out to the clients.

One thread. libzmq's own thread moves the clients' bytes and the kernel moves the workers', so what is left
here is deciding. The loop sleeps until a client or a worker has something to say; on a GPU it polls while
steps are in flight, for there a wake-up costs as much as a step's tenth.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable

import msgspec
import zmq

from ..ipc.config import EngineConfig
from ..ipc.errors import DrainingError, ErrorInfo, RequestError
from ..ipc.logs import fields
from ..ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Bye,
    Call,
    CommandResult,
    Dying,
    EngineInfo,
    Fatal,
    Finished,
    FinishReason,
    FromCore,
    Hello,
    Refused,
    Reply,
    StepOutputs,
    ToCore,
    Welcome,
)
from ..ipc.sockets import Delivery, ServerSocket
from .clients import Client, Splitter, shown_name
from .control import Control
from .intake import MAX_N, make_requests
from .ranks import SERVING, WorkerError
from .request import Request
from .scheduler import Scheduler
from .steps import BadResultError, Ended, Outputs
from .turns import Grant, Turns
from .workers import Workers

LOGGER = logging.getLogger(__name__)

_MAX_MESSAGES = 64
"""Client messages taken in between two steps, so that a flood of them does not stop the engine."""
_MAX_CLIENTS = 1024
_ROUND_SECONDS = 1.0
"""How often clients that get no output are looked after: one that is gone shows only when sent something."""
_RETRY_MS = 20
"""How soon a client that did not read is tried again."""
_ABOUT_TO_END = "the engine core is about to end"
_RETRY_AFTER_DRAIN = 5.0
"""Seconds: what a client may assume that a restart takes."""
_STRANGERS_SECONDS = 10.0
"""The log has at most one line in this time about those who are no clients."""


class Engine:
    """Serves clients of `server` with `workers`, both of which belong to the caller."""

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        server: ServerSocket,
        workers: Workers,
        wake: int,
        attend: Callable[[], None],
    ) -> None:
        """`wake` is a descriptor that becomes readable when a signal has come; `attend` is called then, and
        once a second."""
        self._config = config
        self._info = info
        self._server = server
        self._workers = workers
        self._scheduler = Scheduler(config, info.num_blocks, info.max_model_len)
        self._splitter = Splitter()
        self._control = Control(
            self._scheduler, config.tensor_parallel_size, lambda: workers.are_serving, self._abort_all
        )
        self._turns = Turns()
        self._clients: dict[bytes, Client] = {}
        self._num_clients = 0
        """Who ever came."""
        self._spins = config.device == "cuda"
        self._poller = zmq.Poller()
        for sock in server.sockets:
            self._poller.register(sock, zmq.POLLIN)
        self._poller.register(wake, zmq.POLLIN)
        self._watched: list[int] = []
        """The workers' descriptors in the poller."""
        self._woken = (wake, zmq.POLLIN)
        self._attend = attend
        self._next_round = 0.0
        self._next_stranger = 0.0
        self._drain_until: float | None = None

    def run(self) -> int:
        """Serve until drained; returns how many requests were cut off. Raises WorkerError when the workers
        cannot be revived, and what a signal handler raises."""
        while not self._is_drained():
            self._watch_workers()
            if self._woken in self._poller.poll(self._patience()):
                self._attend()
            for _ in range(_MAX_MESSAGES):
                received = self._server.recv()
                if received is None:
                    break
                self._handle(*received)
            self._step()
            self._look_after_clients()
        return self.num_requests

    def drain(self, seconds: float) -> None:
        """Take no more requests, and let `run` return when those at work have ended, or after `seconds`."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + seconds

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return sum(len(client.requests) for client in self._clients.values())

    def announce_death(self, error: ErrorInfo) -> None:
        """Tell every client that this is the end."""
        for identity in list(self._clients):
            self._server.send(identity, Dying(error))

    # --- steps --------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Take in results and send plans; the workers' next work goes out before the clients' tokens."""
        try:
            self._take_results()
            self._control_workers()  # when the tokens are delivered: a pause may end their requests
            self._send_plans()
        except (WorkerError, BadResultError) as error:
            self._deliver(self._restart(error))
        deadline = self._scheduler.next_deadline
        if deadline is not None and deadline <= time.monotonic():
            self._deliver(Outputs([], array("i"), [], self._scheduler.expire(time.monotonic())))

    def _take_results(self) -> None:
        brought: list[Outputs] = []
        try:
            while (result := self._workers.recv()) is not None:
                if isinstance(result, CommandResult):
                    self._control.hear(result)
                else:
                    brought.append(self._scheduler.update(result))
                    self._send_plans()
        finally:
            for outputs in brought:
                self._deliver(outputs)

    def _deliver(self, outputs: Outputs) -> None:
        for identity, message in self._splitter.split(outputs).items():
            if (client := self._clients.get(identity)) is not None:
                client.generation_tokens += len(message.tokens) // 4
                self._send(identity, message)
        for ended in outputs.ended:
            client = self._clients.get(ended.request.client)
            if client is not None:
                del client.requests[ended.request.number]

    def _restart(self, error: WorkerError | BadResultError) -> Outputs:
        """The workers have failed: they start again, and so does all that was running on them."""
        if isinstance(error, BadResultError):
            error = WorkerError(Fatal(0, SERVING, ErrorInfo.of(error)))
        outputs = self._scheduler.restart()
        self._control.workers_lost()
        self._workers.fail(error, progress=bool(outputs.ended))
        return outputs

    def _watch_workers(self) -> None:
        """Poll the descriptors of the workers that there are now."""
        descriptors = self._workers.descriptors()
        if descriptors != self._watched:
            for descriptor in self._watched:
                self._poller.unregister(descriptor)
            for descriptor in descriptors:
                self._poller.register(descriptor, zmq.POLLIN)
            self._watched = descriptors

    def _control_workers(self) -> None:
        """Go on with what clients have asked of the engine."""
        for identity, reply in self._control.advance():
            if identity in self._clients:
                self._send(identity, reply)
        for command in self._control.take_commands():
            self._workers.send(command)

    def _abort_all(self) -> None:
        requests = [request for client in self._clients.values() for request in client.requests.values()]
        for request in reversed(requests):  # the last in line first: then nobody has to move up
            self._scheduler.abort(request)
        ended = [Ended(request, FinishReason.ABORT, None) for request in requests]
        self._deliver(Outputs([], array("i"), [], ended))

    def _send_plans(self) -> None:
        if not self._workers.are_serving:
            return
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            self._workers.send(plan)

    def _patience(self) -> int:
        """Milliseconds to wait for news."""
        if self._spins and self._scheduler.num_in_flight:
            return 0
        patience = _RETRY_MS if self._server.has_undelivered else int(1000 * _ROUND_SECONDS)
        patience = min(patience, self._workers.patience_ms)
        if (deadline := self._scheduler.next_deadline) is None:
            return patience
        return min(patience, max(0, int(1000 * (deadline - time.monotonic())) + 1))

    def _trouble(self) -> str:
        """Why new requests would make no progress; empty when they would."""
        return self._workers.trouble or ("" if self._drain_until is None else _ABOUT_TO_END)

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        left = self.num_requests or self._server.has_undelivered
        return not left or time.monotonic() >= self._drain_until

    # --- clients ------------------------------------------------------------------------------------

    def _look_after_clients(self) -> None:
        if self._server.has_undelivered:
            for identity in self._server.deliver():
                self._forget(identity, Delivery.GONE.value)
        now = time.monotonic()
        if now < self._next_round:
            return
        self._next_round = now + _ROUND_SECONDS
        self._attend()
        if (address := self._server.take_refused()) is not None:
            LOGGER.warning("refused an unknown key", extra=fields(address=address))
        for identity in list(self._clients):
            self._send(identity, StepOutputs(b"", b""))
        self._grant(self._turns.expire(now))

    def _handle(self, identity: bytes, message: ToCore | msgspec.DecodeError) -> None:
        client = self._clients.get(identity)
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif client is None:
            self._refuse(identity, "the first message must be Hello")
        elif isinstance(message, msgspec.DecodeError):
            why = f"{message!s:.200}"  # it may quote what was sent
            self._server.tell(identity, Refused(PROTOCOL_VERSION, f"unreadable message: {why}"))
            if not client.complained:
                LOGGER.warning("unreadable message", extra=fields(client=client.name, error=why))
                client.complained = True
        elif isinstance(message, AddRequest):
            self._add(identity, client, message)
        elif isinstance(message, Abort):
            for number in message.requests:
                if (request := client.requests.pop(number, None)) is not None:
                    self._scheduler.abort(request)
        elif isinstance(message, Call):
            self._answer(identity, message)
        else:
            _: Bye = message
            self._forget(identity, "left")

    def _greet(self, identity: bytes, hello: Hello) -> None:
        name = shown_name(hello.client)
        if hello.protocol != PROTOCOL_VERSION:
            self._refuse(
                identity, f"the core speaks protocol {PROTOCOL_VERSION}, {name} speaks {hello.protocol}"
            )
            return
        self._forget(identity, "came back")
        if len(self._clients) >= _MAX_CLIENTS:
            self._refuse(identity, f"the core has {_MAX_CLIENTS} clients already")
            return
        self._num_clients += 1
        self._clients[identity] = Client(self._num_clients, name, time.monotonic())
        LOGGER.info("client is here", extra=fields(client=name))
        self._send(identity, Welcome(PROTOCOL_VERSION, self._config, self._info))

    def _refuse(self, identity: bytes, why: str) -> None:
        """Send someone away who is no client."""
        now = time.monotonic()
        if now >= self._next_stranger:
            self._next_stranger = now + _STRANGERS_SECONDS
            LOGGER.warning("refused a stranger", extra=fields(why=why))
        self._server.tell(identity, Refused(PROTOCOL_VERSION, why))

    def _add(self, identity: bytes, client: Client, message: AddRequest) -> None:
        """Queue the message's requests, all or none."""
        requests: list[Request] = []
        try:
            if self._drain_until is not None:
                raise DrainingError(_ABOUT_TO_END, retry_after=_RETRY_AFTER_DRAIN)
            for request in make_requests(identity, message, self._config, time.monotonic()):
                if request.number in client.requests:
                    text = f"request {request.number} is in use"
                    raise RequestError(text, parameter="request", value=request.number)
                self._scheduler.check(request)
                if not requests:  # now, not when there are thousands of copies of a long prompt
                    self._scheduler.check_room([request] * message.n)
                requests.append(request)
        except RequestError as error:
            info = ErrorInfo.of(error)
            count = message.n if 1 <= message.n <= MAX_N and message.request + message.n < 2**31 else 1
            numbers = range(message.request, message.request + count)
            finished = [Finished(number, FinishReason.ERROR, error=info) for number in numbers]
            self._send(identity, StepOutputs(b"", b"", finished=finished))
            return
        for request in requests:
            self._scheduler.add(request)
            client.requests[request.number] = request

    def _answer(self, identity: bytes, call: Call) -> None:
        """Reply to a call now, or leave it to `_control`."""
        match call.method:
            case "ping":
                self._send(identity, Reply(call.call, unhealthy=self._trouble()))
            case "stats":
                self._send(identity, self._stats(call))
            case "is_paused":
                self._send(identity, Reply(call.call, ok=self._control.is_paused))
            case "is_sleeping":
                self._send(identity, Reply(call.call, ok=self._control.sleep_level is not None))
            case "take_turn":
                self._grant(self._turns.ask(identity, call.call, time.monotonic()))
            case "pass_turn":
                self._send(identity, Reply(call.call))
                self._grant(self._turns.leave(identity, time.monotonic()))
            case _:
                try:
                    self._control.call(identity, call)
                except RequestError as error:
                    self._send(identity, Reply(call.call, ok=False, error=ErrorInfo.of(error)))

    def _grant(self, grant: Grant | None) -> None:
        """Tell a client that it is its turn; when it turns out to be gone, `_forget` finds the next."""
        if grant is not None:
            self._send(grant.client, Reply(grant.call))

    def _stats(self, call: Call) -> Reply:
        now = time.monotonic()
        shares = [client.stats(now) for client in self._clients.values()]
        stats = msgspec.structs.replace(
            self._scheduler.stats(),
            draining=self._drain_until is not None,
            num_restarts=self._workers.num_restarts,
            sleep_level=self._control.sleep_level,
        )
        return Reply(call.call, stats=stats, clients=shares)

    def _send(self, identity: bytes, message: FromCore) -> None:
        delivery = self._server.send(identity, message)
        if delivery is not Delivery.SENT:
            self._forget(identity, delivery.value)

    def _forget(self, identity: bytes, how: str) -> None:
        client = self._clients.pop(identity, None)
        if client is not None:
            for request in reversed(client.requests.values()):
                self._scheduler.abort(request)
            self._grant(self._turns.leave(identity, time.monotonic()))
            LOGGER.info(f"client {how}", extra=fields(client=client.name, requests=len(client.requests)))
            if how == Delivery.GONE.value and self._control.client_vanished(identity):
                LOGGER.warning(
                    "what it had asked of the engine ends with it", extra=fields(client=client.name)
                )
