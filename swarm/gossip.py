"""Who is there: records spread, tables handed to newcomers, links kept.

A host announces its own record on a topic named by the swarm's secret, takes in what others
announce, and asks a linked peer for its whole table at the start and now and then.

1. A damaged record never enters the table and is never spread.
2. What a peer sends never ends a loop here: it ends that exchange, and is that peer's fault.
3. Every wait on a peer has a deadline; what a peer can make us hold or send is bounded.
4. Whatever others still remember of our key, also from an earlier run: our next announcement has
   a higher sequence.
5. After `leave` nothing more is announced until `announce` is called again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec
import trio

from swarm.errors import PeerFault, SwarmError
from swarm.gate import keyed_name
from swarm.identity import Identity
from swarm.peers import LinkWishes, Page, PeerTable, choose_dials
from swarm.record import (
    PeerRecord,
    claimed_record,
    next_sequence,
    open_record,
    sign_record,
    tombstone_of,
)
from swarm.tables import BEHIND_ALL, PEERS_PROTOCOL, Request, Requests, fetch_table
from swarm.transport import Host, Stream

Listener = Callable[[str, PeerRecord | None], None]

_PUBLISH_SECONDS = 5.0
_FAREWELL_SECONDS = 1.0  # a departing server is in a hurry; its records expire anyway
_FAREWELLS = 3
_IDLE_SECONDS = 10.0
_LOST_ANNOUNCEMENTS = 3.5  # how many periods a record outlives its last announcement
_MOST_PAGES = 256

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipSettings:
    """How often, how long, and how many links."""

    announce_seconds: float = 10.0  # between announcements, jittered by a fifth
    most_announce_seconds: float = 30.0  # in a large swarm
    announcements_per_second: float = 30.0  # of the whole swarm: 3 ms of each peer's CPU apiece
    first_pause_seconds: float = 1.0  # a first announcement may meet no link yet: again soon
    table_seconds: float = 60.0  # between readings of a linked peer's whole table
    fetch_seconds: float = 10.0  # for one reading
    sweep_seconds: float = 1.0  # between looks for records that ended and links that lack
    dial_seconds: float = 5.0
    redial_seconds: float = 15.0  # before a peer that could not be dialled is tried again
    links: LinkWishes = field(default_factory=LinkWishes)


class Gossip:
    """One host's part in the spreading of records. Call `run` once; its owner awaits it."""

    def __init__(
        self,
        host: Host,
        secret: bytes,
        table: PeerTable,
        *,
        identity: Identity,
        rng: Random,
        seeds: Sequence[str] = (),
        sequence: int = 0,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        settings: GossipSettings | None = None,
    ) -> None:
        """`seeds`: peers to dial when no link is left, their addresses known to the host.

        `sequence`: the last one this key has used, as far as is known.
        """
        self._host = host
        self._table = table
        self._identity = identity
        self._rng = rng
        self._seeds = tuple(seeds)
        self._sequence = sequence
        self._unix_ms = unix_ms
        self._settings = settings or GossipSettings()
        self._topic = keyed_name(secret, f"records {table.swarm_id}")
        self._own: PeerRecord | None = None
        self._own_signed = b""
        self._pause_seconds = self._settings.first_pause_seconds
        self._must_hurry = trio.Event()
        self._has_link = trio.Event()
        self._not_before: dict[str, float] = {}  # when a peer may be dialled again
        self._listeners: list[Listener] = []

    @property
    def table(self) -> PeerTable:
        """What this host knows."""
        return self._table

    @property
    def sequence(self) -> int:
        """The last sequence used or seen of the own key; a later run may start from it."""
        return self._sequence

    def watch(self, listener: Listener) -> None:
        """Call `listener(peer, record)` for each newer record, also our own and mere renewals,
        and `listener(peer, None)` when a peer has left or its record ended.
        """
        self._listeners.append(listener)

    async def run(self) -> None:
        """Listen, announce, read tables, serve ours, keep links and sweep, until cancelled."""
        self._host.serve(PEERS_PROTOCOL, self._serve_table)
        self._host.watch_links(self._note_link)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._announce_again)
            nursery.start_soon(self._read_tables)
            nursery.start_soon(self._keep_links)
            nursery.start_soon(self._sweep)

    async def announce(self, record: PeerRecord) -> None:
        """Make this the own record, spread it at once, again soon, and from time to time.

        Its `sequence` and `valid_seconds` are set here, at each announcement anew. ValueError if
        it is not the own peer's or cannot be signed.
        """
        signed = self._renew(record)
        self._own = record
        self._hurry()
        await self._publish(signed)

    def refresh(self, record: PeerRecord) -> None:
        """Make this the own record from the next announcement on: for figures that change often.

        Without effect before `announce` and after `leave`. ValueError as from `announce`.
        """
        if self._own is not None:
            sign_record(msgspec.structs.replace(record, sequence=self._sequence), self._identity)
            self._own = record

    async def leave(self) -> None:
        """Tell everyone that we are gone, within a few seconds. Never raises."""
        if self._own is None:
            return
        signed = self._renew(tombstone_of(self._own))
        self._own, self._own_signed = None, b""
        await self._publish(signed)
        # The host may close before gossip has moved: some peers hear it directly, and pass it on.
        with trio.move_on_after(_FAREWELL_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in self._linked_members()[:_FAREWELLS]:
                    nursery.start_soon(self._read_table, peer, signed, BEHIND_ALL)

    async def _listen(self) -> None:
        channel = await self._host.subscribe(self._topic, self._may_spread)
        async with channel:
            async for signed in channel:
                self._take(signed, 0.0)

    def _may_spread(self, signed: bytes) -> bool:
        try:
            record = open_record(signed)
        except PeerFault:
            return False
        is_ours = record.fingerprint.startswith(self._table.swarm_id)
        return is_ours and not self._table.is_outdated(record)

    async def _announce_again(self) -> None:
        while True:
            with trio.move_on_after(self._jittered(self._pause_seconds)):
                await self._must_hurry.wait()
                self._must_hurry = trio.Event()
                continue
            if self._own is not None:
                await self._publish(self._renew(self._own))
            self._pause_seconds = min(2 * self._pause_seconds, self._period_seconds())

    async def _read_tables(self) -> None:
        while True:
            linked = self._linked_members()
            if not linked:
                self._has_link = trio.Event()
                await self._has_link.wait()
                continue
            is_read = await self._read_table(self._rng.choice(linked), self._own_signed)
            settings = self._settings
            pause = settings.table_seconds if is_read else settings.first_pause_seconds
            await trio.sleep(self._jittered(pause))

    def _linked_members(self) -> list[str]:
        """Whom to ask: linked peers that gossip too, as far as that is known."""
        links = sorted(self._host.links())
        members = [p for p in links if p in self._seeds or self._table.record_of(p) is not None]
        return members or links

    async def _read_table(self, peer: str, own: bytes, after: str = "") -> bool:
        within = self._settings.fetch_seconds
        try:
            given = await fetch_table(self._host, peer, within, own=own, after=after)
        except SwarmError as error:
            _logger.debug("%s gave no table: %s", peer, error.message)
            return False
        for signed, age in given.records:
            self._take(signed, age)
            await trio.lowlevel.checkpoint()  # thousands of signatures would stop all else
        return True

    async def _serve_table(self, stream: Stream) -> None:
        requests = Requests(stream)
        for _ in range(_MOST_PAGES):
            request = await requests.receive(within=_IDLE_SECONDS)
            if request.own:
                await self._take_from(stream.peer, request.own)
            await requests.answer(self._part_of_table(request))

    def _part_of_table(self, request: Request) -> Page:
        now = trio.current_time()
        if request.is_view:
            avoid = frozenset(request.avoid)
            return self._table.view(now, request.known, avoid, own=self._host.peer)
        return self._table.page(now, request.after)

    async def _take_from(self, peer: str, own: bytes) -> None:
        """Take in what a peer says of itself, and pass it on if it is news."""
        if claimed_record(own).peer != peer:
            raise PeerFault(f"{peer} handed in another peer's record as its own")
        if self._take(own, 0.0):
            await self._publish(own)

    async def _keep_links(self) -> None:
        while True:
            async with trio.open_nursery() as nursery:
                for peer in self._whom_to_dial():
                    nursery.start_soon(self._dial, peer)
            await trio.sleep(self._jittered(self._settings.sweep_seconds))

    def _whom_to_dial(self) -> list[str]:
        now = trio.current_time()
        self._not_before = {peer: at for peer, at in self._not_before.items() if at > now}
        links = self._host.links()
        own = self._own.held if self._own else None
        others = [record for record in self._table.records(now) if record.peer != self._host.peer]
        wishes, avoid = self._settings.links, self._not_before
        chosen = choose_dials(own, others, links, avoid, wishes, self._rng)
        if chosen or not links.isdisjoint([*self._seeds, *(record.peer for record in others)]):
            return chosen
        return [peer for peer in self._seeds if peer not in avoid]

    async def _dial(self, peer: str) -> None:
        try:
            await self._host.dial(peer, within=self._settings.dial_seconds)
        except SwarmError as error:
            _logger.debug("%s could not be dialled: %s", peer, error.message)
            self._not_before[peer] = trio.current_time() + self._settings.redial_seconds

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(self._settings.sweep_seconds)
            for record in self._table.expire(trio.current_time()):
                self._tell(record.peer, None)

    def _take(self, signed: bytes, age: float) -> bool:
        """Take in a record from outside. True if it is news; never raises."""
        try:
            if claimed_record(signed).peer == self._host.peer:
                self._hear_of_self(open_record(signed))
                return False
            if not self._table.add(signed, trio.current_time(), age):
                return False
        except PeerFault as fault:
            _logger.debug("a record is not taken: %s", fault.message)
            return False
        record = claimed_record(signed)  # verified by the table
        if record.addresses:
            self._host.learn(record.peer, record.addresses)
        self._tell(record.peer, None if record.is_gone else record)
        return True

    def _hear_of_self(self, record: PeerRecord) -> None:
        """Others may remember more of our key than we do: go above it, soon."""
        if record.sequence > self._sequence:
            self._sequence = record.sequence
            self._hurry()

    def _renew(self, record: PeerRecord) -> bytes:
        """Sign a record of ours under the next sequence, take it in and return it signed."""
        sequence = next_sequence(self._sequence, self._unix_ms())
        record = msgspec.structs.replace(
            record, sequence=sequence, valid_seconds=_LOST_ANNOUNCEMENTS * self._period_seconds()
        )
        signed = sign_record(record, self._identity)
        self._sequence, self._own_signed = sequence, signed
        if self._table.add(signed, trio.current_time()):
            self._tell(record.peer, None if record.is_gone else record)
        return signed

    async def _publish(self, signed: bytes) -> None:
        with trio.move_on_after(_PUBLISH_SECONDS):
            try:
                await self._host.publish(self._topic, signed)
            except SwarmError as error:
                _logger.debug("a record could not be published: %s", error.message)

    def _tell(self, peer: str, record: PeerRecord | None) -> None:
        for listener in self._listeners:
            listener(peer, record)

    def _note_link(self, _peer: str, is_up: bool) -> None:
        if is_up:
            self._has_link.set()

    def _hurry(self) -> None:
        self._pause_seconds = self._settings.first_pause_seconds
        self._must_hurry.set()

    def _period_seconds(self) -> float:
        settings = self._settings
        shared = len(self._table) / settings.announcements_per_second
        return min(max(settings.announce_seconds, shared), settings.most_announce_seconds)

    def _jittered(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.8, 1.2)
