"""What a swarm would be: machines on paper, placed and routed by the code that places real ones.

Machines come one after the other and each takes what `placement` gives a newcomer; then `search`
finds the route. A decode step reads the weights of a block once, so a block takes its bytes over
what the machine reads in a second: the most it can take where only some experts of a block are
read.

Invariants:
1. a machine is never given more than its memory less the headroom;
2. every byte of the sizes appears once: weights, ends, cache or history;
3. without machines, or with too small ones, the answer says what is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from routing.cost import CLIENT, CostModel, MeasuredLinks, Work
from routing.coverage import uncovered
from routing.offer import FASTEST_SECONDS_PER_BLOCK, Offer
from routing.placement import HEADROOM, BlockSizes, DoesNotFit, auto_span
from routing.route import Route
from routing.search import fastest_route
from routing.span import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A server that might be."""

    name: str
    memory_bytes: int  # what it may use
    bytes_per_second: float  # of weights it reads: its memory's bandwidth, or what it measured
    round_trip_seconds: float  # to the client; between two machines the larger of theirs counts

    def __post_init__(self) -> None:
        """Raise ValueError for what no machine has."""
        if not self.name:
            raise ValueError("a machine needs a name")
        if self.memory_bytes < 1:
            raise ValueError(f"{self.name} has no memory")
        if not (isfinite(self.bytes_per_second) and self.bytes_per_second > 0):
            raise ValueError(f"{self.name} must read some bytes per second")
        if not (isfinite(self.round_trip_seconds) and self.round_trip_seconds >= 0):
            raise ValueError(f"{self.name} must be a finite time away")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one machine would hold, in bytes. `span` is None if not even one block fits."""

    machine: str
    span: Span | None
    weight_bytes: int = 0
    end_bytes: int = 0
    cache_bytes: int = 0
    history_bytes: int = 0
    seconds: float = 0.0  # of its whole span, for one decode step
    usable_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.end_bytes + self.cache_bytes + self.history_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Machines with what they hold, and the route through them; None while blocks are missing."""

    holdings: tuple[Holding, ...]
    route: Route | None
    missing: tuple[Span, ...]
    missing_bytes: int  # what the missing blocks need, cache and history with them


def plan_swarm(machines: Sequence[Machine], sizes: BlockSizes, bytes_per_token: int) -> Plan:
    """Place the machines in the order given, and route a decode step through them.

    `bytes_per_token`: what travels between two hops for one token. ValueError for two machines of
    one name.
    """
    if len({machine.name for machine in machines}) < len(machines):
        raise ValueError("two machines have one name")
    offers: list[Offer] = []
    holdings = []
    for machine in machines:
        try:
            span = auto_span(offers, sizes, machine.memory_bytes)
        except DoesNotFit:
            usable = int(machine.memory_bytes * (1 - HEADROOM))
            holdings.append(Holding(machine=machine.name, span=None, usable_bytes=usable))
            continue
        offer = _offer(machine, span, sizes)
        offers.append(offer)
        holdings.append(_holding(machine, offer, sizes))
    missing = uncovered(offers, sizes.blocks)
    return Plan(
        holdings=tuple(holdings),
        route=None if missing else _route(machines, offers, sizes, bytes_per_token),
        missing=missing,
        missing_bytes=sum(map(sizes.span_bytes, missing)),
    )


def _offer(machine: Machine, span: Span, sizes: BlockSizes) -> Offer:
    blocks = sizes.block_bytes[span.start : span.stop]
    seconds = sum(blocks) / len(blocks) / machine.bytes_per_second
    return Offer(
        peer=machine.name,
        span=span,
        decode_seconds_per_block=max(seconds, FASTEST_SECONDS_PER_BLOCK),
        prefill_seconds_per_block_token=0.0,
        free_tokens=sizes.cache_tokens,
        head_seconds=sizes.head_bytes / machine.bytes_per_second,
    )


def _holding(machine: Machine, offer: Offer, sizes: BlockSizes) -> Holding:
    span = offer.span
    weights = sum(sizes.block_bytes[span.start : span.stop])
    cache = sizes.cache_bytes_per_token * sizes.cache_tokens * len(span)
    history = sizes.history_bytes_per_token * sizes.cache_tokens
    return Holding(
        machine=machine.name,
        span=span,
        weight_bytes=weights,
        end_bytes=sizes.span_bytes(span) - weights - cache - history,
        cache_bytes=cache,
        history_bytes=history,
        seconds=1 / offer.tokens_per_second(sizes.blocks),
        usable_bytes=int(machine.memory_bytes * (1 - HEADROOM)),
    )


def _route(
    machines: Sequence[Machine], offers: Sequence[Offer], sizes: BlockSizes, bytes_per_token: int
) -> Route:
    away = {machine.name: machine.round_trip_seconds for machine in machines}
    rtt = {(CLIENT, name): seconds for name, seconds in away.items()}
    for one in away:
        rtt |= {(one, other): max(away[one], away[other]) for other in away if other != one}
    work = Work(blocks=sizes.blocks, tokens=1, bytes_per_token=bytes_per_token, is_prefill=False)
    return fastest_route(offers, sizes.blocks, CostModel(MeasuredLinks(rtt, 0.0), work))
