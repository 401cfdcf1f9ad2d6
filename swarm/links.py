"""Streams for the chain's machines: carries out Dial, Send and Shut, reports what comes back.

1. Whatever is sent to one link is written in order. What needs not wait is written without its
   task, and together with what goes to other links of the same peer.
2. A reader never waits for compute nor for a writer: it hands over and reads on.
3. The end of a link is reported once, also when its task is cancelled, and never for a link that
   was shut.
4. No queue grows without bound: a link whose receiver takes nothing is given up.
5. A message that no frame can carry ends its link, and nothing else.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Protocol

import trio

from swarm.chain import Dial, Send, Shut
from swarm.errors import PeerFault, SwarmError, Unreachable
from swarm.messages import CHAIN_PROTOCOL, AnyMessage, FaultKind, Message
from swarm.pulse import Pulse
from swarm.transport import Host, MessageStream

# Dialling takes three round trips: enough over a satellite. A longer wait for a peer that is gone
# is a longer gap in somebody's text, and no pulse covers it.
OPEN_SECONDS = 2.5
WRITE_SECONDS = 20.0
# Credit bounds the data; this bounds the messages around it.
MOST_UNWRITTEN = 8192


class Listener(Protocol):
    """Who hears of a link. Both are called on the trio thread and do not wait."""

    def received(self, link: int, message: AnyMessage) -> None:
        """A message came."""

    def ended(self, link: int, failure: FaultKind, message: str) -> None:
        """The link is no more."""


class _Link:
    """One stream, or one that is being opened."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.unwritten: deque[Message] = deque()
        self.is_shut = False
        self.is_overfull = False
        self.is_silent = False
        self.scope = trio.CancelScope()
        self.life = trio.CancelScope()
        self._mail = trio.Event()
        self._idle: MessageStream | None = None  # all that was pushed before is written to it

    def push(self, message: Message) -> None:
        if self._idle is not None and self._idle.post(message):
            return
        self._idle = None
        if len(self.unwritten) >= MOST_UNWRITTEN:
            self.is_overfull = True
            self.scope.cancel()
            return
        self.unwritten.append(message)
        self._mail.set()

    def shut(self) -> None:
        self.is_shut, self._idle = True, None
        self._mail.set()

    def fall_silent(self, _peer: str) -> None:
        self.is_silent = True
        self.scope.cancel()

    async def write(self, stream: MessageStream) -> None:
        """Write what is pushed until the link is shut; then cancel the reader."""
        while True:
            while self.unwritten:
                await _write_one(stream, self.unwritten.popleft())
            if self.is_shut:
                self.scope.cancel()
                return
            self._idle = stream
            self._mail = trio.Event()
            await self._mail.wait()


class Links:
    """All chain streams of one peer, by number."""

    def __init__(
        self,
        host: Host,
        nursery: trio.Nursery,
        listener: Listener,
        pulse: Pulse | None = None,
        *,
        is_shielded: bool = False,
    ) -> None:
        """`pulse` tells of peers that fall silent; without it only their streams' ends are seen.

        `is_shielded`: who is cancelled can still say what there is to say; then `end` is awaited by
        all that was dialled.
        """
        self._is_shielded = is_shielded
        self._host = host
        self._pulse = pulse
        self._nursery = nursery
        self._listener = listener
        self._numbers = count(1)
        self._links: dict[int, _Link] = {}
        self._is_empty = trio.Event()

    def __len__(self) -> int:
        return len(self._links)

    async def wait_empty(self) -> None:
        """Return when no link is open or being opened."""
        while self._links:
            await self._is_empty.wait()

    def end(self) -> None:
        """Give up all that was dialled, whatever is left to be written."""
        for link in self._links.values():
            link.life.cancel()

    def new_number(self) -> int:
        """Name a link that does not exist yet."""
        return next(self._numbers)

    def carry_out(self, action: Dial | Send | Shut) -> None:
        """Do what a machine decided, without waiting."""
        match action:
            case Dial(link=number, peer=peer, first=first):
                link = self._links[number] = _Link(number)
                link.push(first)
                self._nursery.start_soon(self._run_dialled, link, peer)
            case Send(link=number, message=message):
                if number in self._links:
                    self._links[number].push(message)
            case Shut(link=number):
                if number in self._links:
                    self._links[number].shut()

    async def adopt(self, number: int, stream: MessageStream, begin: Callable[[], None]) -> None:
        """Run a stream that a peer opened until it ends; `begin` is called as it may be sent to."""
        link = self._links[number] = _Link(number)
        begin()
        await self._run(link, stream)

    async def _run_dialled(self, link: _Link, peer: str) -> None:
        link.life.shield = self._is_shielded
        with link.life:
            await self._dial_and_run(link, peer)

    async def _dial_and_run(self, link: _Link, peer: str) -> None:
        try:
            opened = await self._host.open(peer, CHAIN_PROTOCOL, within=OPEN_SECONDS)
        except SwarmError as error:
            self._report(link, "unreachable", error.message)
            return
        except trio.Cancelled:
            self._report(link, "closed", "its opening was given up")
            raise
        stream = MessageStream(opened)
        try:
            await self._run(link, stream)
        finally:
            await stream.close()

    async def _run(self, link: _Link, stream: MessageStream) -> None:
        """Read and write until either ends; what is left to write is written even when shut."""
        failure: FaultKind = "closed"
        message = "its stream was given up"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.write, stream)
                with self._watched(link, stream.peer), link.scope:
                    await self._read(link, stream)
                if link.is_silent:
                    raise _Silent(f"{stream.peer} fell silent")
                if link.is_overfull:
                    raise Unreachable(f"{stream.peer} left {MOST_UNWRITTEN} messages untaken")
        except* SwarmError as group:
            error = _first(group)
            failure, message = _failure_of(error), error.message
        finally:  # also when this task is cancelled: a stream that nobody reads has ended
            self._report(link, failure, message)

    @contextmanager
    def _watched(self, link: _Link, peer: str) -> Iterator[None]:
        """Have the pulse tell the link if its peer falls silent."""
        if self._pulse is None:
            yield
            return
        watch = self._pulse.watch(peer, link.fall_silent)
        try:
            yield
        finally:
            watch.release()

    async def _read(self, link: _Link, stream: MessageStream) -> None:
        while True:
            message = await stream.receive()
            if self._pulse is not None:
                self._pulse.heard(stream.peer)
            if not link.is_shut:
                self._listener.received(link.number, message)

    def _report(self, link: _Link, failure: FaultKind, message: str) -> None:
        self._links.pop(link.number, None)
        if not self._links:
            self._is_empty.set()
            self._is_empty = trio.Event()
        if not link.is_shut:
            link.is_shut = True
            self._listener.ended(link.number, failure, message)


class _Silent(SwarmError):
    """The pulse says that the peer is silent."""


class _TooLarge(SwarmError):
    """A message of ours that no frame can carry."""


async def _write_one(stream: MessageStream, message: Message) -> None:
    with trio.move_on_after(WRITE_SECONDS) as scope:
        try:
            await stream.send(message)
        except ValueError as error:
            raise _TooLarge(str(error)) from error
    if scope.cancelled_caught:
        raise Unreachable(f"{stream.peer} took nothing for {WRITE_SECONDS:g} seconds")


def _failure_of(error: SwarmError) -> FaultKind:
    match error:
        case PeerFault():
            return "broke_word"
        case _TooLarge():
            return "failed"
        case _Silent():
            return "silent"
    return "closed"


def _first(group: BaseExceptionGroup[SwarmError]) -> SwarmError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, SwarmError):
        raise TypeError(f"{error!r} is not ours")
    return error
