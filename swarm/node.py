"""A peer that serves, put together: host, gossip, server, and the record that tells of them.

1. What is announced is true when it is said: the record follows room and state within seconds.
2. A node that leaves says so, and is idle or out of patience by then.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import trio

from routing.offer import Offer
from routing.span import Span
from swarm import __version__
from swarm.errors import BadInput, SwarmError
from swarm.files import serve_files
from swarm.gossip import Gossip
from swarm.identity import Identity
from swarm.invite import swarm_id_of
from swarm.model import Description
from swarm.peers import PeerTable
from swarm.probe import measure_round_trip, serve_probe
from swarm.pulse import Pulse
from swarm.record import PeerRecord, place_of
from swarm.server import Room, Server
from swarm.tasks import open_tasks
from swarm.transport import Host
from swarm.whereabouts import Whereabouts
from swarm.worker import Executor

log = logging.getLogger(__name__)

REFRESH_SECONDS = 2.0
PROBE_EVERY_SECONDS = 10.0
PROBE_SECONDS = 2.0
_MOST_MODEL_NAME = 128  # what a record takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a node holds, ready to compute, and how fast it is."""

    span: Span
    executor: Executor
    cache_tokens: int
    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float
    head_seconds: float
    dtype: str
    device: str


class Node:
    """One serving peer. Made by `open_node`, which has its gossip running."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        description: Description,
        gossip: Gossip,
        nursery: trio.Nursery,
        name: str,
    ) -> None:
        self.host = host
        self.gossip = gossip
        self.server: Server | None = None
        self.whereabouts = Whereabouts(Random(host.peer).getrandbits(32))
        self._identity = identity
        self._description = description
        self._nursery = nursery
        self._name = name
        self._holding: Holding | None = None
        self._pulse = Pulse(host)
        nursery.start_soon(self._pulse.run)

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._description.fingerprint

    def records(self) -> tuple[PeerRecord, ...]:
        """The servers known now, this one among them."""
        return self.gossip.table.records(trio.current_time())

    def offers(self) -> tuple[Offer, ...]:
        """The same as routing sees them."""
        return self.gossip.table.offers(trio.current_time())

    async def hold(self, holding: Holding) -> None:
        """Begin to serve, and announce it. BadInput if what it would announce fits no record."""
        room = Room(
            span=holding.span,
            fingerprint=self._description.fingerprint,
            cache_tokens=holding.cache_tokens,
        )
        self._holding = holding
        self.server = Server(self.host, holding.executor, room, pulse=self._pulse)
        is_serving = trio.Event()
        self._nursery.start_soon(self.server.run, is_serving)
        await is_serving.wait()
        try:
            await self.gossip.announce(self.record())
        except ValueError as error:
            raise BadInput(f"this peer cannot be announced: {error}") from error
        self._nursery.start_soon(self._keep_record_true)
        self._nursery.start_soon(self._measure_links)

    def record(self) -> PeerRecord:
        """What this node says of itself now."""
        holding, server, told = self._holding, self.server, self._description
        if holding is None or server is None:
            raise RuntimeError("a node has no record before it holds blocks")
        return PeerRecord(
            peer=self.host.peer,
            sequence=0,
            addresses=self.host.addresses[:16],
            fingerprint=told.fingerprint,
            checkpoint_digest=told.checkpoint_digest,
            files_digest=told.files.digest,
            hub_name=told.hub_name,
            model_name=told.card.name[:_MOST_MODEL_NAME],
            blocks=told.card.blocks,
            span=str(holding.span),
            state="draining" if server.is_draining else "online",
            decode_seconds_per_block=holding.decode_seconds_per_block,
            prefill_seconds_per_block_token=holding.prefill_seconds_per_block_token,
            head_seconds=holding.head_seconds,
            free_tokens=server.free_tokens,
            dtype=holding.dtype,
            device=holding.device,
            place=place_of(self.whereabouts.coordinate),
            name=self._name,
            version=__version__,
        )

    async def drain(self, within: float) -> None:
        """Hand the sessions over, take no new ones, say goodbye. Never raises."""
        server = self.server
        if server is None:
            return
        server.drain()
        await self.gossip.announce(self.record())
        with trio.move_on_after(within):
            await server.wait_idle()
        await self.gossip.leave()

    async def _keep_record_true(self) -> None:
        told = self.record()
        while True:
            await trio.sleep(REFRESH_SECONDS)
            now = self.record()
            if now.state != told.state or now.addresses != told.addresses:
                await self.gossip.announce(now)
            elif now != told:
                self.gossip.refresh(now)
            told = now

    async def _measure_links(self) -> None:
        while True:
            links = self.host.links()
            self.whereabouts.keep_only(links)
            async with trio.open_nursery() as nursery:
                for peer in links:
                    nursery.start_soon(self._measure, peer)
            await trio.sleep(PROBE_EVERY_SECONDS)

    async def _measure(self, peer: str) -> None:
        try:
            seconds = await measure_round_trip(self.host, peer, within=PROBE_SECONDS)
        except SwarmError as error:
            log.debug("%s was not measured: %s", peer, error.message)
        else:
            record = self.gossip.table.record_of(peer)
            self.whereabouts.note(peer, seconds, record.coordinate if record else None)


@asynccontextmanager
async def open_node(
    host: Host,
    identity: Identity,
    secret: bytes,
    description: Description,
    *,
    seeds: Sequence[str] = (),
    sequence: int = 0,
    name: str = "",
) -> AsyncIterator[Node]:
    """Run a node's gossip and small services until the block ends; it serves once it holds."""
    gossip = Gossip(
        host,
        secret,
        PeerTable(swarm_id_of(description.fingerprint)),
        identity=identity,
        rng=Random(identity.peer),
        seeds=seeds,
        sequence=sequence,
    )
    serve_probe(host)
    serve_files(host, description.files)
    async with open_tasks() as nursery:
        nursery.start_soon(gossip.run)
        yield Node(host, identity, description, gossip, nursery, name)
