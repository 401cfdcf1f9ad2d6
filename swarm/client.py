"""A peer that asks: enters a swarm by its token, learns who serves, and finds routes.

1. Entering needs nothing but the token: the model's description and tokenizer come from peers,
   and are checked against the fingerprint that the token names.
2. A route is found among the newest records: after a trouble, and when those known have none, they
   are read again first.
"""

import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from random import Random

import trio

from routing.cost import CostModel, Work
from routing.offer import Offer
from routing.repair import Repair, repair
from routing.route import NoRoute as Gap
from routing.route import Route
from routing.search import fastest_route
from routing.view import spares
from swarm.client_session import Broken, ClientSession, open_session
from swarm.digests import outvoted
from swarm.errors import NoRoute, Refusal, SwarmError, Unreachable
from swarm.fetching import Model, fetch_model
from swarm.files import FileCache
from swarm.identity import Identity
from swarm.invite import Invite
from swarm.peers import PeerTable
from swarm.probe import measure_round_trip
from swarm.pulse import Pulse
from swarm.reading import read_tables, read_views
from swarm.record import PeerRecord, offer_of
from swarm.suspects import Suspects
from swarm.tasks import open_tasks
from swarm.transport import Host
from swarm.whereabouts import Whereabouts

log = logging.getLogger(__name__)

FRESH_SECONDS = 1.0  # records read since then are not read again for the next try at a route
REFRESH_SECONDS = 5.0  # a newcomer may take over this soon; a record lives for some 35
PROBE_SECONDS = 1.0
MOST_PROBED = 16
MOST_DIALLED = 8  # at once, when the last link is gone
DIAL_SECONDS = 5.0
# For servers nobody measured: an ocean's width, so that measured neighbours are preferred.
UNMEASURED_SECONDS = 0.15
WIRE_BYTES_PER_VALUE = 4
# Before a server takes a silent one's place: an echo, over a link that may have to be dialled.
ANSWER_SECONDS = 0.25
ANSWER_ROUND_TRIPS = 6
SETTLING_PULLS = 8  # of each measured peer: a client is here too briefly to settle slowly


