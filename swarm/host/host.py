"""The host: this process among its peers.

1. `links` are peers that have proved the secret, and to whom we have.
2. Every wait on a peer ends at its deadline; one dial per peer runs at a time.
3. When the block of `open_host` is left, no socket, task or thread of it remains.
"""

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import trio

from swarm.errors import BadInput, SwarmError, Unreachable
from swarm.host.dialling import first_of
from swarm.host.gossip import Gossip, gossiping
from swarm.host.handshake import Connection, Handshaker
from swarm.host.link import Household, Link
from swarm.host.settings import (
    CLOSE_SECONDS,
    HANDSHAKE_SECONDS,
    MOST_ADDRESSES,
    MOST_LINKS,
    MOST_LINKS_PER_PEER,
    MOST_STRANGERS,
)
from swarm.host.sockets import (
    Address,
    Tcp,
    accepted,
    connect,
    listening,
    own_addresses,
    parse_address,
)
from swarm.host.streams import PeerStream
from swarm.identity import Identity
from swarm.transport import Handler, LinkListener, MessageCheck, Stream

logger = logging.getLogger(__name__)


class Libp2pHost:
    """A host over libp2p's Noise, Yamux and GossipSub: fulfils `swarm.transport.Host`.

    Made by `open_host`.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        addresses: Sequence[Address],
        nursery: trio.Nursery,
    ) -> None:
        self._peer = identity.peer
        self._addresses = tuple(str(address) for address in addresses)
        self._nursery = nursery
        self._handlers: dict[str, Handler] = {}
        self._handshaker = Handshaker(identity)
        self._house = Household(identity.peer, secret, self._handlers, nursery, self._add)
        self._book: dict[str, tuple[Address, ...]] = {}
        self._links: dict[str, list[Link]] = {}
        self._strangers: dict[Tcp, None] = {}  # the oldest first
        self._dialling: dict[str, trio.Event] = {}
        self._listeners: list[LinkListener] = []
        self._gossip: Gossip | None = None

    @property
    def peer(self) -> str:
        """The own id."""
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others may dial it, as full multiaddrs."""
        return self._addresses

    def serve(self, protocol: str, handler: Handler) -> None:
        """Call `handler` for each stream opened to us; the stream is closed when it returns."""
        self._handlers[protocol] = handler

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember where to dial a peer; the newest addresses replace older ones.

        What is no address, or names another peer, is passed over.
        """
        parsed = [parse_address(text) for text in addresses[:MOST_ADDRESSES]]
        self._book[peer] = tuple(a for a in parsed if a is not None and a.peer in ("", peer))

    async def dial(self, peer: str, *, within: float) -> None:
        """Be linked to a peer, both sides having proved the secret.

        Raises Unreachable, or Refusal when the other side does not accept our secret.
        """
        with trio.move_on_after(within) as scope:
            await self._dial(peer)
        if scope.cancelled_caught:
            raise Unreachable(f"{peer} did not answer within {within:g} seconds")

    async def open(self, peer: str, protocol: str, *, within: float) -> Stream:
        """Open a stream, dialling if needed. Lazy: a peer that does not speak the protocol shows
        only when reading. Unreachable after `within` seconds.
        """
        return await self._open(peer, protocol, within)

    async def open_confirmed(self, peer: str, protocol: str, *, within: float) -> PeerStream:
        """Open a stream and wait until the peer has said that it speaks the protocol."""
        deadline = trio.current_time() + within
        stream = await self._open(peer, protocol, within)
        with trio.move_on_at(deadline) as scope:
            await stream.confirm()
        if scope.cancelled_caught:
            await stream.close()
            raise Unreachable(f"{peer} did not answer within {within:g} seconds")
        return stream

    def links(self) -> frozenset[str]:
        """The peers that we are linked to now."""
        return frozenset(self._links)

    def watch_links(self, listener: LinkListener) -> None:
        """Call `listener(peer, is_up)` whenever a link comes up or goes down."""
        self._listeners.append(listener)

    async def publish(self, topic: str, data: bytes) -> None:
        """Spread data to all that subscribe to the topic."""
        await self._gossiping().publish(topic, data)

    async def subscribe(self, topic: str, check: MessageCheck) -> trio.MemoryReceiveChannel[bytes]:
        """Receive what others publish. What `check` denies is neither given nor spread."""
        return await self._gossiping().subscribe(topic, check)

    # what `open_host` runs

    async def gossip_with(self, stack: AsyncExitStack) -> None:
        """Take part in gossip until the stack unwinds."""
        service = gossiping(self, self._handshaker.key_pair, self._nursery)
        self._gossip = await stack.enter_async_context(service)

    async def accept_from(self, listener: socket.socket) -> None:
        """Welcome whoever connects, for ever."""
        async for tcp in accepted(listener):
            if sum(map(len, self._links.values())) >= MOST_LINKS:
                tcp.shut()
                continue
            if len(self._strangers) >= MOST_STRANGERS:
                next(iter(self._strangers)).shut()
            self._strangers[tcp] = None
            self._nursery.start_soon(self._welcome, tcp)

    async def close(self) -> None:
        """Say goodbye on all links, bounded in time."""
        async with trio.open_nursery() as nursery:
            for links in self._links.values():
                for link in links:
                    nursery.start_soon(link.close)
        for tcp in tuple(self._strangers):
            tcp.shut()

    async def _open(self, peer: str, protocol: str, within: float) -> PeerStream:
        with trio.move_on_after(within):
            link = await self._dial(peer)
            return await link.open(protocol)
        raise Unreachable(f"{peer} gave no stream within {within:g} seconds")

    async def _dial(self, peer: str) -> Link:
        await trio.lowlevel.checkpoint_if_cancelled()
        while (link := self._newest_link(peer)) is None:
            if peer in self._dialling:
                await self._dialling[peer].wait()
                continue
            addresses = self._book.get(peer, ())
            if peer == self._peer or not addresses:
                raise Unreachable(f"no address is known for {peer}")
            done = self._dialling[peer] = trio.Event()
            try:
                await first_of(addresses, lambda address: self._attempt(peer, address))
            finally:
                del self._dialling[peer]
                done.set()
        return link

    def _newest_link(self, peer: str) -> Link | None:
        """Return the link that came up last: older ones may be dead and not know it."""
        links = self._links.get(peer, [])
        return next((link for link in reversed(links) if link.is_open), None)

    async def _attempt(self, peer: str, address: Address) -> None:
        with trio.move_on_after(HANDSHAKE_SECONDS):
            tcp = await connect(address)
            connection = await self._handshaker.dial(tcp, peer)
            link = Link(connection, self._house)
            self._nursery.start_soon(self._carry, link)
            try:
                await link.prove()
            except BaseException:
                link.shut()
                raise
            return
        raise Unreachable(f"{address} did not answer within {HANDSHAKE_SECONDS:g} seconds")

    async def _welcome(self, tcp: Tcp) -> None:
        try:
            connection: Connection | None = None
            with trio.move_on_after(HANDSHAKE_SECONDS):
                connection = await self._handshaker.accept(tcp)
            if connection is not None and connection.peer != self._peer:
                await self._carry(Link(connection, self._house))
        except Unreachable as error:
            logger.debug("a stranger did not enter: %s", error)
        finally:
            self._strangers.pop(tcp, None)
            tcp.shut()

    async def _carry(self, link: Link) -> None:
        """Run a link to its end; the task boundary of links."""
        try:
            await link.run()
        except Exception:  # whatever the muxer makes of a peer's bytes ends that link only
            logger.debug("the link to %s failed", link.peer, exc_info=True)
        finally:
            self._remove(link)

    def _add(self, link: Link) -> None:
        """Count a link whose peer has proved the secret."""
        self._strangers.pop(link.tcp, None)
        links = self._links.setdefault(link.peer, [])
        links.append(link)
        if len(links) == 1:
            self._tell(link.peer, is_up=True)
        if len(links) > MOST_LINKS_PER_PEER:
            links[0].shut()

    def _remove(self, link: Link) -> None:
        links = self._links.get(link.peer, [])
        if link in links:
            links.remove(link)
            if not links:
                del self._links[link.peer]
                self._tell(link.peer, is_up=False)

    def _tell(self, peer: str, *, is_up: bool) -> None:
        if self._gossip is not None:
            self._gossip.link_changed(peer, is_up)
        for listener in tuple(self._listeners):
            try:
                listener(peer, is_up)
            except Exception:  # a listener's bug must not end the link
                logger.exception("a listener for links failed")

    def _gossiping(self) -> Gossip:
        if self._gossip is None:
            raise SwarmError("this host was opened without gossip")
        return self._gossip


@asynccontextmanager
async def open_host(
    identity: Identity,
    secret: bytes,
    *,
    listen: str | None = "127.0.0.1",
    port: int = 0,
    announce: Sequence[str] = (),
    is_only_announced: bool = False,
    gossip: bool = True,
) -> AsyncIterator[Libp2pHost]:
    """Run a host for as long as the block runs.

    `listen` is the name or address to listen on, None for a host that only dials; port 0 takes a
    free one. `announce` are multiaddrs under which others reach us, put before our own. A host
    without gossip neither publishes nor subscribes. BadInput if the port is in use.
    """
    announced = [_announced(text, identity.peer) for text in announce]
    failure: BaseException | None = None
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listening(listen, port)) if listen is not None else None
        own = _own(listen, listener, identity.peer)
        nursery = await stack.enter_async_context(trio.open_nursery())
        told = announced if is_only_announced else [*announced, *own]
        host = Libp2pHost(identity, secret, told, nursery)
        if gossip:
            await host.gossip_with(stack)
        if listener is not None:
            nursery.start_soon(host.accept_from, listener)
        try:
            yield host
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001  (raised again below)
            # The nurseries around would wrap it into a group, and the caller look in vain for it.
            failure = error
        finally:
            with trio.move_on_after(2 * CLOSE_SECONDS) as scope:
                scope.shield = True
                await host.close()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _announced(text: str, peer: str) -> Address:
    address = parse_address(text)
    if address is None or address.peer not in ("", peer):
        raise BadInput(f"{text} is no address of this host", next_step="write /ip4/HOST/tcp/PORT")
    return replace(address, peer=peer)


def _own(name: str | None, listener: socket.socket | None, peer: str) -> list[Address]:
    if name is None or listener is None:
        return []
    port: int = listener.getsockname()[1]
    return [replace(address, peer=peer) for address in own_addresses(name, port)]
