"""Cables that can be cut on one machine: a small TCP relay before each server.

What is dialled at a relay goes on to its server. A connection hangs on the cables of both ends:
that of the server it leads to and, if another of the servers dialled it, that one's too.

1. A cut cable is silent: nothing passes either way, no end and no reset either. What was under way
   goes on when it is mended, in order, as TCP would send it again.
2. A connection through whole cables ends at one side when it ends at the other.
3. When `relay` is cancelled no socket of it remains.

Unlike a real cut, the kernel of this machine goes on acknowledging what it is sent and accepting
connections: only what is said, or not said, over them tells a peer that its neighbour is gone.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import trio

LOOPBACK = "127.0.0.1"
_CHUNK_BYTES = 256 << 10
_TABLE = Path("/proc/net/tcp")


class Cable:
    """What connects one server with the world."""

    def __init__(self) -> None:
        self._is_whole = trio.Event()
        self._is_whole.set()

    @property
    def is_cut(self) -> bool:
        """True while nothing passes."""
        return not self._is_whole.is_set()

    def cut(self) -> None:
        """Let nothing pass from now on."""
        if not self.is_cut:
            self._is_whole = trio.Event()

    def mend(self) -> None:
        """Let everything pass again."""
        self._is_whole.set()

    async def wait_whole(self) -> None:
        """Return when it is not cut."""
        await self._is_whole.wait()


CableOf = Callable[[int, int], Cable | None]
"""The cable of the server that dialled from the first port to the second; None for others."""


async def relay(listener: trio.SocketListener, port: int, own: Cable, cable_of: CableOf) -> None:
    """Carry what comes to `listener` to a server's port on loopback, until cancelled."""
    here = int(listener.socket.getsockname()[1])

    async def carry(stream: trio.SocketStream) -> None:
        async with stream:
            caller = cable_of(int(stream.socket.getpeername()[1]), here)
            cables = [own] if caller is None else [own, caller]
            # A dead peer, of either side, ends both: that is what `_pass` waits for.
            with suppress(OSError, trio.BrokenResourceError):
                await _all_whole(cables)
                async with await trio.open_tcp_stream(LOOPBACK, port) as server:
                    await _join(stream, server, cables)

    async with trio.open_nursery() as nursery:
        while True:
            try:
                stream = await listener.accept()
            except OSError:  # gone before we took it
                continue
            nursery.start_soon(carry, stream)


async def _join(one: trio.SocketStream, other: trio.SocketStream, cables: Sequence[Cable]) -> None:
    """Pass bytes both ways until either side has ended."""
    async with trio.open_nursery() as nursery:

        async def one_way(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            await _pass(source, sink, cables)
            nursery.cancel_scope.cancel()

        nursery.start_soon(one_way, one, other)
        nursery.start_soon(one_way, other, one)


async def _pass(
    source: trio.SocketStream, sink: trio.SocketStream, cables: Sequence[Cable]
) -> None:
    """Pass bytes until one side has ended, which a cut cable hides."""
    data = b"?"
    while data:
        try:
            data = await source.receive_some(_CHUNK_BYTES)
        except trio.BrokenResourceError:
            data = b""
        await _all_whole(cables)
        with suppress(trio.BrokenResourceError):  # its own direction tells of it
            if data:
                await sink.send_all(data)
    await _all_whole(cables)


async def _all_whole(cables: Sequence[Cable]) -> None:
    while any(cable.is_cut for cable in cables):
        for cable in cables:
            await cable.wait_whole()


def owner_of(port: int, remote_port: int, processes: Iterable[int]) -> int | None:
    """Return which of these processes holds the loopback socket between the two ports, or None.

    Linux only; reads a few hundred lines of the kernel's tables, which takes milliseconds.
    """
    inode = _inode_of(port, remote_port)
    if inode is None:
        return None
    name = f"socket:[{inode}]"
    return next((process for process in processes if name in _files_of(process)), None)


def is_owner_known() -> bool:
    """Tell whether this system tells which process holds a socket."""
    return _TABLE.exists()


def _inode_of(port: int, remote_port: int) -> str | None:
    for line in _TABLE.read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
        if ports == [port, remote_port]:
            return fields[9]
    return None


def _files_of(process: int) -> set[str]:
    found = set()
    with suppress(OSError):  # it has ended
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.add(str(link.readlink()))
    return found
