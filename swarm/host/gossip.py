"""Gossip: libp2p's GossipSub over our links.

GossipSub asks a whole libp2p host of its owner; `_Endpoint` is what it really uses of one. Settings
are those that were found to work: the defaults lose messages silently.

1. Only peers that have proved the secret are ever shown to GossipSub.
2. Nothing that a peer sends ends the gossip of others.
3. A subscriber gets each message of others once; what its check denies is neither given nor spread.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import base58
import trio
from google.protobuf.message import DecodeError
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamClosed, StreamEOF
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from swarm.errors import PeerFault, Unreachable
from swarm.host.settings import ANSWER_SECONDS, GOSSIP_BACKLOG
from swarm.transport import Handler, MessageCheck, Stream

logger = logging.getLogger(__name__)


class _Streams(Protocol):
    """What gossip needs of the host."""

    @property
    def peer(self) -> str: ...

    def serve(self, protocol: str, handler: Handler) -> None: ...

    def links(self) -> frozenset[str]: ...

    async def open_confirmed(self, peer: str, protocol: str, *, within: float) -> Stream: ...


class _GossipStream:
    """A stream as GossipSub wants it: exact reads, and libp2p's errors."""

    metric_send_channel = None

    def __init__(self, stream: Any, connection: "_Connection") -> None:
        self._stream = stream
        self.muxed_conn = connection

    def get_protocol(self) -> str:
        return str(self._stream.protocol)

    async def read(self, n: int) -> bytes:
        data = b""
        try:
            while len(data) < n:
                data += await self._stream.read(n - len(data))
        except Unreachable as error:
            raise StreamEOF(error.message) from error
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except Unreachable as error:
            raise StreamClosed(error.message) from error

    async def reset(self) -> None:
        await self._stream.close()

    async def close(self) -> None:
        await self._stream.close()


class _Connection:
    """A link as GossipSub sees it: it asks for the id of the peer, and whether it is closed."""

    def __init__(self, peer: str) -> None:
        self.peer_id = ID(base58.b58decode(peer))
        self.muxed_conn = self
        self.is_closed = False


class _Endpoint:
    """The part of libp2p's host and network that GossipSub calls."""

    def __init__(self, host: _Streams, key_pair: Any) -> None:
        self._host = host
        self._key_pair = key_pair
        self._store = PeerStore()
        self._id = ID.from_pubkey(key_pair.public_key)
        self._store.add_key_pair(self._id, key_pair)
        self.notifees: list[Any] = []

    def get_network(self) -> "_Endpoint":
        return self

    def get_id(self) -> ID:
        return self._id

    def get_private_key(self) -> Any:
        return self._key_pair.private_key

    def get_public_key(self) -> Any:
        return self._key_pair.public_key

    def get_peerstore(self) -> PeerStore:
        return self._store

    def get_addrs(self) -> list[Any]:
        return []

    def register_notifee(self, notifee: Any) -> None:
        self.notifees.append(notifee)

    def get_connections(self, peer: ID) -> list[_Connection]:
        name = peer.to_base58()
        return [_Connection(name)] if name in self._host.links() else []

    def set_stream_handler(self, protocol: str, handler: Callable[[Any], Awaitable[None]]) -> None:
        async def serve(stream: Stream) -> None:
            try:
                await handler(_GossipStream(stream, _Connection(stream.peer)))
            except DecodeError as error:
                raise PeerFault(f"{stream.peer} sent malformed gossip") from error

        self._host.serve(str(protocol), serve)

    async def new_stream(self, peer: ID, protocols: Sequence[str]) -> _GossipStream:
        name = peer.to_base58()
        if name not in self._host.links():
            raise SwarmException(f"{name} is not linked")  # which GossipSub takes as "gone"
        stream = await self._host.open_confirmed(name, str(protocols[0]), within=ANSWER_SECONDS)
        return _GossipStream(stream, _Connection(name))


