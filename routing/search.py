"""The cheapest route through the swarm, or the cheapest chain for a part of it.

Invariants:
1. without a seed no chain of the offers is cheaper, whatever the links; with one, none is cheaper
   by more than NEAR_TIE of its own cost. Reluctant peers count NEAR_TIE dearer than they are;
2. the answer is a function of the arguments; the order of the offers does not matter;
3. the seconds of an answer are its true cost, never the shaken one;
4. no peer follows itself, also not at the ends of a chain: a peer cannot dial itself;
5. NoRoute is raised exactly if some block has no usable server.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf

from routing.cost import CLIENT, CostModel
from routing.coverage import uncovered
from routing.offer import Offer
from routing.route import Chain, Hop, NoChain, NoRoute, Route
from routing.span import Span, spans_of

# Routes within 5 % of each other are a tie: what servers announce is no more exact than that.
NEAR_TIE = 0.05

_ORIGIN = -1  # where the chain comes from, in the place of an index into the offers


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

    The offers that count are those of `usable_offers`. A peer may come twice on a route, with other
    peers between. How ties are broken says `cheapest_chain`.

    Raises NoRoute, naming the blocks without a usable server; ValueError if `cost` was made for a
    model of another size.
    """
    if cost.work.blocks != blocks:
        raise ValueError(f"the cost is of {cost.work.blocks} blocks, the model has {blocks}")
    whole = Span(0, blocks)
    usable = usable_offers(offers, blocks, [whole], needed_tokens=needed_tokens, avoid=avoid)
    chain = cheapest_chain(usable, whole, cost, seed=seed)
    return Route(chain.hops, chain.seconds)


def usable_offers(
    offers: Sequence[Offer],
    blocks: int,
    parts: Sequence[Span],
    *,
    needed_tokens: int = 0,
    avoid: Set[str] = frozenset(),
) -> list[Offer]:
    """Return the offers that may serve, having made sure that together they hold these parts.

    Left out are those not online, with fewer than `needed_tokens` free, of a peer in `avoid`, or
    reaching beyond the model. Raises NoRoute, naming the blocks of the parts that then have none.
    """
    usable = [
        offer
        for offer in offers
        if offer.is_online
        and offer.free_tokens >= needed_tokens
        and offer.peer not in avoid
        and offer.span.stop <= blocks
    ]
    gaps = _blocks_of(uncovered(usable, blocks)) & _blocks_of(parts)
    if gaps:
        raise _no_route(gaps, offers, blocks, needed_tokens, avoid)
    return usable


def cheapest_chain(
    usable: Sequence[Offer],
    part: Span,
    cost: CostModel,
    *,
    origin: str = CLIENT,
    target: str = CLIENT,
    seed: int | None = None,
    reluctant: Set[str] = frozenset(),
) -> Chain:
    """Return the hops through the part that take the fewest seconds from origin to target.

    Origin and target are the hops before and after, or the client; the links to both count, what
    the target computes does not. Each peer makes one offer.

    The search goes from block to block and keeps, for each server, the least seconds after which it
    has run the blocks before. So it looks at every place where a span can be left. One may think
    that leaving pays only where the next span starts or the own one ends: between two
    hops the cost is linear in the cut, so the best cut is at an end of its range. But that range
    ends too where one of the two hops is down to one block, and then dropping it saves something
    only if no detour beats a direct link and no other server's head is faster. Measured links do
    have such detours and heads do differ. Looking at every cut needs no such assumption, and
    breaking off at the first predecessor that cannot win keeps it cheap.

    A seed keeps clients from herding on one of many near-equal chains: everything a hop costs
    (on the last one also the way to the target) is multiplied by 1 + NEAR_TIE x a number in [0, 1)
    drawn from hash(seed, peer), and the cheapest chain by that measure is taken. Since no factor is
    below 1 and none above 1 + NEAR_TIE, it costs at most 1 + NEAR_TIE times the cheapest. Without a
    seed exact ties go to the server already in the chain, then to the smaller peer name. A
    `reluctant` peer's factor is 1 + NEAR_TIE times as large, so that others are taken at near-equal
    cost; the bound grows by as much.

    Raises NoChain if there is none in which no peer follows itself (origin and target count), or a
    block is held by nobody. With the client at both ends, offers that hold the part are enough.
    """
    ranked = [each for each in _ranked(usable, seed, reluctant) if each[1].span.overlaps(part)]
    hops = _Search(ranked, part, cost, origin, target).cheapest()
    return _priced(hops, usable, cost, origin, target)


