"""Streams in memory, and the lines between two peers that they run over.

1. Bytes arrive whole and in order, or the stream ends. A cut holds them back, as TCP would, until
   it is mended.
2. An end is sent like bytes, what came before it is read first; a severed line ends at once.
3. A sender whose receiver does not read for STALL_SECONDS loses the stream, as with the muxer.
"""

import random
from collections import deque
from collections.abc import Callable

import trio

from swarm.errors import Unreachable

WINDOW_BYTES = 256 << 10  # the muxer's first window: who does not read is noticed early
STALL_SECONDS = 5.0  # the muxer's write deadline
_CHUNK_BYTES = 64 << 10
_AT_ONCE = -1.0  # before any time: no delay and no cut holds it back


class Line:
    """What lies between two peers: its delay, whether it is cut or linked, and its pipes."""

    def __init__(self, chance: random.Random, delay_seconds: float, jitter_seconds: float) -> None:
        self._chance = chance
        self._jitter_seconds = jitter_seconds
        self._mended = trio.Event()
        self.delay_seconds = delay_seconds
        self.is_cut = False
        self.is_linked = False
        self.pipes: set[Pipe] = set()

    def draw_delay(self) -> float:
        """Return how many seconds the next bytes take one way."""
        if not self._jitter_seconds:
            return self.delay_seconds
        return self.delay_seconds + self._chance.random() * self._jitter_seconds

    async def cross(self, times: int = 1) -> None:
        """Take as long as a packet that crosses so often; for ever while the line is cut."""
        for _ in range(times):
            await trio.sleep(self.draw_delay())
            while self.is_cut:
                await self._mended.wait()

    def mend(self) -> None:
        """Let what was held back arrive."""
        self.is_cut = False
        self._mended.set()
        self._mended = trio.Event()
        for pipe in self.pipes:
            pipe.wake()

    def sever(self, why: str) -> None:
        """End every stream now, dropping what is on its way."""
        for pipe in tuple(self.pipes):
            pipe.end(why, at_once=True)


class Pipe:
    """One direction of a stream."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._items: deque[tuple[float, bytes]] = deque()
        self._waiting_bytes = 0
        self._last_due = 0.0
        self._end: tuple[float, str] | None = None
        self._is_ignored = False
        self._changed = trio.Event()
        line.pipes.add(self)

    async def put(self, data: bytes) -> None:
        """Take bytes as the receiver makes room. Unreachable if it has ended or stalls."""
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            with trio.move_on_after(STALL_SECONDS) as scope:
                while self._waiting_bytes >= WINDOW_BYTES and self._end is None:
                    await self._changed.wait()
            if scope.cancelled_caught:
                self.end(f"the peer did not read for {STALL_SECONDS:g} seconds", at_once=True)
            if self._end is not None:
                raise Unreachable(self._end[1])
            if self._is_ignored:
                return
            self._items.append((self._due(), chunk))
            self._waiting_bytes += len(chunk)
            self.wake()

    def offer(self, data: bytes) -> bool:
        """Take bytes if the receiver has room for them. False if not, or if it has ended."""
        is_open = self._end is None and not self._is_ignored
        if not is_open or self._waiting_bytes + len(data) > WINDOW_BYTES:
            return False
        self._items.append((self._due(), data))
        self._waiting_bytes += len(data)
        self.wake()
        return True

    async def take(self) -> bytes:
        """Return all bytes that have arrived, at least one. Unreachable at the end."""
        while True:
            now = trio.current_time()
            if self._items and self._items[0][0] <= now and not self._line.is_cut:
                return self._arrived(now)
            if self._is_ignored or not self._items:
                self.check(now)
            await self._wait(now)

    def check(self, now: float) -> None:
        """Raise Unreachable if the end has come through, whatever is still unread before it."""
        if self._is_ignored:
            raise Unreachable("the stream is closed")
        if self._end is None:
            return
        due, reason = self._end
        if due == _AT_ONCE or (due <= now and not self._line.is_cut):
            raise Unreachable(reason)

    def ignore(self) -> None:
        """As the receiver: read no more. The sender is not told, what it sends is dropped."""
        self._is_ignored = True
        self._items.clear()
        self._waiting_bytes = 0
        self._line.pipes.discard(self)
        self.wake()

    def end(self, why: str, *, at_once: bool = False) -> None:
        """End after what was sent, or at once, dropping it. A second end keeps the first reason."""
        reason = self._end[1] if self._end else why
        if at_once:
            self._items.clear()
            self._line.pipes.discard(self)
            self._end = (_AT_ONCE, reason)
        elif self._end is None:
            self._end = (self._due(), reason)
        self.wake()

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._changed.set()
        self._changed = trio.Event()

    def _due(self) -> float:
        self._last_due = max(self._last_due, trio.current_time() + self._line.draw_delay())
        return self._last_due

    def _arrived(self, now: float) -> bytes:
        chunks = []
        while self._items and self._items[0][0] <= now:
            chunks.append(self._items.popleft()[1])
        data = b"".join(chunks)
        self._waiting_bytes -= len(data)
        self.wake()
        return data

    async def _wait(self, now: float) -> None:
        changed = self._changed
        due = self._items[0][0] if self._items else self._end[0] if self._end else None
        is_timed = due is not None and not self._line.is_cut
        with trio.move_on_after(due - now if due is not None and is_timed else float("inf")):
            await changed.wait()


class MemoryStream:
    """One end of a stream: fulfils `swarm.transport.Stream`.

    `on_first_use` is called once: the other end learns of a stream when it
    is first used.
    """

    def __init__(
        self,
        peer: str,
        protocol: str,
        *,
        into: Pipe,
        out: Pipe,
        on_first_use: Callable[[], None] | None = None,
    ) -> None:
        self._peer = peer
        self._protocol = protocol
        self._in = into
        self._out = out
        self._lock = trio.Lock()
        self._on_first_use = on_first_use

    @property
    def peer(self) -> str:
        """The id of the peer at the other end."""
        return self._peer

    @property
    def protocol(self) -> str:
        """The protocol it speaks."""
        return self._protocol

    async def send_all(self, data: bytes) -> None:
        """Write all bytes. Cancelled half-way it ends the stream, for both ends."""
        self._first_use()
        async with self._lock:
            self._in.check(trio.current_time())
            try:
                await self._out.put(data)
            except trio.Cancelled:
                self.end("a message was cut short", at_once=True)
                raise

    def post(self, data: bytes) -> bool:
        """Take all bytes, to be written at once. False, and nothing is taken, if that could wait,
        or fail.
        """
        if self._on_first_use is not None or self._lock.locked():
            return False
        try:
            self._in.check(trio.current_time())
        except Unreachable:
            return False
        return self._out.offer(data)

    async def receive_some(self) -> bytes:
        """Return the bytes that are there, at least one. Unreachable when the stream ended."""
        self._first_use()
        await trio.lowlevel.checkpoint()
        return await self._in.take()

    async def close(self) -> None:
        """End the stream, both ways. Never raises."""
        self.end(f"the stream of {self._protocol} was closed")

    def end(self, why: str, *, at_once: bool = False) -> None:
        """End it: the peer learns of it after what was sent, or both learn of it at once."""
        self._on_first_use = None
        self._out.end(why, at_once=at_once)
        if at_once:
            self._in.end(why, at_once=True)
        else:
            self._in.ignore()

    def _first_use(self) -> None:
        if self._on_first_use is not None:
            announce, self._on_first_use = self._on_first_use, None
            announce()
