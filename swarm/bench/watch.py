"""When a session's bytes left and came: stamps on its streams, for the bench.

1. What is watched is what any client does: bytes pass unchanged, nothing is added but the stamps.
2. The streams of a session are stamped for the task that opened it; other tasks' are left alone.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import trio

from swarm.messages import CHAIN_PROTOCOL
from swarm.transport import Host, Stream


@dataclass(slots=True)
class Stamps:
    """The first write since `expect`, and the last read, of one session's streams."""

    written: float | None = None
    came: float = field(default=float("-inf"))

    def expect(self) -> None:
        """The next write is that of a step."""
        self.written = None

    def write(self) -> None:
        """Bytes are written now."""
        if self.written is None:
            self.written = trio.current_time()

    def read(self) -> None:
        """Bytes came now."""
        self.came = trio.current_time()


# Links opens its streams in tasks of their own: these inherit the context of the one that asked.
_of_this_task: ContextVar[Stamps | None] = ContextVar("stamps", default=None)


def stamped() -> Stamps:
    """Return the stamps of all sessions that this task opens from now on."""
    stamps = Stamps()
    _of_this_task.set(stamps)
    return stamps


class _StampedStream:
    """A stream, and who is told of what passes."""

    def __init__(self, stream: Stream, stamps: Stamps) -> None:
        self._stream = stream
        self._stamps = stamps

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def protocol(self) -> str:
        return self._stream.protocol

    async def send_all(self, data: bytes) -> None:
        self._stamps.write()
        await self._stream.send_all(data)

    def post(self, data: bytes) -> bool:
        is_taken = self._stream.post(data)
        if is_taken:
            self._stamps.write()
        return is_taken

    async def receive_some(self) -> bytes:
        data = await self._stream.receive_some()
        self._stamps.read()
        return data

    async def close(self) -> None:
        await self._stream.close()


class _WatchedHost:
    """A host whose chain streams are stamped; all else is the host's own."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def open(self, peer: str, protocol: str, *, within: float) -> Stream:
        stream = await self._host.open(peer, protocol, within=within)
        stamps = _of_this_task.get()
        if protocol != CHAIN_PROTOCOL or stamps is None:
            return stream
        return _StampedStream(stream, stamps)


def watched(host: Host) -> Host:
    """Return the host with the streams of stamped tasks watched."""
    return cast(Host, _WatchedHost(host))
