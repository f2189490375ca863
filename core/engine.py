"""The engine's loop: messages in, plans to the workers, tokens out to the clients.

One thread. libzmq's own thread moves the clients' bytes and the kernel moves the workers', so what is left
here is deciding. The loop sleeps until a client or a worker has something to say; on a GPU it polls while
steps are in flight, for there a wake-up costs as much as a step's tenth.
"""

from __future__ import annotations

import logging
import time
from typing import get_args

import msgspec
import zmq

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, RequestError
from ..ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Bye,
    Call,
    CallMethod,
    Dying,
    EngineInfo,
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
from ..ipc.sockets import ServerSocket
from .clients import Client, Splitter
from .intake import MAX_N, make_requests
from .request import Request
from .scheduler import Outputs, Scheduler
from .workers import Workers

LOGGER = logging.getLogger(__name__)

_MAX_MESSAGES = 64
"""Client messages taken in between two steps, so that a flood of them does not stop the engine."""


class Engine:
    """Serves clients of `server` with `workers`, both of which belong to the caller."""

    def __init__(
        self, config: EngineConfig, info: EngineInfo, server: ServerSocket, workers: Workers, wake: int
    ) -> None:
        """`wake` is a descriptor that becomes readable when a signal has come."""
        self._config = config
        self._info = info
        self._server = server
        self._workers = workers
        self._scheduler = Scheduler(config, info.num_blocks, info.max_model_len)
        self._splitter = Splitter()
        self._clients: dict[bytes, Client] = {}
        self._spins = config.device == "cuda"
        self._poller = zmq.Poller()
        self._poller.register(server.socket, zmq.POLLIN)
        for descriptor in (wake, *workers.descriptors()):
            self._poller.register(descriptor, zmq.POLLIN)

    def run(self) -> None:
        """Serve until something is raised: WorkerError, or what a signal handler raises."""
        while True:
            self._poller.poll(0 if self._spins and self._scheduler.num_in_flight else None)
            for _ in range(_MAX_MESSAGES):
                received = self._server.recv()
                if received is None:
                    break
                self._handle(*received)
            self._step()

    def announce_death(self, error: ErrorInfo) -> None:
        """Tell every client that this is the end."""
        for identity in list(self._clients):
            self._server.send(identity, Dying(error))

    # --- steps --------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Take in results and send plans; the workers' next work goes out before the clients' tokens."""
        brought: list[Outputs] = []
        while (result := self._workers.recv()) is not None:
            brought.append(self._scheduler.update(result))
            self._send_plans()
        self._send_plans()
        for outputs in brought:
            for identity, message in self._splitter.split(outputs).items():
                if (client := self._clients.get(identity)) is not None:
                    client.generation_tokens += len(message.tokens) // 4
                    self._send(identity, message)
            for ended in outputs.ended:
                client = self._clients.get(ended.request.client)
                if client is not None:
                    del client.requests[ended.request.number]

    def _send_plans(self) -> None:
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            self._workers.send(plan)

    # --- clients ------------------------------------------------------------------------------------

    def _handle(self, identity: bytes, message: ToCore | msgspec.DecodeError) -> None:
        client = self._clients.get(identity)
        if isinstance(message, Hello):
            self._greet(identity, message)
        elif client is None:
            LOGGER.info("refused a message from a client that has not said Hello")
            self._server.send(identity, Refused(PROTOCOL_VERSION, "the first message must be Hello"))
        elif isinstance(message, msgspec.DecodeError):
            self._server.send(identity, Refused(PROTOCOL_VERSION, f"unreadable message: {message}"))
            if not client.complained:
                LOGGER.warning("unreadable message from %s: %s", client.name, message)
                client.complained = True
        elif isinstance(message, AddRequest):
            self._add(identity, client, message)
        elif isinstance(message, Abort):
            for number in message.requests:
                if (request := client.requests.pop(number, None)) is not None:
                    self._scheduler.abort(request)
        elif isinstance(message, Call):
            self._send(identity, self._answer(message))
        else:
            _: Bye = message
            self._forget(identity, "left")

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            message = f"the core speaks protocol {PROTOCOL_VERSION}, {hello.client} speaks {hello.protocol}"
            LOGGER.warning("refused: %s", message)
            self._server.send(identity, Refused(PROTOCOL_VERSION, message))
            return
        if identity not in self._clients:
            self._clients[identity] = Client(hello.client, time.monotonic())
            LOGGER.info("%s is here", hello.client)
        self._send(identity, Welcome(PROTOCOL_VERSION, self._config, self._info))

    def _add(self, identity: bytes, client: Client, message: AddRequest) -> None:
        """Queue the message's requests, all or none."""
        requests: list[Request] = []
        try:
            for request in make_requests(identity, message, self._config.vocab_size, time.monotonic()):
                if request.number in client.requests:
                    text = f"request {request.number} is in use"
                    raise RequestError(text, parameter="request", value=request.number)
                self._scheduler.check(request)
                requests.append(request)
        except RequestError as error:
            info = ErrorInfo.of(error)
            count = message.n if 1 <= message.n <= MAX_N else 1
            numbers = range(message.request, message.request + count)
            finished = [Finished(number, FinishReason.ERROR, error=info) for number in numbers]
            self._send(identity, StepOutputs(b"", b"", finished=finished))
            return
        for request in requests:
            self._scheduler.add(request)
            client.requests[request.number] = request

    def _answer(self, call: Call) -> Reply:
        match call.method:
            case "ping":
                return Reply(call.call)
            case "stats":
                now = time.monotonic()
                shares = [client.stats(now) for client in self._clients.values()]
                return Reply(call.call, stats=self._scheduler.stats(), clients=shares)
            case "reset_prefix_cache":
                return Reply(call.call, ok=self._scheduler.reset_prefix_cache())
        error = RequestError(
            f"there is no method {call.method!r:.100}",
            parameter="method",
            limit=", ".join(get_args(CallMethod)),
        )
        return Reply(call.call, ok=False, error=ErrorInfo.of(error))

    def _send(self, identity: bytes, message: FromCore) -> None:
        if not self._server.send(identity, message):
            self._forget(identity, "vanished")

    def _forget(self, identity: bytes, how: str) -> None:
        client = self._clients.pop(identity, None)
        if client is not None:
            for request in client.requests.values():
                self._scheduler.abort(request)
            LOGGER.info("%s %s with %d requests running", client.name, how, len(client.requests))