def _ranked(
    offers: Sequence[Offer], seed: int | None, reluctant: Set[str]
) -> list[tuple[float, Offer]]:
    """Return each offer with its factor; the order decides exact ties."""
    ranked = []
    for offer in sorted(offers, key=lambda each: (each.peer, each.span)):
        factor = 1.0 if seed is None else 1 + NEAR_TIE * _draw(seed, offer.peer)
        ranked.append((factor * (1 + NEAR_TIE) if offer.peer in reluctant else factor, offer))
    return ranked


def _draw(seed: int, peer: str) -> float:
    """Return a number in [0, 1), the same on every machine and in every release."""
    digest = blake2b(f"{seed}:{peer}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _priced(
    hops: tuple[Hop, ...], offers: Sequence[Offer], cost: CostModel, origin: str, target: str
) -> Chain:
    by_peer = {offer.peer: offer for offer in offers}
    seconds = 0.0
    for hop in hops:
        seconds += cost.hop_seconds(origin, by_peer[hop.peer], hop.span)
        origin = hop.peer
    return Chain(hops, seconds + cost.transit_seconds(origin, target))


def _no_route(
    gaps: Set[int],
    offers: Sequence[Offer],
    blocks: int,
    needed_tokens: int,
    avoid: Set[str],
) -> NoRoute:
    trusted = [offer for offer in offers if offer.peer not in avoid]
    unserved = _blocks_of(uncovered(offers, blocks))
    untrusted = _blocks_of(uncovered(trusted, blocks))
    return NoRoute(
        spans_of(gaps & unserved),
        full=spans_of(gaps - untrusted),
        avoided=spans_of(gaps & untrusted - unserved),
        needed_tokens=needed_tokens,
    )


def _blocks_of(spans: Sequence[Span]) -> set[int]:
    return {block for span in spans for block in span.blocks}


@dataclass(slots=True)
class _Search:
    """One forward pass over the blocks of the part."""

    ranked: list[tuple[float, Offer]]
    part: Span
    cost: CostModel
    origin: str
    target: str
    # By block: for each server that entered there, the index it came from.
    entered: dict[int, dict[int, int]] = field(default_factory=dict)
    entries: dict[tuple[int, int], float] = field(default_factory=dict)

    def cheapest(self) -> tuple[Hop, ...]:
        """Return the hops of the chain with the least shaken seconds; NoChain if there is none."""
        arrived = [(0.0, _ORIGIN)]  # (seconds, who ran the block before), cheapest first
        standing = [factor * self.cost.standing_seconds(offer) for factor, offer in self.ranked]
        running = [factor * self.cost.block_seconds(offer) for factor, offer in self.ranked]
        for block in self.part.blocks:
            here = [i for i, (_, offer) in enumerate(self.ranked) if block in offer.span]
            stayed = {index: seconds for seconds, index in arrived}
            came: dict[int, int] = {}
            reached: list[tuple[float, int]] = []
            for index in here:
                best = stayed.get(index, inf)
                for seconds, before in arrived:
                    if seconds + standing[index] >= best:
                        break  # all after it are dearer still; so is coming from oneself
                    total = seconds + self._entry(before, index)
                    if total < best:
                        best, came[index] = total, before
                if best < inf:
                    reached.append((best + running[index], index))
            reached.sort()
            self.entered[block] = came
            arrived = reached
        ends = [each for each in arrived if self.ranked[each[1]][1].peer != self.target]
        if not ends:
            raise NoChain(self.part, self.origin, self.target)
        return self._hops(min(ends, key=self._finished)[1])

    def _entry(self, before: int, index: int) -> float:
        """Return the shaken seconds to come there from a server; infinite from the same peer."""
        seconds = self.entries.get((before, index))
        if seconds is None:
            factor, offer = self.ranked[index]
            name = self.origin if before == _ORIGIN else self.ranked[before][1].peer
            seconds = inf if name == offer.peer else factor * self.cost.entry_seconds(name, offer)
            self.entries[before, index] = seconds
        return seconds

    def _finished(self, arrival: tuple[float, int]) -> tuple[float, int]:
        seconds, index = arrival
        factor, offer = self.ranked[index]
        last = self.cost.transit_seconds(offer.peer, self.target)
        if self.part.stop == self.cost.work.blocks:
            last += offer.head_seconds
        return seconds + factor * last, index

    def _hops(self, last: int) -> tuple[Hop, ...]:
        """Walk back from the last server to the origin."""
        hops: list[Hop] = []
        stop, index = self.part.stop, last
        for block in reversed(self.part.blocks):
            before = self.entered[block].get(index)
            if before is not None:
                hops.append(Hop(self.ranked[index][1].peer, Span(block, stop)))
                stop, index = block, before
        return tuple(reversed(hops))
