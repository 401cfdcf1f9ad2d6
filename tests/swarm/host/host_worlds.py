"""The networks that the contract is held against, and small conversations to hold in them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio
from trio.testing import MockClock

from swarm.errors import Unreachable
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.memory import MemoryNetwork
from swarm.transport import Host, Stream

SECRET = b"the swarm's secret"
ECHO = "/test/echo/1"
SOON = 20.0  # a deadline that only a hang on a busy machine reaches

HostContext = AbstractAsyncContextManager[Host]


class Hosts:
    """Makes hosts and lets them leave, each in a task of its own."""

    def __init__(self, opened: Callable[[bytes], HostContext], nursery: trio.Nursery) -> None:
        self._opened = opened
        self._nursery = nursery
        self._leave: dict[Host, trio.Event] = {}
        self._gone: dict[Host, trio.Event] = {}

    async def __call__(self, secret: bytes = SECRET) -> Host:
        host: Host = await self._nursery.start(self._keep, secret)
        return host

    async def leave(self, host: Host) -> None:
        """Close a host and wait until it is gone."""
        self._leave[host].set()
        await self._gone[host].wait()

    async def _keep(self, secret: bytes, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        async with self._opened(secret) as host:
            self._leave[host], self._gone[host] = trio.Event(), trio.Event()
            task_status.started(host)
            await self._leave[host].wait()
        self._gone[host].set()


@dataclass(frozen=True)
class World:
    """A kind of network."""

    name: str
    network: Callable[[], AbstractAsyncContextManager[Callable[[bytes], HostContext]]]
    is_virtual: bool

    def run(self, conversation: Callable[[Hosts], Awaitable[None]]) -> None:
        """Hold a conversation in a fresh network of this kind."""

        async def main() -> None:
            async with self.network() as opened, trio.open_nursery() as nursery:
                with trio.fail_after(4 * SOON):
                    await conversation(Hosts(opened, nursery))
                nursery.cancel_scope.cancel()

        clock = MockClock(autojump_threshold=0) if self.is_virtual else None
        trio.run(main, clock=clock)


@asynccontextmanager
async def _memory() -> AsyncIterator[Callable[[bytes], HostContext]]:
    async with MemoryNetwork(delay_seconds=0.01, jitter_seconds=0.005) as network:
        yield lambda secret: network.open_host(new_identity(), secret)


@asynccontextmanager
async def _libp2p() -> AsyncIterator[Callable[[bytes], HostContext]]:
    yield lambda secret: open_host(new_identity(), secret)


@asynccontextmanager
async def _quiet() -> AsyncIterator[Callable[[bytes], HostContext]]:
    yield lambda secret: open_host(new_identity(), secret, gossip=False)


MEMORY = World("memory", _memory, is_virtual=True)
LIBP2P = World("libp2p", _libp2p, is_virtual=False)
QUIET = World("libp2p without gossip", _quiet, is_virtual=False)


def acquaint(*hosts: Host) -> None:
    """Let each host know where to dial the others."""
    for host in hosts:
        for other in hosts:
            host.learn(other.peer, other.addresses)


async def echo(stream: Stream) -> None:
    """A handler: say everything back until the stream ends."""
    while True:
        await stream.send_all(await stream.receive_some())


async def receive_exactly(stream: Stream, size: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < size:
        data += await stream.receive_some()
    return data


async def receive_to_end(stream: Stream) -> bytes:
    """Read until the stream ends."""
    data = b""
    while True:
        try:
            data += await stream.receive_some()
        except Unreachable:
            return data


async def send_until_it_ends(stream: Stream) -> None:
    """Write for ever, as some do who do not read."""
    while True:
        await stream.send_all(b"hello")
        await trio.sleep(0.01)


async def until(claim: Callable[[], bool]) -> None:
    """Wait until a claim holds; fail after SOON."""
    with trio.fail_after(SOON):
        while not claim():  # noqa: ASYNC110  (claims are about things that tell nobody)
            await trio.sleep(0.01)
