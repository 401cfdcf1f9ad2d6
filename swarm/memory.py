"""A network in memory: what `swarm.host` does, without sockets, for tests and private swarms.

1. Time is trio's: under a MockClock nothing here waits in reality. Randomness is seeded.
2. The same faults raise the same errors as over libp2p: silence is silence, until a deadline.
3. Nobody is linked who has not proved the secret.
"""

import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import trio

from swarm.errors import Refusal, SwarmError, Unreachable
from swarm.gate import holds, proof
from swarm.identity import Identity
from swarm.pipes import Line, MemoryStream, Pipe
from swarm.transport import Handler, LinkListener, MessageCheck, Stream

logger = logging.getLogger(__name__)

GOSSIP_BACKLOG = 1024
_DIAL_CROSSINGS = 6  # connect, noise, gate: three round trips


class MemoryHost:
    """One endpoint of a MemoryNetwork: fulfils `swarm.transport.Host`."""

    def __init__(
        self, network: "MemoryNetwork", peer: str, secret: bytes, addresses: tuple[str, ...]
    ) -> None:
        self._network = network
        self._peer = peer
        self._addresses = addresses
        self._book: dict[str, tuple[str, ...]] = {}
        self._handlers: dict[str, Handler] = {}
        self._listeners: list[LinkListener] = []
        self._checks: dict[str, MessageCheck] = {}
        self._subscribers: dict[str, list[trio.MemorySendChannel[bytes]]] = {}
        self._heard: set[int] = set()
        self._scopes: set[trio.CancelScope] = set()
        self.secret = secret
        self.is_killed = False
        self._is_silent = False

    @property
    def peer(self) -> str:
        """The own id."""
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may dial it; empty for one that only dials."""
        return self._addresses

    def serve(self, protocol: str, handler: Handler) -> None:
        """Call `handler` for each stream opened to us; the stream is closed when it returns."""
        self._handlers[protocol] = handler

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember where to dial a peer; the newest addresses replace older ones."""
        self._book[peer] = tuple(addresses)

    async def dial(self, peer: str, *, within: float) -> None:
        """Be linked to a peer. Unreachable, or Refusal when it does not accept our secret."""
        with trio.move_on_after(within) as scope:
            await self._network.dial(self, peer, self._book.get(peer, ()))
        if scope.cancelled_caught:
            raise Unreachable(f"{peer} did not answer within {within:g} seconds")

    async def open(self, peer: str, protocol: str, *, within: float) -> Stream:
        """Open a stream, dialling if needed. Lazy: see `swarm.transport.Host.open`."""
        await self.dial(peer, within=within)
        return self._network.open_stream(self, peer, protocol)

    def links(self) -> frozenset[str]:
        """The peers that we are linked to now."""
        return self._network.links_of(self._peer)

    def watch_links(self, listener: LinkListener) -> None:
        """Call `listener(peer, is_up)` whenever a link comes up or goes down."""
        self._listeners.append(listener)

    async def publish(self, topic: str, data: bytes) -> None:
        """Spread data to all that subscribe to the topic and are linked over others that do."""
        await trio.lowlevel.checkpoint()
        check = self._checks.get(topic)
        if check is None or check(data):
            serial = self._network.next_gossip_serial()
            self._heard.add(serial)
            self._network.spread(self, topic, data, serial, came_from=self._peer)

    async def subscribe(self, topic: str, check: MessageCheck) -> trio.MemoryReceiveChannel[bytes]:
        """Receive what others publish. What `check` denies is neither given nor spread."""
        await trio.lowlevel.checkpoint()
        self._checks[topic] = check
        give, take = trio.open_memory_channel[bytes](GOSSIP_BACKLOG)
        self._subscribers.setdefault(topic, []).append(give)
        return take

    def hear(self, topic: str, data: bytes, serial: int, came_from: str) -> None:
        """Take one gossiped message from a neighbour and hand it on, once."""
        check = self._checks.get(topic)
        if check is None or serial in self._heard:
            return
        self._heard.add(serial)
        if not check(data):
            return
        for channel in self._subscribers[topic]:
            try:
                channel.send_nowait(data)
            except (trio.WouldBlock, trio.BrokenResourceError):
                logger.debug("%s lags behind on a topic, a message is dropped", self._peer)
        self._network.spread(self, topic, data, serial, came_from)

    async def welcome(self, stream: MemoryStream) -> None:
        """Serve a stream that was opened to us until its handler returns or we are killed."""
        handler = self._handlers.get(stream.protocol)
        if self.is_killed or handler is None:
            stream.end(f"{self._peer} does not speak {stream.protocol}")
            return
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await handler(stream)
            except SwarmError as error:
                logger.debug("a stream of %s ended: %s", stream.protocol, error)
            except Exception:  # a handler's bug must not end the host
                logger.exception("the handler of %s failed", stream.protocol)
            finally:
                self._scopes.discard(scope)
                if not self._is_silent:
                    await stream.close()

    def die(self, *, is_silent: bool) -> None:
        """Cancel all handlers; from now on everything raises. Silent: their streams do not end."""
        self.is_killed = True
        self._is_silent = is_silent
        for scope in self._scopes:
            scope.cancel()

    def tell_link(self, peer: str, is_up: bool) -> None:
        """Tell all watchers that a link came up or went down."""
        for listener in self._listeners:
            listener(peer, is_up)


