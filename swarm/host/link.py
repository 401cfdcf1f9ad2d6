"""One connection to a peer: its gate, its streams, its end.

1. Until the other side has proved the secret it is a stranger: its streams are not answered, none
   is opened to it, and after HANDSHAKE_SECONDS it is disconnected.
2. Who knows another secret is told so, and disconnected.
3. What the other side opens or leaves unread is bounded.
4. A handler that raises ends its own stream only.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import trio
from libp2p.network.connection.exceptions import RawConnError
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from swarm.errors import PeerFault, Refusal, SwarmError
from swarm.gate import GATE_PROTOCOL, PROOF_BYTES, holds, proof
from swarm.host.handshake import Connection
from swarm.host.settings import (
    ANSWER_SECONDS,
    CLOSE_SECONDS,
    HANDSHAKE_SECONDS,
    MOST_STREAMS_OF_STRANGER,
    MOST_STREAMS_PER_LINK,
    MOST_UNREAD_BYTES,
)
from swarm.host.streams import BROKEN, PeerStream, open_stream
from swarm.transport import Handler, Stream

logger = logging.getLogger(__name__)

_ACCEPTED = b"\x01"
_REFUSED = b"\x00" * (1 + PROOF_BYTES)


@dataclass(frozen=True, slots=True)
class Household:
    """What a link needs of the host that it belongs to."""

    peer: str
    secret: bytes
    handlers: Mapping[str, Handler]
    nursery: trio.Nursery  # handlers outlive the link: they see its end as errors
    proved: Callable[["Link"], None]


class Link:
    """A connection and what runs over it. `run` it; `prove` it if we dialled."""

    def __init__(self, connection: Connection, house: Household) -> None:
        self.peer = connection.peer
        self.tcp = connection.tcp
        self.is_dialler = connection.is_dialler
        self.proved = trio.Event()
        self._mux = connection.mux
        self._sealed = connection.sealed
        self._house = house
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        self._streams_of_peer = 0
        self._sealed.inspect = self._inspect

    @property
    def is_open(self) -> bool:
        """Whether streams can still be opened; False as soon as its end is known."""
        return not (self._ended.is_set() or self._mux.event_shutting_down.is_set())

    async def run(self) -> None:
        """Carry streams until the connection ends. The socket is closed afterwards."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_mux)
                nursery.start_soon(self._write_posted)
                nursery.start_soon(self._await_proof)
                await self._accept_streams()
        finally:
            self._nursery = None
            self.shut()
            self._end_streams()

    async def prove(self) -> None:
        """As the one who dialled: show that we know the secret, and see that they do.

        Raises Refusal if either does not, Unreachable if the peer says nothing.
        """
        house = self._house
        stream = await self.open(GATE_PROTOCOL)
        try:
            await stream.send_all(proof(house.secret, house.peer, self.peer, "dialler"))
            reply = await _read_exactly(stream, 1 + PROOF_BYTES)
        finally:
            await stream.close()
        if reply[:1] != _ACCEPTED:
            raise Refusal(
                f"{self.peer} did not accept the secret", next_step="ask for a fresh join token"
            )
        if not holds(house.secret, self.peer, house.peer, "listener", reply[1:]):
            raise Refusal(
                f"{self.peer} does not know the secret itself",
                next_step="ask for a fresh join token",
            )
        self._admit()

    async def open(self, protocol: str) -> PeerStream:
        """Open a stream. Unreachable if the link is gone; may wait for ever for a free slot."""
        return await open_stream(self._mux, self.peer, protocol, self._spawn)

    def shut(self) -> None:
        """Close the socket now; all streams end."""
        self._sealed.shut()
        self._ended.set()

    async def close(self) -> None:
        """Say goodbye and close, bounded in time, shielded. Never raises."""
        with trio.move_on_after(CLOSE_SECONDS) as scope:
            scope.shield = True
            try:
                await self._mux.close()
            except BROKEN:
                logger.debug("the link to %s was closed already", self.peer)
        self.shut()

    async def _run_mux(self) -> None:
        try:
            await self._mux.start()
        finally:
            self.shut()
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel()

    async def _write_posted(self) -> None:
        try:
            await self._sealed.write_posted()
        except BROKEN:
            self.shut()  # who reads learns of it

    async def _await_proof(self) -> None:
        with trio.move_on_after(HANDSHAKE_SECONDS):
            await self.proved.wait()
        if not self.proved.is_set():
            logger.debug("%s did not prove the secret in time", self.peer)
            self.shut()

    async def _accept_streams(self) -> None:
        while True:
            try:
                muxed = await self._mux.accept_stream()
            except MuxedConnUnavailable:
                return
            stream = PeerStream(self.peer, muxed, self._spawn, is_announced=True)
            most = MOST_STREAMS_PER_LINK if self.proved.is_set() else MOST_STREAMS_OF_STRANGER
            if self._streams_of_peer >= most:
                await stream.close()
                continue
            self._streams_of_peer += 1
            self._house.nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: PeerStream) -> None:
        """Find out what a stream is for and run its handler; the task boundary of handlers."""
        try:
            handler = await self._handler_of(stream)
            if handler is not None:
                await handler(stream)
        except SwarmError as error:
            logger.debug("a stream of %s from %s ended: %s", stream.protocol, self.peer, error)
        except Exception:  # a handler's bug must not end the host
            logger.exception("the handler of %s failed", stream.protocol)
        finally:
            self._streams_of_peer -= 1
            await stream.close()

    async def _handler_of(self, stream: PeerStream) -> Handler | None:
        """Return what serves the stream; None if nothing does, or not yet."""
        with trio.move_on_after(ANSWER_SECONDS):
            if self.is_dialler:
                await self.proved.wait()  # their first streams may overtake our look at the proof
            elif not self.proved.is_set():
                await stream.answer(lambda protocol: protocol == GATE_PROTOCOL)
                return self._judge
            return self._house.handlers[await stream.answer(self._house.handlers.__contains__)]
        return None

    async def _judge(self, stream: Stream) -> None:
        """As the one who was dialled: admit who knows the secret, turn away who does not."""
        house = self._house
        given = await _read_exactly(stream, PROOF_BYTES)  # ends, at the latest, with the link
        if holds(house.secret, self.peer, house.peer, "dialler", given):
            own = proof(house.secret, house.peer, self.peer, "listener")
            await stream.send_all(_ACCEPTED + own)
            self._admit()
            return
        await stream.send_all(_REFUSED)
        with trio.move_on_after(CLOSE_SECONDS):  # so that they hear it before the end
            await self._ended.wait()
        self.shut()

    def _admit(self) -> None:
        if not self.proved.is_set() and not self._ended.is_set():
            self.proved.set()
            self._house.proved(self)

    def _end_streams(self) -> None:
        """Wake whoever still waits on a stream; the muxer does not when it is cancelled."""
        self._mux.event_shutting_down.set()
        for muxed in self._mux.streams.values():
            muxed.closed = True
        for event in self._mux.stream_events.values():
            event.set()

    def _inspect(self) -> None:
        """End the connection if the peer sends far beyond what is read: it ignores the windows."""
        if not self.proved.is_set():
            raise RawConnError("connection closed: a stranger says more than the gate needs")
        unread = sum(len(buffer) for buffer in self._mux.stream_buffers.values())
        if unread > MOST_UNREAD_BYTES:
            raise RawConnError(f"connection closed: {unread} bytes unread")

    def _spawn(self, task: Callable[[], Awaitable[object]]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._quietly, task)

    async def _quietly(self, task: Callable[[], Awaitable[object]]) -> None:
        try:
            await task()
        except BROKEN:
            logger.debug("the link to %s ended during a write", self.peer)


async def _read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.receive_some()
    if len(data) > size:
        raise PeerFault(f"{stream.peer} says more at the gate than it may")
    return data
