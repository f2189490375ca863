"""`headrace status`: what an engine core is doing, and for whom, as a table that renews itself."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

import msgspec

from .. import __version__
from ..ipc.addresses import check_address, check_listening
from ..ipc.curve import ClientKeys
from ..ipc.errors import EngineDeadError
from ..ipc.messages import Bye, Call, CallMethod, ClientStats, Reply, Stats
from .handshake import connect

_ANSWER_SECONDS = 10.0
_CLEAR = "\x1b[H\x1b[2J"


class ClientStatus(msgspec.Struct, frozen=True):
    """One client's line."""

    name: str
    num_running: int
    num_waiting: int
    num_blocks: int
    generation_tokens: int
    tokens_per_second: float
    connected_seconds: float


class Status(msgspec.Struct, frozen=True):
    """An engine core at one moment. Rates are of the time since the sample before."""

    address: str
    model: str
    pid: int
    state: str
    """"serving", "draining", or why it is not healthy."""
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    steps_per_second: float
    num_preemptions: int
    num_restarts: int
    prefix_cache_hit_rate: float | None
    """Of all prompt tokens since its start; None before the first."""
    clients: list[ClientStatus]


class StatusConnection:
    """Asks a core about itself."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        """Raises ConfigError."""
        check_address(address, "ADDRESS", has_keys=keys is not None)
        check_listening(address, "ADDRESS")
        name = f"headrace {__version__} status, pid {os.getpid()}"
        self._socket, self._welcome = connect(address, name, keys)
        self._address = address
        self._before = self._sample()

    def next(self, seconds: float) -> Status:
        """The status after `seconds` from the last sample. Raises EngineDeadError."""
        time.sleep(max(0.0, self._before.time + seconds - time.monotonic()))
        before, now = self._before, self._sample()
        self._before = now
        passed = now.time - before.time

        def rate(name: str) -> float:
            grown: int = getattr(now.stats, name) - getattr(before.stats, name)
            return grown / passed

        tokens_before = {client.id: client.generation_tokens for client in before.clients}
        stats, queries = now.stats, now.stats.prefix_cache_queries
        return Status(
            address=self._address,
            model=self._welcome.config.served_model_name,
            pid=self._welcome.info.pid,
            state="draining" if stats.draining else now.trouble or "serving",
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_blocks=stats.num_blocks,
            num_free_blocks=stats.num_free_blocks,
            prompt_tokens_per_second=rate("prompt_tokens"),
            tokens_per_second=rate("generation_tokens"),
            steps_per_second=rate("num_steps"),
            num_preemptions=stats.num_preemptions,
            num_restarts=stats.num_restarts,
            prefix_cache_hit_rate=stats.prefix_cache_hits / queries if queries else None,
            clients=[
                ClientStatus(
                    name=client.name,
                    num_running=client.num_running,
                    num_waiting=client.num_waiting,
                    num_blocks=client.num_blocks,
                    generation_tokens=client.generation_tokens,
                    tokens_per_second=(client.generation_tokens - tokens_before.get(client.id, 0)) / passed,
                    connected_seconds=client.connected_seconds,
                )
                for client in now.clients
            ],
        )

    def close(self) -> None:
        self._socket.send(Bye())
        self._socket.close()

    def _sample(self) -> _Sample:
        trouble = self._ask("ping").unhealthy
        reply = self._ask("stats")
        assert reply.stats is not None
        return _Sample(time.monotonic(), trouble, reply.stats, reply.clients)

    def _ask(self, method: CallMethod) -> Reply:
        sock = self._socket
        sock.send(Call(0, method))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            message = sock.recv(min(left, 0.1))
            # Its last words may have come since we looked.
            if message is None and sock.lost_connection() and (message := sock.recv()) is None:
                raise EngineDeadError(f"the engine core at {self._address!r} is gone")
            if isinstance(message, Reply):
                return message
        raise EngineDeadError(f"the engine core at {self._address!r} does not answer")


class _Sample(msgspec.Struct, frozen=True):
    time: float
    trouble: str
    stats: Stats
    clients: list[ClientStats]


def watch(connection: StatusConnection, out: TextIO, *, interval: float, once: bool, as_json: bool) -> int:
    """Print the status every `interval` seconds, or once; returns the exit code."""
    live = out.isatty() and not once and not as_json
    try:
        while True:
            status = connection.next(interval)
            shown = msgspec.json.encode(status).decode() if as_json else table(status)
            print(_CLEAR * live + shown, file=out, flush=True)
            if once:
                return 0
    except KeyboardInterrupt:
        return 0
    except EngineDeadError as error:
        print(f"headrace status: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()


def table(status: Status) -> str:
    """For a terminal of 100 columns."""
    used = status.num_blocks - status.num_free_blocks
    hits = status.prefix_cache_hit_rate
    lines = [
        f"{status.model} at {status.address} (pid {status.pid}): {status.state}",
        f"requests   {status.num_running} running, {status.num_waiting} waiting",
        f"KV blocks  {used} of {status.num_blocks} in use ({100 * used / status.num_blocks:.1f} %)",
        f"tokens/s   {status.tokens_per_second:.1f} generated, {status.prompt_tokens_per_second:.1f} prompt",
        f"steps/s    {status.steps_per_second:.1f}",
        f"so far     {status.num_preemptions} preemptions, {status.num_restarts} restarts of the workers, "
        + ("no prefix looked up" if hits is None else f"{100 * hits:.1f} % of prompt tokens were cached"),
        "",
        _row("CLIENT", "RUNNING", "WAITING", "BLOCKS", "TOKENS/S", "TOKENS", "HERE"),
    ]
    for each in status.clients:
        counts = (each.num_running, each.num_waiting, each.num_blocks)
        tokens = (f"{each.tokens_per_second:.1f}", each.generation_tokens)
        lines.append(_row(each.name, *counts, *tokens, _duration(each.connected_seconds)))
    return "\n".join(lines)


def _row(name: str, *cells: object) -> str:
    return f"{name:<40.40}" + "".join(f" {cell!s:>9}" for cell in cells)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60:02} m"
    return f"{minutes} m {int(seconds) % 60:02} s" if minutes else f"{int(seconds)} s"