class MemoryNetwork:
    """Hosts that reach each other without sockets, and the faults a test may cause.

    Use it as an async context manager: its handlers end with the block. `delay_seconds` is one
    way, for all pairs; up to `jitter_seconds` are added at random, never changing an order.
    """

    def __init__(
        self, *, seed: int = 0, delay_seconds: float = 0.0, jitter_seconds: float = 0.0
    ) -> None:
        self._chance = random.Random(seed)
        self._delay_seconds = delay_seconds
        self._jitter_seconds = jitter_seconds
        self._lines: dict[frozenset[str], Line] = {}
        self._hosts: dict[str, MemoryHost] = {}
        self._gossip_serial = 0
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        self._nursery = await self._nursery_manager.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self._running().cancel_scope.cancel()
        return await self._nursery_manager.__aexit__(kind, error, trace)

    # what tests do to it

    def attach(
        self, identity: Identity | str, secret: bytes = b"", *, is_listening: bool = True
    ) -> MemoryHost:
        """Add a host; a plain name is its peer id. The host lives until killed or the end."""
        peer = identity.peer if isinstance(identity, Identity) else identity
        if peer in self._hosts and not self._hosts[peer].is_killed:
            raise ValueError(f"{peer} is already attached")
        addresses = (f"/memory/{peer}",) if is_listening else ()
        self._hosts[peer] = MemoryHost(self, peer, secret, addresses)
        return self._hosts[peer]

    @asynccontextmanager
    async def open_host(
        self, identity: Identity | str, secret: bytes = b"", *, is_listening: bool = True
    ) -> AsyncIterator[MemoryHost]:
        """Attach a host for as long as the block runs, like `swarm.host.open_host`."""
        host = self.attach(identity, secret, is_listening=is_listening)
        try:
            yield host
        finally:
            self._end(host, is_silent=False)

    def introduce(self) -> None:
        """Let every host know every other's addresses."""
        for host in self._hosts.values():
            for other in self._hosts.values():
                host.learn(other.peer, other.addresses)

    def delay(self, one: str, other: str, seconds: float) -> None:
        """Let bytes between the two take this long each way, from now on."""
        self.line(one, other).delay_seconds = seconds

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between the two, silently: no error, no end, until mended."""
        self.line(one, other).is_cut = True

    def mend(self, one: str, other: str) -> None:
        """Undo a cut: what was held back arrives."""
        self.line(one, other).mend()

    def break_link(self, one: str, other: str) -> None:
        """End the link and all its streams now; both may dial again."""
        line = self.line(one, other)
        line.sever(f"the link between {one} and {other} broke")
        if line.is_linked:
            line.is_linked = False
            self._hosts[one].tell_link(other, is_up=False)
            self._hosts[other].tell_link(one, is_up=False)

    def kill(self, peer: str, *, is_silent: bool = False) -> None:
        """Stop a host for good, as if its process or (silent) its machine had died.

        Its handlers are cancelled and all it does raises Unreachable. Tasks of a test that use the
        host are the test's to stop. The same peer may be attached anew unless the death was silent.
        """
        self._end(self._hosts[peer], is_silent=is_silent)

    # what hosts ask of it

    async def dial(self, host: MemoryHost, peer: str, addresses: Sequence[str]) -> None:
        """Link the host to the peer, after the round trips it takes."""
        await trio.lowlevel.checkpoint()
        if host.is_killed:
            raise Unreachable(f"{host.peer} was killed")
        line = self.line(host.peer, peer)
        if line.is_linked:
            return
        if peer == host.peer or not addresses:
            raise Unreachable(f"no address is known for {peer}")
        await line.cross(_DIAL_CROSSINGS)
        target = self._hosts.get(peer)
        if target is None or target.is_killed or not set(addresses) & set(target.addresses):
            raise Unreachable(f"{peer} could not be reached at {', '.join(addresses)}")
        shown = proof(host.secret, host.peer, peer, "dialler")
        if not holds(target.secret, host.peer, peer, "dialler", shown):
            raise Refusal(
                f"{peer} did not accept the secret", next_step="ask for a fresh join token"
            )
        if not line.is_linked:
            line.is_linked = True
            host.tell_link(peer, is_up=True)
            target.tell_link(host.peer, is_up=True)

    def open_stream(self, host: MemoryHost, peer: str, protocol: str) -> MemoryStream:
        """Make a stream over an existing link; the other side learns of it at its first use."""
        line, target = self.line(host.peer, peer), self._hosts[peer]
        there, back = Pipe(line), Pipe(line)
        far = MemoryStream(host.peer, protocol, into=there, out=back)

        async def arrive() -> None:
            await line.cross()
            await target.welcome(far)

        return MemoryStream(
            peer,
            protocol,
            into=back,
            out=there,
            on_first_use=lambda: self._running().start_soon(arrive),
        )

    def spread(
        self, host: MemoryHost, topic: str, data: bytes, serial: int, came_from: str
    ) -> None:
        """Send gossip on to all neighbours but the one it came from; a cut loses it."""

        async def travel(neighbour: str) -> None:
            line = self.line(host.peer, neighbour)
            await trio.sleep(line.draw_delay())
            if line.is_linked and not line.is_cut:
                self._hosts[neighbour].hear(topic, data, serial, host.peer)

        for neighbour in sorted(host.links() - {came_from}):
            self._running().start_soon(travel, neighbour)

    def next_gossip_serial(self) -> int:
        """Return a number that no other message has."""
        self._gossip_serial += 1
        return self._gossip_serial

    def links_of(self, peer: str) -> frozenset[str]:
        """The peers linked to this one."""
        return frozenset(
            other
            for pair, line in self._lines.items()
            if line.is_linked and peer in pair
            for other in pair - {peer}
        )

    def line(self, one: str, other: str) -> Line:
        """The one line between the two."""
        pair = frozenset((one, other))
        if pair not in self._lines:
            self._lines[pair] = Line(self._chance, self._delay_seconds, self._jitter_seconds)
        return self._lines[pair]

    def _end(self, host: MemoryHost, *, is_silent: bool) -> None:
        if host.is_killed:
            return
        host.die(is_silent=is_silent)
        for other in sorted(self.links_of(host.peer)):
            if is_silent:
                self.cut(host.peer, other)
            else:
                self.break_link(host.peer, other)

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise RuntimeError("enter the network first: async with MemoryNetwork() as network")
        return self._nursery
