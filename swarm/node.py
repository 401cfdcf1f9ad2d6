"""A peer that serves, put together: host, gossip, server, and the record that tells of them.

1. What is announced is true when it is said: the record follows room and state within seconds.
2. A node that leaves says so, and is idle or out of patience by then.
3. It serves one span at a time, and may serve others one after the other.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import trio

from routing.offer import Offer
from routing.span import Span
from swarm import __version__
from swarm.digests import contradicted, outvoted
from swarm.errors import BadInput, SwarmError
from swarm.files import serve_files
from swarm.gossip import Gossip
from swarm.identity import Identity
from swarm.invite import swarm_id_of
from swarm.legs import WAITING_BYTES
from swarm.model import Description
from swarm.pace import Pace, PacedExecutor, Speeds
from swarm.peers import PeerTable
from swarm.probe import measure_round_trip, serve_probe
from swarm.pulse import Pulse
from swarm.record import PeerRecord, State, digests_of, place_of
from swarm.server import HISTORY_BYTES, Room, Server
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
    """What a node holds, ready to compute, and how fast it was when it was measured.

    Who made it calls `close` when no server uses it any more: it frees the weights.
    """

    span: Span
    executor: Executor
    cache_tokens: int
    speeds: Speeds
    dtype: str
    device: str
    quantization: str = "none"
    digests: bytes = b""  # of its blocks, as a record tells them
    cache_bytes: int = 0  # what the caches may take; 0 if that is not known
    history_bytes: int = HISTORY_BYTES
    waiting_bytes: int = WAITING_BYTES
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class _Serving:
    """A server at work, what it serves, and how to end it."""

    holding: Holding
    server: Server
    pace: Pace
    scope: trio.CancelScope
    has_ended: trio.Event


class Node:
    """One serving peer. Made by `open_node`, which has its gossip running."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        description: Description,
        gossip: Gossip,
        pulse: Pulse,
        nursery: trio.Nursery,
        name: str,
    ) -> None:
        self.host = host
        self.gossip = gossip
        self.whereabouts = Whereabouts(Random(host.peer).getrandbits(32))
        self.is_leaving = False
        self._identity = identity
        self._description = description
        self._nursery = nursery
        self._name = name
        self._serving: _Serving | None = None
        self._joining: tuple[Span, Speeds] | None = None
        self._is_stepping_back = False
        self._outvoted: tuple[Span, ...] = ()
        self._pulse = pulse

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self._description.fingerprint

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return self._description.card.blocks

    def records(self) -> tuple[PeerRecord, ...]:
        """The servers known now, this one among them."""
        return self.gossip.table.records(trio.current_time())

    def offers(self) -> tuple[Offer, ...]:
        """The same as routing sees them."""
        return self.gossip.table.offers(trio.current_time())

    async def join(self, span: Span, guessed: Speeds) -> None:
        """Announce that these blocks are being loaded: whoever comes now counts on them."""
        self._joining = (span, guessed)
        await self._announce()

    async def hold(self, holding: Holding) -> None:
        """Begin to serve, and announce it. BadInput if what it would announce fits no record, or
        if its weights are not those that the swarm serves.

        One span at a time: what was held before is released first.
        """
        if self._serving is not None:
            raise RuntimeError("a node serves one span at a time")
        self._refuse_strange(holding)
        room = Room(
            span=holding.span,
            fingerprint=self._description.fingerprint,
            cache_tokens=holding.cache_tokens,
            cache_bytes=holding.cache_bytes,
            history_bytes=holding.history_bytes,
            waiting_bytes=holding.waiting_bytes,
        )
        pace = Pace(holding.speeds)
        executor = PacedExecutor(holding.executor, pace, trio.current_time)
        server = Server(self.host, executor, room, pulse=self._pulse)
        is_serving, has_ended, scope = trio.Event(), trio.Event(), trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    await server.run(is_serving)
            finally:
                has_ended.set()

        self._nursery.start_soon(run)
        await is_serving.wait()
        self._serving = _Serving(holding, server, pace, scope, has_ended)
        self._joining = None
        try:
            await self._announce()
        except ValueError as error:
            raise BadInput(f"this peer cannot be announced: {error}") from error

    async def step_back(self, is_back: bool) -> None:
        """Take no new sessions for now (True), as if draining, or take them again (False)."""
        self._is_stepping_back = is_back
        await self._announce()

    async def release(self, within: float) -> None:
        """Hand the sessions over and end the server, in that time at most. Never raises."""
        serving = self._serving
        if serving is None:
            return
        serving.server.drain()
        await self._announce()
        with trio.move_on_after(within):
            await serving.server.wait_idle()
        await self.end()

    async def end(self) -> None:
        """End the server at once, if there is one; what it computes with may then be closed."""
        serving, self._serving = self._serving, None
        self._is_stepping_back = False
        if serving is not None:
            serving.scope.cancel()
            with trio.CancelScope(shield=True):
                await serving.has_ended.wait()

    async def drain(self, within: float) -> None:
        """Hand the sessions over, take no new ones, say goodbye. Never raises."""
        self.is_leaving = True
        serving = self._serving
        if serving is not None:
            serving.server.drain()
            await self.gossip.announce(self.record())
            with trio.move_on_after(within):
                await serving.server.wait_idle()
        await self.gossip.leave()

    def record(self) -> PeerRecord:
        """What this node says of itself now. RuntimeError before it joins or holds anything."""
        serving = self._serving
        if serving is not None:
            now = trio.current_time()
            has_left = serving.server.is_draining or self._is_stepping_back
            held = serving.holding
            return self._record(
                held.span,
                "draining" if has_left else "online",
                serving.pace.speeds(now),
                free_tokens=serving.server.free_tokens,
                dtype=held.dtype,
                device=held.device,
                quantization=held.quantization,
                digests=held.digests,
            )
        if self._joining is not None:
            return self._record(self._joining[0], "joining", self._joining[1])
        raise RuntimeError("a node has no record before it joins")

    def _record(
        self,
        span: Span,
        state: State,
        speeds: Speeds,
        *,
        free_tokens: int = 0,
        dtype: str = "",
        device: str = "",
        quantization: str = "none",
        digests: bytes = b"",
    ) -> PeerRecord:
        told = self._description
        return PeerRecord(
            peer=self.host.peer,
            sequence=0,
            addresses=self.host.addresses[:16],
            fingerprint=told.fingerprint,
            checkpoint_digest=told.checkpoint_digest,
            files_digest=told.files.digest,
            hub_name=told.hub_name,
            revision=told.revision,
            model_name=told.card.name[:_MOST_MODEL_NAME],
            blocks=told.card.blocks,
            span=str(span),
            state=state,
            decode_seconds_per_block=speeds.decode_seconds_per_block,
            prefill_seconds_per_block_token=speeds.prefill_seconds_per_block_token,
            head_seconds=speeds.head_seconds,
            wait_seconds=speeds.wait_seconds,
            free_tokens=free_tokens,
            dtype=dtype,
            device=device,
            quantization=quantization,
            digests=digests,
            place=place_of(self.whereabouts.coordinate),
            name=self._name,
            version=__version__,
        )

    def _refuse_strange(self, holding: Holding) -> None:
        """BadInput if others hold other weights of these blocks, and nobody the same."""
        own = digests_of(holding.span, holding.digests)
        others = [record for record in self.records() if record.peer != self.host.peer]
        strange = contradicted(own, others)
        if strange:
            spans = ", ".join(map(str, strange))
            raise BadInput(
                f"the weights of blocks {spans} here are not those that others of the swarm serve",
                next_step="fetch the checkpoint again, or serve the model that the token is for",
            )

    async def _announce(self) -> None:
        """Spread what is true now. Who has said goodbye says nothing more."""
        if not self.is_leaving:
            await self.gossip.announce(self.record())

    async def keep_record_true(self) -> None:
        """Announce what changed again and again, until cancelled."""
        told: PeerRecord | None = None
        while True:
            await trio.sleep(REFRESH_SECONDS)
            if self.is_leaving or (self._serving is None and self._joining is None):
                continue
            self._tell_if_outvoted()
            now = self.record()
            if told is None or now.state != told.state or now.addresses != told.addresses:
                await self._announce()
            elif now != told:
                self.gossip.refresh(now)
            told = now

    def _tell_if_outvoted(self) -> None:
        """Warn, once for each change, when most others hold other weights of the same blocks."""
        wrong = outvoted(self.records()).get(self.host.peer, ())
        if wrong and wrong != self._outvoted:
            spans = ", ".join(map(str, wrong))
            log.warning("blocks %s here differ from those of most others: damaged?", spans)
        self._outvoted = wrong

    async def measure_links(self) -> None:
        """Measure the round trips to those linked to again and again, until cancelled."""
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
    pulse = Pulse(host)
    async with open_tasks() as nursery:
        nursery.start_soon(gossip.run)
        nursery.start_soon(pulse.run)
        node = Node(host, identity, description, gossip, pulse, nursery, name)
        nursery.start_soon(node.keep_record_true)
        nursery.start_soon(node.measure_links)
        yield node
