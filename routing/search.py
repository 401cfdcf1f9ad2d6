"""The cheapest route through the swarm.

Invariants:
1. without a seed no chain of the offers is cheaper, whatever the links; with one, none is cheaper
   by more than NEAR_TIE of its own cost;
2. the answer is a function of the arguments; the order of the offers does not matter;
3. `Route.seconds` is the true cost, never the shaken one;
4. NoRoute is raised exactly if some block has no usable server.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf

from routing.cost import CLIENT, CostModel
from routing.coverage import uncovered
from routing.offer import Offer
from routing.route import Hop, NoRoute, Route
from routing.span import Span, spans_of

# Routes within 5 % of each other are a tie: what servers announce is no more exact than that.
NEAR_TIE = 0.05

_FROM_CLIENT = -1  # the client in the place of an index into the offers


def fastest_route(
    offers: Sequence[Offer],
    blocks: int,
    cost: CostModel,
    *,
    seed: int | None = None,
    needed_tokens: int = 0,
    avoid: Set[str] = frozenset(),
) -> Route:
    """Return the hops through all blocks with the least expected seconds, way back included.

    Each peer makes one offer. Offers are left out that are not online, have fewer than
    `needed_tokens` free, belong to a peer in `avoid`, or reach beyond the model. A peer may come
    twice on a route, with other peers between.

    The search goes from block to block and keeps, for each server, the least seconds after which it
    has run the blocks before. So it looks at every place where a span can be left. One may think
    that leaving pays only where the next span starts or the own one ends: between two
    hops the cost is linear in the cut, so the best cut is at an end of its range. But that range
    ends too where one of the two hops is down to one block, and then dropping it saves something
    only if no detour beats a direct link and no other server's head is faster. Measured links do
    have such detours and heads do differ. Looking at every cut needs no such assumption, and
    breaking off at the first predecessor that cannot win keeps it cheap.

    A seed keeps clients from herding on one of many near-equal routes: everything a hop costs
    (on the last one also the way back) is multiplied by 1 + NEAR_TIE x a number in [0, 1) drawn
    from hash(seed, peer), and the cheapest chain by that measure is taken. Since no factor is below
    1 and none above 1 + NEAR_TIE, it costs at most 1 + NEAR_TIE times the cheapest. Without a seed
    exact ties go to the server already on the route, then to the smaller peer name.

    Raises NoRoute, naming the blocks without a usable server; ValueError if `cost` was made for a
    model of another size.
    """
    if cost.work.blocks != blocks:
        raise ValueError(f"the cost is of {cost.work.blocks} blocks, the model has {blocks}")
    usable = [
        offer
        for offer in offers
        if offer.is_online
        and offer.free_tokens >= needed_tokens
        and offer.peer not in avoid
        and offer.span.stop <= blocks
    ]
    gaps = uncovered(usable, blocks)
    if gaps:
        raise _no_route(gaps, offers, blocks, needed_tokens, avoid)
    hops = _Search(_ranked(usable, seed), blocks, cost).cheapest()
    return _priced(hops, usable, cost)


def _ranked(offers: Sequence[Offer], seed: int | None) -> list[tuple[float, Offer]]:
    """Return each offer with its factor; the order decides exact ties."""
    ordered = sorted(offers, key=lambda each: (each.peer, each.span))
    if seed is None:
        return [(1.0, offer) for offer in ordered]
    return [(1 + NEAR_TIE * _draw(seed, offer.peer), offer) for offer in ordered]


def _draw(seed: int, peer: str) -> float:
    """Return a number in [0, 1), the same on every machine and in every release."""
    digest = blake2b(f"{seed}:{peer}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _priced(hops: tuple[Hop, ...], offers: Sequence[Offer], cost: CostModel) -> Route:
    by_peer = {offer.peer: offer for offer in offers}
    seconds, origin = 0.0, CLIENT
    for hop in hops:
        seconds += cost.hop_seconds(origin, by_peer[hop.peer], hop.span)
        origin = hop.peer
    return Route(hops, seconds + cost.way_back_seconds(origin))


def _no_route(
    gaps: Sequence[Span],
    offers: Sequence[Offer],
    blocks: int,
    needed_tokens: int,
    avoid: Set[str],
) -> NoRoute:
    trusted = [offer for offer in offers if offer.peer not in avoid]
    nobody = uncovered(offers, blocks)
    unserved = _blocks_of(nobody)
    untrusted = _blocks_of(uncovered(trusted, blocks))
    return NoRoute(
        nobody,
        full=spans_of(_blocks_of(gaps) - untrusted),
        avoided=spans_of(untrusted - unserved),
        needed_tokens=needed_tokens,
    )


def _blocks_of(spans: Sequence[Span]) -> set[int]:
    return {block for span in spans for block in span.blocks}


@dataclass(slots=True)
class _Search:
    """One forward pass over the blocks. Every block has at least one offer that holds it."""

    ranked: list[tuple[float, Offer]]
    blocks: int
    cost: CostModel
    # By block: for each server that entered there, the index it came from.
    entered: list[dict[int, int]] = field(default_factory=list)
    entries: dict[tuple[int, int], float] = field(default_factory=dict)

    def cheapest(self) -> tuple[Hop, ...]:
        """Return the hops of the chain with the least shaken seconds."""
        arrived = [(0.0, _FROM_CLIENT)]  # (seconds, who ran the block before), cheapest first
        standing = [factor * self.cost.standing_seconds(offer) for factor, offer in self.ranked]
        running = [factor * self.cost.block_seconds(offer) for factor, offer in self.ranked]
        for block in range(self.blocks):
            here = [i for i, (_, offer) in enumerate(self.ranked) if block in offer.span]
            stayed = {index: seconds for seconds, index in arrived}
            came: dict[int, int] = {}
            reached: list[tuple[float, int]] = []
            for index in here:
                best = stayed.get(index, inf)
                for seconds, origin in arrived:
                    if seconds + standing[index] >= best:
                        break  # all after it are dearer still; so is coming from oneself
                    total = seconds + self._entry(origin, index)
                    if total < best:
                        best, came[index] = total, origin
                reached.append((best + running[index], index))
            reached.sort()
            self.entered.append(came)
            arrived = reached
        return self._hops(min(arrived, key=self._finished)[1])

    def _entry(self, origin: int, index: int) -> float:
        seconds = self.entries.get((origin, index))
        if seconds is None:
            factor, offer = self.ranked[index]
            name = CLIENT if origin == _FROM_CLIENT else self.ranked[origin][1].peer
            seconds = self.entries[origin, index] = factor * self.cost.entry_seconds(name, offer)
        return seconds

    def _finished(self, arrival: tuple[float, int]) -> tuple[float, int]:
        seconds, index = arrival
        factor, offer = self.ranked[index]
        last = offer.head_seconds + self.cost.way_back_seconds(offer.peer)
        return seconds + factor * last, index

    def _hops(self, last: int) -> tuple[Hop, ...]:
        """Walk back from the last server to the client."""
        hops: list[Hop] = []
        stop, index = self.blocks, last
        for block in reversed(range(self.blocks)):
            origin = self.entered[block].get(index)
            if origin is not None:
                hops.append(Hop(self.ranked[index][1].peer, Span(block, stop)))
                stop, index = block, origin
        return tuple(reversed(hops))
