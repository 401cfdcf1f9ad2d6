"""Streams over libp2p's muxer, read and written without its detours.

The muxer's own read and write cost three to five passes of the event loop each; here a message that
fits the window is one frame, and a stream's first message is also what opens it.

1. One task reads, several may write: a message is written whole.
2. A write that is cancelled ends the stream: half a message must not be followed by another.
3. After `close` the muxer holds nothing of the stream.
4. What libp2p raises becomes Unreachable here.
5. However a stream ends, its reader is woken at once.
"""

import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.io.exceptions import IOException
from libp2p.stream_muxer.exceptions import MuxedConnError, MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_DATA, TYPE_WINDOW_UPDATE, YamuxStream

from swarm.errors import Unreachable
from swarm.host.channel import Channel
from swarm.host.negotiation import NotSpoken
from swarm.host.settings import CLOSE_SECONDS

_HEADER = struct.Struct("!BBHII")
_ONE_FRAME_BYTES = 65535 - 16 - _HEADER.size  # one muxer frame in one Noise frame
BROKEN = (MuxedStreamError, MuxedConnError, IOException, OSError, trio.ClosedResourceError)

Spawn = Callable[[Callable[[], Awaitable[object]]], None]


class PeerStream(Channel):
    """A stream to a peer: fulfils `swarm.transport.Stream`.

    `muxed` is the muxer's stream, `spawn` runs a short task as long as the connection lives.
    """

    def __init__(self, peer: str, muxed: Any, spawn: Spawn, *, is_announced: bool) -> None:
        super().__init__()
        self._peer = peer
        self._protocol = ""
        self._muxed = muxed
        self._mux = muxed.conn
        self._id: int = muxed.stream_id
        # Kept, because the muxer drops unread bytes when the link ends: they came before the end.
        self._buffer: bytearray = muxed.conn.stream_buffers.get(muxed.stream_id, bytearray())
        self._spawn = spawn
        self._is_announced = is_announced
        self._is_closed = False
        self._lock = trio.Lock()
        self._awaited: trio.Event | None = None  # the muxer forgets it as it resets a stream

    @property
    def peer(self) -> str:
        """The id of the peer at the other end."""
        return self._peer

    @property
    def protocol(self) -> str:
        """The protocol it speaks."""
        return self._protocol

    def propose(self, protocol: str) -> None:
        """Speak this protocol, without waiting for the answer."""
        self._protocol = protocol
        super().propose(protocol)

    async def answer(self, speaks: Callable[[str], bool]) -> str:
        """Accept the first proposal that we speak. Unreachable if there is none."""
        try:
            self._protocol = await super().answer(speaks)
        except NotSpoken as error:
            raise Unreachable(f"{self._peer} {error}") from error
        return self._protocol

    async def send_all(self, data: bytes) -> None:
        """Write all bytes in one piece. Unreachable if the stream has ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self.write(data)

    def post(self, data: bytes) -> bool:
        """Take all bytes, to be written at once. False, and nothing is taken, if that could wait,
        or fail: the peer's window, another writer, the stream's first message, its end.
        """
        muxed = self._muxed
        is_ready = self._is_announced and not (self._head or self._lock.locked())
        is_over = self._is_closed or muxed.closed or muxed.send_closed
        if not is_ready or is_over or len(data) > min(_ONE_FRAME_BYTES, muxed.send_window):
            return False
        header = _HEADER.pack(0, TYPE_DATA, 0, self._id, len(data))
        if not self._mux.secured_conn.post(header + data):
            return False
        muxed.send_window -= len(data)
        return True

    async def receive_some(self) -> bytes:
        """Return the bytes that are there, at least one. Unreachable when the stream ended."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._held or self._head or self._proposer is not None:
            return await self.read()
        return await self._receive()

    async def read(self, n: int | None = None) -> bytes:
        """Return at most n bytes, at least one. Unreachable when the stream ended."""
        try:
            return await super().read(n)
        except NotSpoken as error:
            raise Unreachable(f"{self._peer} {error}") from error

    async def confirm(self) -> None:
        """Wait until the peer has said that it speaks the protocol. Unreachable if it does not."""
        try:
            await super().confirm()
        except NotSpoken as error:
            raise Unreachable(f"{self._peer} {error}") from error

    async def close(self) -> None:
        """End the stream, both ways. Never raises, bounded in time, shielded."""
        if self._is_closed:
            return
        self._is_closed = True
        self._wake()
        if self._is_announced:
            self._buffer.clear()
            with trio.move_on_after(CLOSE_SECONDS) as scope:
                scope.shield = True
                await self._reset()
        self._forget()

    async def _receive(self) -> bytes:
        while True:
            if self._buffer:
                data = bytes(self._buffer)
                self._buffer.clear()
                self._give_credit()
                return data
            event = self._mux.stream_events.get(self._id)
            if event is None or self._has_ended():
                raise self._ended()
            if event.is_set():
                event = self._mux.stream_events[self._id] = trio.Event()
            self._awaited = event
            await event.wait()

    async def _send(self, data: bytes) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            await self._put(data)
        except trio.Cancelled:
            self._spawn(self._reset)
            raise
        except BROKEN as error:
            raise self._ended() from error
        finally:
            self._lock.release()

    async def _put(self, data: bytes) -> None:
        muxed = self._muxed
        flags = 0 if self._is_announced else FLAG_SYN
        view = memoryview(data)
        for start in range(0, max(len(data), 1), _ONE_FRAME_BYTES):
            if self._is_closed or muxed.closed or muxed.send_closed:
                raise self._ended()
            piece = view[start : start + _ONE_FRAME_BYTES]
            self._is_announced = True
            if len(piece) > muxed.send_window:
                if flags:
                    await self._write_frame(_HEADER.pack(0, TYPE_WINDOW_UPDATE, flags, self._id, 0))
                await muxed.write(data[start:])  # as the window opens; ends if it does not for 5 s
                return
            muxed.send_window -= len(piece)
            header = _HEADER.pack(0, TYPE_DATA, flags, self._id, len(piece))
            flags = 0
            await self._write_frame(b"".join((header, piece)))

    async def _write_frame(self, frame: bytes) -> None:
        # What the muxer's own does, without formatting a line of its log for each frame.
        lock = self._mux.secured_conn.lock
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            await self._mux.secured_conn.write(frame)
        finally:
            lock.release()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _give_credit(self) -> None:
        """Let the sender send on, once half a window is read. A task of its own: a reader that is
        cancelled must lose neither bytes nor credit.
        """
        muxed = self._muxed
        if muxed.recv_closed or muxed.closed:
            return
        if muxed.target_recv_window - muxed.recv_window >= muxed.target_recv_window >> 1:
            self._spawn(muxed._auto_tune_and_send_window_update)

    def _has_ended(self) -> bool:
        muxed = self._muxed
        return bool(self._is_closed or muxed.recv_closed or muxed.closed or muxed.reset_received)

    async def _reset(self) -> None:
        try:
            await self._muxed.reset()
        except BROKEN:
            return
        finally:
            self._wake()

    def _wake(self) -> None:
        """Let whoever reads look again."""
        if self._awaited is not None:
            self._awaited.set()

    def _forget(self) -> None:
        """Drop what the muxer holds and give back the slot."""
        self._muxed.closed = True
        self._wake()
        self._buffer.clear()
        self._mux._finalize_stream_locked(self._muxed, fully_closed=True)

    def _ended(self) -> Unreachable:
        return Unreachable(f"the stream of {self._protocol or 'no protocol'} to {self._peer} ended")


async def open_stream(mux: Any, peer: str, protocol: str, spawn: Spawn) -> PeerStream:
    """Make a stream; the peer learns of it with the first bytes. Unreachable if the link is gone.

    Waits, for ever, while as many streams are open as the muxer allows: give it a deadline.
    """
    await mux.stream_backlog_semaphore.acquire()
    if mux.event_shutting_down.is_set():
        mux.stream_backlog_semaphore.release()
        raise Unreachable(f"the link to {peer} is closing")
    # What `Yamux.open_stream` does, less the frame that would announce it ahead of the data.
    muxed = YamuxStream(mux.next_stream_id, mux, True)
    muxed._owns_backlog_slot = True
    mux.next_stream_id += 2
    mux.streams[muxed.stream_id] = muxed
    mux.stream_buffers[muxed.stream_id] = bytearray()
    mux.stream_events[muxed.stream_id] = trio.Event()
    stream = PeerStream(peer, muxed, spawn, is_announced=False)
    stream.propose(protocol)
    return stream