class _SafePubsub(Pubsub):  # type: ignore[misc]  # libp2p is untyped to us
    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception:  # a malformed key or id in one message must not end the service
            logger.debug("gossip from %s was dropped", msg_forwarder, exc_info=True)


class _SafeGossipSub(GossipSub):  # type: ignore[misc]
    # Each of these runs as a task of the service, which ends with the first that raises.

    async def heartbeat(self) -> None:
        while True:
            await _quietly(super().heartbeat())  # for ever, unless it raises
            await trio.sleep(self.heartbeat_interval)

    async def on_peer_subscribed(self, peer_id: Any, topic: str) -> None:
        await _quietly(super().on_peer_subscribed(peer_id, topic))

    async def flush_pending_messages(self, peer_id: Any) -> None:
        await _quietly(super().flush_pending_messages(peer_id))


async def _quietly(task: Awaitable[None]) -> None:
    try:
        await task
    except Exception:  # what one peer's bytes break must not end the gossip of all
        logger.debug("gossip stumbled", exc_info=True)


class Gossip:
    """Topics, spread over the links it is told of."""

    def __init__(self, pubsub: Pubsub, endpoint: _Endpoint, nursery: trio.Nursery) -> None:
        self._pubsub = pubsub
        self._endpoint = endpoint
        self._nursery = nursery
        self._own = endpoint.get_id().to_bytes()

    def link_changed(self, peer: str, is_up: bool) -> None:
        """Take note that a link came up or went down."""
        for notifee in self._endpoint.notifees:
            tell = notifee.connected if is_up else notifee.disconnected
            self._nursery.start_soon(tell, self._endpoint, _Connection(peer))

    async def publish(self, topic: str, data: bytes) -> None:
        """Spread data to all that subscribe to the topic."""
        await self._pubsub.publish(topic, data)

    async def subscribe(self, topic: str, check: MessageCheck) -> trio.MemoryReceiveChannel[bytes]:
        """Receive what others publish, as far as `check` allows it."""

        def is_valid(_forwarder: Any, message: Any) -> bool:
            return check(bytes(message.data))

        self._pubsub.set_topic_validator(topic, is_valid, is_async_validator=False)
        subscription = await self._pubsub.subscribe(topic)
        give, take = trio.open_memory_channel[bytes](GOSSIP_BACKLOG)
        self._nursery.start_soon(self._pass_on, subscription, give)
        return take

    async def _pass_on(self, subscription: Any, give: trio.MemorySendChannel[bytes]) -> None:
        with give:
            async for message in subscription:
                if message.from_id == self._own:
                    continue
                try:
                    give.send_nowait(bytes(message.data))
                except trio.WouldBlock:
                    logger.debug("a subscriber lags behind: a message is dropped")
                except trio.BrokenResourceError:
                    return


@asynccontextmanager
async def gossiping(host: _Streams, key_pair: Any, nursery: trio.Nursery) -> AsyncIterator[Gossip]:
    """Run GossipSub for as long as the block runs; `nursery` must outlive it."""
    router = _SafeGossipSub(
        protocols=[PROTOCOL_ID_V11],  # 1.2 costs twice the CPU
        degree=6,
        degree_low=5,
        degree_high=24,  # low ones and a long back-off empty the meshes
        heartbeat_interval=1,  # default 120
        prune_back_off=5,
        adaptive_gossip_enabled=False,  # would stretch the heartbeat to 30 s
        spam_protection_enabled=False,  # drops above 10 messages a second and forwarder, silently
        eclipse_protection_enabled=False,
    )
    endpoint = _Endpoint(host, key_pair)
    pubsub = _SafePubsub(endpoint, router)
    # Seconds by default: messages of a process restarted at once would pass for old ones.
    pubsub.counter = time.time_ns()
    try:
        async with background_trio_service(pubsub), background_trio_service(router):
            await pubsub.wait_until_ready()
            yield Gossip(pubsub, endpoint, nursery)
    finally:
        pubsub.seen_messages.stop()  # a thread
