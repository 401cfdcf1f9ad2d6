"""Bytes to and from one peer with a protocol negotiated in front: the shape of all three layers.

A TCP socket carries a Noise session, that carries a muxer, that carries streams; at each layer the
next protocol is agreed on by multistream, and costs no round trip of its own.

1. `read` returns what is there, at least one byte; bytes are never lost by a cancelled read.
2. A write is handed to the layer below in one piece, with the proposal in front if it is the first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from swarm.host.negotiation import Answerer, Proposer, proposal


class Channel(ABC):
    """A layer. Subclasses say how bytes come and go; both raise the layer's own errors."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._head = b""
        self._proposer: Proposer | None = None

    @abstractmethod
    async def _receive(self) -> bytes:
        """Return bytes from below, perhaps none (then it is asked again). Raises at the end."""

    @abstractmethod
    async def _send(self, data: bytes) -> None:
        """Write all bytes."""

    def propose(self, protocol: str) -> None:
        """Put a proposal in front of the first write, and take its answer off the first read."""
        self._head += proposal(protocol)
        self._proposer = Proposer(protocol)

    async def answer(self, speaks: Callable[[str], bool]) -> str:
        """Accept the first proposal that we speak and return it. NotSpoken if there is none."""
        answerer = Answerer(speaks)
        while answerer.chosen is None:
            reply = answerer.feed(await self._take())
            if reply:
                await self._send(reply)
        self._held[:0] = answerer.rest()
        return answerer.chosen

    async def read(self, n: int | None = None) -> bytes:
        """Return at most n bytes. NotSpoken if the other side does not accept the proposal."""
        await self._fill()
        if n is None or n < 0 or n >= len(self._held):
            return self._drain()
        data = bytes(memoryview(self._held)[:n])
        del self._held[:n]
        return data

    async def write(self, data: bytes) -> None:
        """Write all bytes."""
        if self._head:
            head, self._head = self._head, b""
            data = head + data
        await self._send(data)

    async def confirm(self) -> None:
        """Wait until the proposal is accepted. NotSpoken if it is not."""
        await self._flush()
        while self._proposer is not None:
            self._accept(await self._receive())

    async def _fill(self) -> None:
        if self._head:
            await self._flush()
        while not self._held:
            self._accept(await self._receive())

    async def _flush(self) -> None:
        if self._head:
            await self.write(b"")

    async def _take(self) -> bytes:
        await self._fill()
        return self._drain()

    def _drain(self) -> bytes:
        data = bytes(self._held)
        self._held.clear()
        return data

    def _accept(self, data: bytes) -> None:
        if self._proposer is not None:
            data = self._proposer.feed(data)
            if self._proposer.is_done:
                self._proposer = None
        self._held += data
