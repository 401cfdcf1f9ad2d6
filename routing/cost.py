"""What a hop costs, in expected seconds.

A hop costs the one-way time of the link, its bytes over the bandwidth, blocks x seconds per block
for this kind of step, the head if it ends at the last block, the expected wait, and a penalty.

Invariants:
1. the cost is linear in the blocks used: `hop_seconds` is `entry_seconds` + blocks x
   `block_seconds` + the head. `entry_seconds` does not depend on the part. The search rests on it;
2. every cost is finite and not negative;
3. a measured round trip beats the default, and is the same both ways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

from routing.offer import Offer
from routing.span import Span

CLIENT = ""  # the origin of every route; no peer has the empty name

# What a hop adds on loopback beside its compute, by the mark the project set itself; it keeps
# routes short where servers are equally near, since each hop is one more machine that can fail.
HOP_PENALTY_SECONDS = 0.0015

# 100 Mbit/s, a home line's: a guess for links nobody has measured.
DEFAULT_BYTES_PER_SECOND = 12_500_000.0


class Links(Protocol):
    """How far and how wide the links are. Both answers are finite; CLIENT is a valid end."""

    def one_way_seconds(self, origin: str, peer: str) -> float:
        """Return the seconds a small message takes from origin to peer, >= 0."""
        ...

    def bytes_per_second(self, origin: str, peer: str) -> float:
        """Return the bandwidth from origin to peer, > 0."""
        ...


@dataclass(frozen=True, slots=True)
class MeasuredLinks:
    """Links by measured round trips in seconds; where none is measured, the default.

    Of two measurements of one pair the shorter counts: queues only ever add.
    """

    rtt: Mapping[tuple[str, str], float]
    default_rtt: float
    bandwidth: float = DEFAULT_BYTES_PER_SECOND
    _one_way: dict[tuple[str, str], float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError for a round trip that is negative or infinite, or no bandwidth."""
        for rtt in (self.default_rtt, *self.rtt.values()):
            _check("a round trip", rtt)
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be > 0, not {self.bandwidth}")
        one_way: dict[tuple[str, str], float] = {}
        for (origin, peer), rtt in self.rtt.items():
            half = min(rtt / 2, one_way.get((origin, peer), rtt / 2))
            one_way[origin, peer] = one_way[peer, origin] = half
        object.__setattr__(self, "_one_way", one_way)

    def is_measured(self, origin: str, peer: str) -> bool:
        """Return whether a round trip of this pair is known, either way."""
        return (origin, peer) in self._one_way

    def one_way_seconds(self, origin: str, peer: str) -> float:
        """Return half the round trip; 0 from a peer to itself."""
        if origin == peer:
            return 0.0
        return self._one_way.get((origin, peer), self.default_rtt / 2)

    def bytes_per_second(self, origin: str, peer: str) -> float:
        """Return the one bandwidth assumed for every link."""
        return self.bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The step to price.

    A decode step (also one that verifies a short draft) takes a block `decode_seconds_per_block`,
    whatever its tokens; a prefill takes it that long too, or tokens x the prefill time if longer,
    because each pass reads all weights.
    """

    blocks: int  # of the model
    tokens: int  # in the step
    bytes_per_token: int  # between hops: hidden size x bytes of the wire's dtype
    is_prefill: bool
    client_bytes_per_token: int = 8  # a token id; a research client's hidden states are wider
    answer_bytes: int = 2048  # 256 candidates, float32 and int32

    def __post_init__(self) -> None:
        """Raise ValueError for a step without blocks or tokens, or of negative bytes."""
        if self.blocks < 1 or self.tokens < 1:
            raise ValueError(f"a step needs blocks and tokens, not {self.blocks} and {self.tokens}")
        if min(self.bytes_per_token, self.client_bytes_per_token, self.answer_bytes) < 0:
            raise ValueError("a step cannot have negative bytes")


@dataclass(frozen=True, slots=True)
class CostModel:
    """Prices hops for one kind of step over given links."""

    links: Links
    work: Work
    penalty_seconds: float = HOP_PENALTY_SECONDS

    def __post_init__(self) -> None:
        """Raise ValueError for a penalty that is negative or infinite."""
        _check("the penalty", self.penalty_seconds)

    def standing_seconds(self, offer: Offer) -> float:
        """Return the part of the entry that does not depend on the origin: wait and penalty."""
        return offer.wait_seconds + self.penalty_seconds

    def entry_seconds(self, origin: str, offer: Offer) -> float:
        """Return what it takes to come from origin to this server, before any block is run."""
        return self.transit_seconds(origin, offer.peer) + self.standing_seconds(offer)

    def transit_seconds(self, origin: str, target: str) -> float:
        """Return what this step takes on a link: ids from the client, the answer back to it, and
        hidden states between servers.
        """
        work = self.work
        if target == CLIENT:
            size = work.answer_bytes
        elif origin == CLIENT:
            size = work.tokens * work.client_bytes_per_token
        else:
            size = work.tokens * work.bytes_per_token
        transfer = size / self.links.bytes_per_second(origin, target)
        return self.links.one_way_seconds(origin, target) + transfer

    def block_seconds(self, offer: Offer) -> float:
        """Return what this step takes in one block of this server."""
        if not self.work.is_prefill:
            return offer.decode_seconds_per_block
        prefill = self.work.tokens * offer.prefill_seconds_per_block_token
        return max(prefill, offer.decode_seconds_per_block)

    def hop_seconds(self, origin: str, offer: Offer, part: Span) -> float:
        """Return the whole cost of a hop from origin that runs this part of the offer's span.

        Raises ValueError if the offer does not hold the part.
        """
        if not offer.span.covers(part):
            raise ValueError(f"{offer.peer} holds {offer.span}, not {part}")
        head = offer.head_seconds if part.stop == self.work.blocks else 0.0
        return self.entry_seconds(origin, offer) + len(part) * self.block_seconds(offer) + head

    def way_back_seconds(self, peer: str) -> float:
        """Return what the answer takes from the last hop to the client."""
        return self.transit_seconds(peer, CLIENT)


def _check(what: str, seconds: float) -> None:
    if not (isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{what} must take a finite time >= 0, not {seconds} seconds")
