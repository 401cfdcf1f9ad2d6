"""The table of peers, the newest record of each while it is valid, and whom of them to link to.

Pure: no clock, no socket. `now` is the holder's own monotonic clock in seconds, whatever its zero.

1. Nothing enters that its peer did not sign, that another swarm's peer signed, or that is older
   than what was seen of that peer.
2. A record lives for `lifetime_seconds` from its first receipt anywhere, as far as ages are told
   truly, and never longer than MOST_VALID_SECONDS from its first receipt here.
3. A record that ended, by its tombstone or by age, leaves a shadow for SHADOW_SECONDS: until then
   no equal or older record of that peer enters. By then every copy elsewhere has ended too.
4. The table holds at most `most_peers` records and as many shadows. When it is full, no newcomer
   enters until a record ends.
5. Who reads one view after the other knows a server for every block that has one, and hears of all
   that changes in what it knows, as long as that is no more than VIEW_BYTES.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import NamedTuple

from routing.offer import Offer
from routing.span import Span
from routing.view import best_offers
from swarm.record import MOST_VALID_SECONDS, PeerRecord, claimed_record, offer_of, open_record

MOST_PEERS = 4096
PAGE_BYTES = 256 << 10  # some 300 records: well within a frame, and soon sent
VIEW_BYTES = PAGE_BYTES
WHOLE_PEERS = 64  # up to so many a view is the whole table: some 40 KB
SHADOW_SECONDS = MOST_VALID_SECONDS

_CHOICE_SECONDS = 1.0  # figures are announced every ten seconds at most: no need to rank anew

# What a page's reader pays for a record beside its bytes: a list, a float, lengths.
_ENTRY_OVERHEAD_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Entry:
    record: PeerRecord
    offer: Offer
    signed: bytes
    since: float  # when it was first received anywhere, on this holder's clock

    @property
    def until(self) -> float:
        """When it ends; a tombstone has ended as it comes."""
        return self.since + (0.0 if self.record.is_gone else self.record.lifetime_seconds)


class Page(NamedTuple):
    """A part of a table: signed records, each with its age in seconds.

    `following` is what to ask for next, empty after the last page. `held`: how many records the
    table holds.
    """

    records: tuple[tuple[bytes, float], ...]
    following: str
    held: int


class PeerTable:
    """Who is there, as far as one holder knows. It lives as long as its holder."""

    def __init__(self, swarm_id: str = "", *, most_peers: int = MOST_PEERS) -> None:
        """`swarm_id`: how the fingerprint of every record must begin; empty for any."""
        self._swarm_id = swarm_id
        self._most_peers = most_peers
        self._live: dict[str, _Entry] = {}
        self._shadows: dict[str, _Entry] = {}
        self._choice: tuple[str, ...] = ()  # the best of each block, as of then
        self._chosen_at = float("-inf")

    @property
    def swarm_id(self) -> str:
        """How the fingerprint of every record begins."""
        return self._swarm_id

    def __len__(self) -> int:
        """How many records have not been found ended."""
        return len(self._live)

    def add(self, signed: bytes, now: float, age: float = 0.0) -> bool:
        """Take in a record that is `age` seconds old. True if it is news.

        False if it is old, over, another swarm's, or the table is full; what is no news is not
        verified, so that reading a known table again costs little. PeerFault if it is damaged.
        """
        age = max(0.0, age)
        if not self._is_news(claimed_record(signed), age):
            return False
        record = open_record(signed)
        entry = _Entry(record, offer_of(record), signed, now - age)
        peer = record.peer
        before = self._live.pop(peer, None)
        self._shadows.pop(peer, None)
        if entry.record.is_gone:
            self._cast_shadow(entry)
        else:
            self._live[peer] = entry
        if before is None or _serves(before.record) != _serves(record):
            self._chosen_at = float("-inf")
        return True

    def is_outdated(self, record: PeerRecord) -> bool:
        """Tell whether something newer is known of that peer."""
        held = self._live.get(record.peer) or self._shadows.get(record.peer)
        return held is not None and held.record.supersedes(record)

    def expire(self, now: float) -> tuple[PeerRecord, ...]:
        """Drop what has ended; return the records that did since the last call."""
        ended = [entry for entry in self._live.values() if entry.until <= now]
        for entry in ended:
            del self._live[entry.record.peer]
            self._cast_shadow(entry)
            self._chosen_at = float("-inf")
        forgotten = [
            peer for peer, entry in self._shadows.items() if entry.until + SHADOW_SECONDS <= now
        ]
        for peer in forgotten:
            del self._shadows[peer]
        return tuple(entry.record for entry in ended)

    def records(self, now: float) -> tuple[PeerRecord, ...]:
        """Return the records that are valid now, in no order that means anything."""
        return tuple(entry.record for entry in self._valid(now))

    def offers(self, now: float) -> tuple[Offer, ...]:
        """Return the valid records as routing sees them."""
        return tuple(entry.offer for entry in self._valid(now))

    def record_of(self, peer: str) -> PeerRecord | None:
        """Return the newest record of a peer, unless `expire` has found it ended."""
        entry = self._live.get(peer)
        return entry.record if entry else None

    def page(self, now: float, after: str = "", most_bytes: int = PAGE_BYTES) -> Page:
        """Return the records of the peers whose ids follow `after`, as many as fit, at least one.

        Tombstones are among them, so that who reads several tables sees no ghosts.
        """
        tombstones = [entry for entry in self._shadows.values() if entry.record.is_gone]
        found = {entry.record.peer: entry for entry in (*self._valid(now), *tombstones)}
        order = sorted(found)
        records: list[tuple[bytes, float]] = []
        size, following = 0, ""
        for peer in order[bisect_right(order, after) :]:
            entry = found[peer]
            size += len(entry.signed) + _ENTRY_OVERHEAD_BYTES
            if records and size > most_bytes:
                return Page(tuple(records), following, len(self._live))
            records.append((entry.signed, max(0.0, now - entry.since)))
            following = peer
        return Page(tuple(records), "", len(self._live))

    def known(self, most: int) -> dict[str, int]:
        """Return the sequences of the peers heard of last, at most so many: what a view is for."""
        newest_last = (*self._shadows.items(), *self._live.items())
        return {peer: entry.record.sequence for peer, entry in newest_last[-most:]}

    def view(
        self,
        now: float,
        known: Mapping[str, int],
        avoid: Set[str] = frozenset(),
        *,
        own: str = "",
        most_bytes: int = VIEW_BYTES,
    ) -> Page:
        """Return what a client that knows these sequences lacks, the most needed first.

        That is: who it knows of and has left, drains or loads; the holder itself, whose id is
        `own`: it can be reached, and asked for files; the best of each block, and if some of them
        are to `avoid`, the best of the others too; what is newer of the others known. A table of
        WHOLE_PEERS or fewer is told whole, with its tombstones.
        """
        is_whole = len(self._live) <= WHOLE_PEERS
        best = tuple(self._live) if is_whole else (own, *self._best(now, avoid, own))
        order = dict.fromkeys(
            chain(
                (peer for peer in known if not self._is_online(peer)),
                best,
                known,
                self._shadows if is_whole else (),
            )
        )
        records: list[tuple[bytes, float]] = []
        size = 0
        for peer in order:
            entry = self._told(peer, now)
            if entry is None or entry.record.sequence <= known.get(peer, -1):
                continue
            size += len(entry.signed) + _ENTRY_OVERHEAD_BYTES
            if size > most_bytes:
                break
            records.append((entry.signed, max(0.0, now - entry.since)))
        return Page(tuple(records), "", len(self._live))

    def _best(self, now: float, avoid: Set[str], own: str) -> tuple[str, ...]:
        """Return the best peers of each block, beginning with those not to avoid."""
        if now - self._chosen_at >= _CHOICE_SECONDS:
            self._choice = self._choose(now, frozenset(), own)
            self._chosen_at = now
        if avoid.isdisjoint(self._choice):
            return self._choice
        return (*self._choose(now, avoid, own), *self._choice)

    def _choose(self, now: float, avoid: Set[str], own: str) -> tuple[str, ...]:
        valid = self._valid(now)
        depths = Counter(entry.record.blocks for entry in valid)
        [(blocks, _)] = depths.most_common(1) or [(0, 0)]  # one that lies about it decides nothing
        offers = [entry.offer for entry in valid if entry.record.peer not in avoid]
        return tuple(offer.peer for offer in best_offers(offers, blocks, own))

    def _is_online(self, peer: str) -> bool:
        entry = self._live.get(peer)
        return entry is not None and entry.offer.is_online

    def _told(self, peer: str, now: float) -> _Entry | None:
        """Return what others may be told of a peer: its valid record, or its tombstone."""
        entry = self._live.get(peer)
        if entry is not None:
            return entry if entry.until > now else None
        shadow = self._shadows.get(peer)
        return shadow if shadow is not None and shadow.record.is_gone else None

    def _is_news(self, record: PeerRecord, age: float) -> bool:
        held = self._live.get(record.peer) or self._shadows.get(record.peer)
        if held is not None and not record.supersedes(held.record):
            return False
        if not record.fingerprint.startswith(self._swarm_id):
            return False
        if record.is_gone:
            return age < SHADOW_SECONDS
        # Whoever is in stays in: a flood of new identities keeps out newcomers, not the swarm.
        has_room = record.peer in self._live or len(self._live) < self._most_peers
        return has_room and age < record.lifetime_seconds

    def _cast_shadow(self, entry: _Entry) -> None:
        self._shadows[entry.record.peer] = entry
        while len(self._shadows) > self._most_peers:
            del self._shadows[next(iter(self._shadows))]  # the oldest

    def _valid(self, now: float) -> list[_Entry]:
        return [entry for entry in self._live.values() if entry.until > now]


def _serves(record: PeerRecord) -> tuple[str, str]:
    return record.span, record.state


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWishes:
    """How many links to peers of the table a host wants."""

    least: int = 6  # gossip's mesh needs as many
    neighbours: int = 4  # among them, to peers likely to come before or after us on a route
    most: int = 8  # beyond these we dial nobody; others may still dial us


def choose_dials(
    own: Span | None,
    records: Iterable[PeerRecord],
    linked: Collection[str],
    avoid: Collection[str],
    wishes: LinkWishes,
    rng: Random,
) -> list[str]:
    """Return whom to dial now: neighbours of the own span first, then anyone, as the rng wills.

    `records` are other peers'; only links to them count. Those in `avoid` are not dialled.
    """
    known = {record.peer: record.held for record in records if record.state != "draining"}
    links = [peer for peer in known if peer in linked]
    others = sorted(peer for peer in known if peer not in linked and peer not in avoid)
    rng.shuffle(others)
    near = {peer for peer, held in known.items() if own is not None and _are_neighbours(own, held)}
    missing_near = max(0, wishes.neighbours - sum(peer in near for peer in links))
    chosen = [peer for peer in others if peer in near][:missing_near]
    missing = max(0, wishes.least - len(links) - len(chosen))
    chosen += [peer for peer in others if peer not in chosen][:missing]
    return chosen[: max(0, wishes.most - len(links))]


def _are_neighbours(own: Span, other: Span) -> bool:
    return other.start == own.stop or other.stop == own.start
