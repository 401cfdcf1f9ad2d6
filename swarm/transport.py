"""The two interfaces that the swarm needs of a network, and messages over a stream.

`swarm.host` fulfils them with libp2p, `swarm.memory` without sockets.

1. Every wait has a deadline: its caller's, or the one in the signature.
2. The peer at the other end is authenticated, and has proved the swarm's secret.
3. A stream reports its end as `Unreachable`, a broken promise as `PeerFault`, nothing else.
4. Exactly one task reads a stream; several may write: a message is written whole.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from swarm.errors import PeerFault, Unreachable
from swarm.messages import AnyMessage, Message, pack, unpack
from swarm.wire import DEFAULT_LIMITS, Decoder, Frame, Limits, encode


class Stream(Protocol):
    """Bytes in order to and from one peer."""

    @property
    def peer(self) -> str:
        """The id of the peer at the other end."""

    @property
    def protocol(self) -> str:
        """The protocol it speaks."""

    async def send_all(self, data: bytes) -> None:
        """Write all bytes in one piece. Unreachable if the stream has ended. Never more than the
        receiver's window waits here for longer than the transport's own write deadline.
        """

    def post(self, data: bytes) -> bool:
        """Take all bytes, to be written at once and in order with the others. False, and nothing is
        taken, if that could wait, or fail: `send_all` shall do it.
        """

    async def receive_some(self) -> bytes:
        """Return the bytes that are there, at least one. Unreachable when the stream ended."""

    async def close(self) -> None:
        """End the stream, both ways. Never raises, bounded in time, shielded."""


Handler = Callable[[Stream], Awaitable[None]]
LinkListener = Callable[[str, bool], None]
MessageCheck = Callable[[bytes], bool]


class Host(Protocol):
    """One endpoint of a network: its key, its links, its streams."""

    @property
    def peer(self) -> str:
        """The own id."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may dial it."""

    def serve(self, protocol: str, handler: Handler) -> None:
        """Call `handler` for each stream opened to us; the stream is closed when it returns.

        A SwarmError that a handler raises ends its stream, and nothing else.
        """

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember where to dial a peer; the newest addresses replace older ones."""

    async def dial(self, peer: str, *, within: float) -> None:
        """Be linked to a peer, both sides having proved the secret.

        Raises Unreachable, or Refusal when the other side does not accept our secret.
        """

    async def open(self, peer: str, protocol: str, *, within: float) -> Stream:
        """Open a stream, dialling if needed. Lazy: a peer that does not speak the protocol shows
        only when reading. Unreachable after `within` seconds.
        """

    def links(self) -> frozenset[str]:
        """The peers that we are linked to now."""

    def watch_links(self, listener: LinkListener) -> None:
        """Call `listener(peer, is_up)` whenever a link comes up or goes down."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Spread data to all that subscribe to the topic."""

    async def subscribe(self, topic: str, check: MessageCheck) -> trio.MemoryReceiveChannel[bytes]:
        """Receive what others publish. What `check` denies is neither given nor spread."""


class MessageStream:
    """Frames and messages over a stream: one write for each, bounded, checked."""

    def __init__(self, stream: Stream, limits: Limits = DEFAULT_LIMITS) -> None:
        self._stream = stream
        self._limits = limits
        self._decoder = Decoder(limits)
        self._frames: list[Frame] = []
        self.is_closed = False

    @property
    def peer(self) -> str:
        """The id of the peer at the other end."""
        return self._stream.peer

    async def send(self, message: Message) -> None:
        """Write one message. Unreachable if the stream has ended."""
        await self.send_frame(pack(message))

    def post(self, message: Message) -> bool:
        """Write one message without waiting. False, and nothing is written, where `send` must."""
        try:
            return self._stream.post(encode(pack(message), self._limits))
        except ValueError:  # over the limits: `send` says so
            return False

    async def send_frame(self, frame: Frame) -> None:
        """Write one frame. Unreachable if the stream has ended."""
        await self._stream.send_all(encode(frame, self._limits))

    async def receive(self, *, within: float = float("inf")) -> AnyMessage:
        """Return the next message. Unreachable at the end or after `within` seconds of silence."""
        return unpack(await self.receive_frame(within=within))

    async def receive_frame(self, *, within: float = float("inf")) -> Frame:
        """Return the next frame. Unreachable at the end or after `within` seconds of silence."""
        while not self._frames:
            data = await self._some(within)
            try:
                self._frames.extend(self._decoder.feed(data))
            except PeerFault as fault:
                raise PeerFault(f"{self.peer}: {fault.message}") from fault
            self._frames.reverse()
        return self._frames.pop()

    async def _some(self, within: float) -> bytes:
        if within == float("inf"):
            return await self._stream.receive_some()
        with trio.move_on_after(within):
            return await self._stream.receive_some()
        raise Unreachable(f"{self.peer} was silent for {within:g} seconds")

    async def close(self) -> None:
        """End the stream. Never raises."""
        self.is_closed = True
        await self._stream.close()
