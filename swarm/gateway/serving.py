"""The gateway listens: every connection a task beside whatever else runs in this loop.

1. It listens on the address asked for when `open_gateway` gives its URL, and no more when it ends.
2. No more than MOST_CONNECTIONS are open; one more is closed at once.
"""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from swarm.gateway.app import application
from swarm.gateway.attending import App
from swarm.gateway.door import Door
from swarm.gateway.http1 import Connection
from swarm.gateway.sessions import Swarm
from swarm.tasks import open_tasks

GRACE_SECONDS = 10.0
MOST_CONNECTIONS = 1024


@asynccontextmanager
async def open_gateway(swarm: Swarm, door: Door) -> AsyncIterator[str]:
    """Answer HTTP for this swarm until the block ends; give the URL. BadInput if the address is
    no longer to be had.

    Answers that are being given when the block ends have GRACE_SECONDS to end, too.
    """
    url = door.url
    connections = _Connections(application(swarm, door.settings))
    async with open_tasks() as nursery:
        nursery.start_soon(connections.accept, door.listen(), nursery)
        yield url
        await connections.end()


class _Connections:
    """All connections of one gateway."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._accepting = trio.CancelScope()
        self._open: set[Connection] = set()
        self._is_empty = trio.Event()

    async def accept(self, number: int, nursery: trio.Nursery) -> None:
        """Accept on this socket until `end`; it is closed then."""
        bound = trio.socket.from_stdlib_socket(socket.socket(fileno=number))
        with self._accepting:
            await trio.serve_listeners(
                self._connected, [trio.SocketListener(bound)], handler_nursery=nursery
            )

    async def end(self) -> None:
        """Accept no more; wait until all answers are out, for GRACE_SECONDS at most."""
        self._accepting.cancel()
        for connection in self._open:
            connection.end()
        with trio.move_on_after(GRACE_SECONDS):
            while self._open:
                self._is_empty = trio.Event()
                await self._is_empty.wait()

    async def _connected(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            return
        connection = Connection(stream, self._app)
        self._open.add(connection)
        try:
            await connection.run()
        finally:
            self._open.discard(connection)
            if not self._open:
                self._is_empty.set()