class Client:
    """A peer of one swarm that serves nothing. Made by `open_client`."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        table: PeerTable,
        model: Model,
        pulse: Pulse | None = None,
    ) -> None:
        """`pulse` tells of hops that fall silent; its owner runs it."""
        self._pulse = pulse
        self._suspects = Suspects()
        self.host = host
        self.model = model
        self.table = table
        self._identity = identity
        self._seed = Random().getrandbits(32)
        self._read_at = float("-inf")
        self._avoided: frozenset[str] = frozenset()  # when the records were last read
        self.whereabouts = Whereabouts(self._seed)
        self.is_exact = False  # True: only servers whose weights are not quantized

    def session(
        self, max_tokens: int, *, prompt: Sequence[int] = (), route_seconds: float = 30.0
    ) -> AbstractAsyncContextManager[ClientSession]:
        """Open a session with room for `max_tokens`, to begin with `prompt`: see `open_session`."""
        return open_session(
            self.host,
            self._identity,
            self.find_route,
            repair_route=self.repair_route,
            pulse=self._pulse,
            suspects=self._suspects,
            fingerprint=self.model.fingerprint,
            max_tokens=max_tokens,
            prompt=prompt,
            length_scaling=self.model.card.length_scaling,
            wall_clock=time.time,
            route_seconds=route_seconds,
        )

    async def find_route(self, avoid: frozenset[str], needed_tokens: int) -> Route:
        """Return the route with the least expected seconds for a decode step. NoRoute if none."""
        # Suspects are forgiven one by one: each time the same records would be read.
        is_fresh = bool(avoid) and avoid <= self._avoided
        is_fresh &= trio.current_time() - self._read_at < FRESH_SECONDS
        if not self.records() or (avoid and not is_fresh):
            await self.refresh(avoid)
            return self._best_route(avoid, needed_tokens)
        try:
            return self._best_route(avoid, needed_tokens)
        except NoRoute:
            if is_fresh:
                raise
            await self.refresh(avoid)  # somebody may have come meanwhile
            return self._best_route(avoid, needed_tokens)

    async def repair_route(self, broken: Broken, needed_tokens: int) -> Repair:
        """Return the route with its lost hops replaced. NoRoute if some blocks have no server.

        The records at hand decide: reading them again would make the user wait. Only if they hold
        no answer are they read. After a silence the new ones are asked first whether they live:
        what silenced one may have silenced its neighbours, and to find that out on the way takes
        seconds each time.
        """
        is_silence = any(each.kind in ("silent", "unreachable") for each in broken.troubles)
        while True:
            repaired = await self._repair(broken, needed_tokens)
            new = {hop.peer for hop in repaired.hops if hop.mode == "new"} - {*broken.suspects}
            silent = await self._without_answer(new) if is_silence else []
            if not silent:
                return repaired
            for peer in silent:
                self._suspects.add(peer, trio.current_time(), 0.0)
            broken = replace(broken, suspects=(*broken.suspects, *silent))

    async def _repair(self, broken: Broken, needed_tokens: int) -> Repair:
        try:
            return self._repaired(broken, needed_tokens)
        except NoRoute:
            await self.refresh({*broken.suspects, *(each.peer for each in broken.troubles)})
            return self._repaired(broken, needed_tokens)

    async def _without_answer(self, peers: Collection[str]) -> list[str]:
        """Ask all at once; return who does not answer soon."""
        silent: list[str] = []
        known = self.whereabouts.round_trips

        async def ask(peer: str) -> None:
            seconds = ANSWER_SECONDS + ANSWER_ROUND_TRIPS * known.get(peer, UNMEASURED_SECONDS)
            try:
                await measure_round_trip(self.host, peer, within=seconds, rounds=0)
            except SwarmError as error:
                log.debug("%s takes nobody's place: %s", peer, error.message)
                silent.append(peer)

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
        return sorted(silent)

    def _repaired(self, broken: Broken, needed_tokens: int) -> Repair:
        try:
            return repair(
                broken.hops,
                broken.troubles,
                [offer for offer in self._offers() if offer.peer not in broken.full],
                self.model.card.blocks,
                self._cost(),
                retried=broken.retried,
                suspects=broken.suspects,
                needed_tokens=needed_tokens,
                seed=self._seed,
            )
        except Gap as gap:
            raise no_route(gap, is_exact=self.is_exact) from gap

    def _best_route(self, avoid: frozenset[str], needed_tokens: int) -> Route:
        try:
            return fastest_route(
                self._offers(),
                self.model.card.blocks,
                self._cost(),
                seed=self._seed,
                needed_tokens=needed_tokens,
                avoid=avoid,
            )
        except Gap as gap:
            raise no_route(gap, is_exact=self.is_exact) from gap

    def _offers(self) -> list[Offer]:
        """Whom a route may use: not those whose weights most others contradict, and none with
        quantized ones if exact words are wanted.
        """
        records = self.records()
        wrong = outvoted(records)
        return [
            offer_of(record)
            for record in records
            if record.peer not in wrong and (record.quantization == "none" or not self.is_exact)
        ]

    def _cost(self) -> CostModel:
        work = Work(
            blocks=self.model.card.blocks,
            tokens=1,
            bytes_per_token=self.model.card.hidden_size * WIRE_BYTES_PER_VALUE,
            is_prefill=False,
        )
        told = {record.peer: record.coordinate for record in self.records()}
        places = {peer: place for peer, place in told.items() if place is not None}
        return CostModel(self.whereabouts.links(places, UNMEASURED_SECONDS), work)

    def records(self) -> tuple[PeerRecord, ...]:
        """The servers known now."""
        return self.table.records(trio.current_time())

    def record_of(self, peer: str) -> PeerRecord | None:
        """What a server says of itself."""
        return self.table.record_of(peer)

    async def refresh(self, avoid: Collection[str] = (), *, is_whole: bool = False) -> None:
        """Ask every peer that we are linked to for what it knows and we don't.

        In a large swarm that is a view: servers beside those to `avoid`, and only the best of each
        block unless `is_whole`. Who does not answer adds nothing. Never raises. Without any link,
        some of the servers known are dialled first.
        """
        if not self.host.links():
            known = sorted(record.peer for record in self.records())
            chosen = Random(self._seed).sample(known, min(len(known), MOST_DIALLED))
            await _dial_any(self.host, chosen, within=DIAL_SECONDS)
        before = {record.peer: record.sequence for record in self.records()}
        if is_whole or self.is_exact:  # the best of each block may all be quantized
            await read_tables(self.host, self.table)
        else:
            await read_views(self.host, self.table, avoid)
        now = trio.current_time()
        for record in self.records():
            if record.sequence > before.get(record.peer, 0):
                self._suspects.heard_of(record.peer, now)
        self._read_at, self._avoided = now, frozenset(avoid)

    async def keep_records(self) -> None:
        """Read the records again and again, so that a repair has fresh ones at hand, and be linked
        to spare servers of every block, so that it need not dial.
        """
        while True:
            await trio.sleep(REFRESH_SECONDS)
            now = trio.current_time()
            self.table.expire(now)
            suspects = self._suspects.at(now)
            await self.refresh(suspects)
            offers = [offer for offer in self._offers() if offer.peer not in suspects]
            await self._measure_all(spares(offers, self.host.links(), self.model.card.blocks))

    async def measure(self) -> None:
        """Measure the round trip to each server, or to a sample of many; never raises."""
        peers = sorted(record.peer for record in self.records())
        if len(peers) > MOST_PROBED:
            peers = Random(self._seed).sample(peers, MOST_PROBED)
        await self._measure_all(peers)

    async def _measure_all(self, peers: Sequence[str]) -> None:
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._measure, peer)

    async def _measure(self, peer: str) -> None:
        record = self.record_of(peer)
        place = record.coordinate if record else None
        try:
            seconds = await measure_round_trip(self.host, peer, within=PROBE_SECONDS)
        except SwarmError as error:
            log.debug("%s was not measured: %s", peer, error.message)
            self.whereabouts.note(peer, PROBE_SECONDS, None)
        else:
            self.whereabouts.note(peer, seconds, place, times=SETTLING_PULLS)


@asynccontextmanager
async def open_client(
    host: Host, identity: Identity, invite: Invite, cache: FileCache
) -> AsyncIterator[Client]:
    """Enter the swarm that the invite names.

    Raises Unreachable if nobody that it names answers, Refusal if they do not accept its secret,
    NoRoute if nobody serves anything.
    """
    await enter(host, invite)
    table = PeerTable(invite.swarm_id)
    await read_views(host, table)
    records = table.records(trio.current_time())
    if not records:
        raise NoRoute(
            "nobody serves a model in this swarm yet",
            next_step="wait for a server to finish loading, then try again",
        )
    model = await fetch_model(host, records, cache)
    pulse = Pulse(host)
    async with open_tasks() as nursery:
        nursery.start_soon(pulse.run)
        client = Client(host, identity, table, model, pulse)
        await client.measure()
        nursery.start_soon(client.keep_records)
        yield client


async def enter(host: Host, invite: Invite, *, within: float = 10.0) -> None:
    """Be linked to at least one of the peers that the invite names, as soon as one answers."""
    others = {peer: ways for peer, ways in invite.peers.items() if peer != host.peer}
    for peer, addresses in others.items():
        host.learn(peer, addresses)
    failures = await _dial_any(host, tuple(others), within=within)
    if host.links():
        return
    refusals = [error for error in failures if isinstance(error, Refusal)]
    if refusals:
        raise refusals[0]
    raise Unreachable(
        "none of the peers that the join token names answers",
        next_step="ask somebody in the swarm for a fresh token (`swarm invite`)",
    )


async def _dial_any(host: Host, peers: Sequence[str], *, within: float) -> list[SwarmError]:
    """Dial all at the same time until one answers; return how the others failed."""
    failures: list[SwarmError] = []

    async def dial(peer: str, scope: trio.CancelScope) -> None:
        try:
            await host.dial(peer, within=within)
        except SwarmError as error:
            failures.append(error)
        else:
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(dial, peer, nursery.cancel_scope)
    return failures


def no_route(gap: Gap, *, is_exact: bool = False) -> NoRoute:
    """Routing's answer as the error that users see."""
    uncovered = tuple(str(span) for span in gap.uncovered)
    if uncovered and is_exact:
        step = "without --exact, servers with quantized weights would do too"
    elif uncovered:
        step = "`swarm status` shows who is there, `swarm serve --join` adds a server"
    elif gap.full:
        step = "try again soon, or with fewer tokens (-n)"
    else:
        step = "`swarm status` shows who is there"
    return NoRoute(str(gap), next_step=step, uncovered=uncovered, is_full=bool(gap.full))
