"""Which hops to replace when a route is in trouble, and by whom.

Invariants:
1. the hops of a repair run all blocks in order, and no peer follows itself;
2. a hop that no trouble of this repair names stays, and so does one whose link may be at fault,
   once between two outputs. The one exception: where only the peer before or after holds the
   missing blocks, its hop is replaced too, by a wider one (a peer cannot dial itself);
3. only a peer that failed, or whose link failed again, is suspected, and who says so of one peer
   after the other until no unsuspected one is left: then it may be the one that is cut off. A
   suspect serves again only when nobody else holds some block, the oldest that holds it first;
4. NoRoute is raised exactly if some missing block has no server even then;
5. a trouble that names no hop of the route is of an older route and changes nothing.
"""

from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from routing.cost import CLIENT, CostModel
from routing.offer import Offer
from routing.route import Hop, NoChain, NoRoute, Route, check_joined
from routing.search import cheapest_chain, usable_offers
from routing.span import Span, spans_of

Kind = Literal[
    "link",  # the stream from the hop before closed or broke: the peer may be alive
    "downlink",  # the last hop's stream to the client did
    "refused",  # full or draining: no blame, but not to be used now
    "silent",
    "unreachable",
    "failed",
    "broke_word",
]

_MAY_BE_THE_LINK: frozenset[Kind] = frozenset({"link", "downlink"})
_TOLD_BY_THE_HOP_BEFORE: frozenset[Kind] = frozenset({"link", "silent", "unreachable"})


@dataclass(frozen=True, slots=True)
class Trouble:
    """What was heard of one hop, named by its peer and its part of the route."""

    peer: str
    span: Span
    kind: Kind
    is_seen_by_client: bool = False  # on its own stream to the last hop, not told by the hop before


@dataclass(frozen=True, slots=True)
class Retried:
    """What repairs have done since the last output: the next output empties it."""

    links: frozenset[tuple[str, Span]] = frozenset()  # hops whose link was dialled again
    accusers: frozenset[str] = frozenset()  # peers by whose word the hop after them was replaced


NOTHING_RETRIED = Retried()


@dataclass(frozen=True, slots=True)
class RepairedHop:
    """A hop of the new route.

    `keep`: it was on the route with these very blocks, so ask it first what it has. `new`: it has
    nothing, send at once.
    """

    peer: str
    span: Span
    mode: Literal["keep", "new"]


@dataclass(frozen=True, slots=True)
class Repair:
    """The route after a repair, and what the client has to remember of it."""

    hops: tuple[RepairedHop, ...]
    suspects: tuple[str, ...]  # oldest first
    retried: Retried
    blamed: frozenset[str]  # whom this repair suspects, also if forgiven at once


def repair(
    route: Route | Sequence[Hop],
    troubles: Sequence[Trouble],
    offers: Sequence[Offer],
    blocks: int,
    cost: CostModel,
    *,
    retried: Retried = NOTHING_RETRIED,
    suspects: Sequence[str] = (),
    needed_tokens: int = 0,
    seed: int | None = None,
) -> Repair:
    """Act on all troubles at once and return the hops of the next epoch.

    A hop is kept and its link dialled again if the trouble may be the link's and was not
    `retried`, or if the hop before is replaced: then the link is another. Otherwise its peer is
    suspected and all hops of a peer that failed are replaced. A peer that refused is replaced and
    not used in this repair, without suspicion. A peer that accuses again, between two outputs,
    while nobody unsuspected is left for those blocks is suspected and replaced too.

    Missing hops side by side are replaced as one run, by the cheapest chain between the hops before
    and after it, both links included; where none is left, by way of the client. Healthy peers of
    the route take a run too, if others are not nearly as cheap. Kept hops need no offer. A seed
    breaks near-ties as in the search.

    Raises NoRoute, naming all missing blocks that nobody can serve now; ValueError unless the route
    runs all `blocks` and the cost is of as many.
    """
    hops = route.hops if isinstance(route, Route) else tuple(route)
    check_joined(hops)
    if not hops[-1].span.stop == blocks == cost.work.blocks:
        raise ValueError(
            f"route, model and cost are of {hops[-1].span.stop}, {blocks} and "
            f"{cost.work.blocks} blocks"
        )
    search = _Search(hops, tuple(suspects), offers, blocks, needed_tokens)
    verdict = search.doubting(_judge(hops, troubles, retried))
    usable, suspected = search.with_forgiveness(verdict)
    repaired = _Rebuilding(hops, usable, cost, seed).without(verdict.missing)
    return Repair(
        hops=tuple(
            RepairedHop(hop.peer, hop.span, "keep" if hop in hops else "new") for hop in repaired
        ),
        suspects=tuple(suspected),
        retried=Retried(
            retried.links | verdict.redialled, retried.accusers | frozenset(verdict.accusers)
        ),
        blamed=frozenset(verdict.blamed),
    )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the troubles come to; peers in the order in which they were heard of."""

    missing: frozenset[int]  # places on the route
    redialled: frozenset[tuple[str, Span]]
    blamed: tuple[str, ...]
    refused: frozenset[str]
    accusers: tuple[str, ...]  # by whose word somebody is blamed
    doubted: tuple[str, ...]  # those of them that were accusers before

    def with_doubted_blamed(self, hops: Sequence[Hop]) -> "_Verdict":
        blamed = tuple(dict.fromkeys((*self.blamed, *self.doubted)))
        places = {place for place, hop in enumerate(hops) if hop.peer in blamed}
        return replace(self, missing=self.missing | places, blamed=blamed)


def _judge(hops: tuple[Hop, ...], troubles: Sequence[Trouble], retried: Retried) -> _Verdict:
    heard = [each for each in troubles if Hop(each.peer, each.span) in hops]
    refused = frozenset(each.peer for each in heard if each.kind == "refused")
    blamed = [
        each.peer for each in heard if each.kind not in _MAY_BE_THE_LINK and each.kind != "refused"
    ]
    refusing = {Hop(each.peer, each.span) for each in heard if each.kind == "refused"}
    missing = {place for place, hop in enumerate(hops) if hop.peer in blamed or hop in refusing}
    redialled: set[tuple[str, Span]] = set()
    for place, hop in enumerate(hops):  # from the client on: what is before decides what is after
        kinds = {each.kind for each in heard if Hop(each.peer, each.span) == hop}
        at_fault = kinds & _MAY_BE_THE_LINK
        if place in missing or not at_fault:
            continue
        if at_fault == {"link"} and place - 1 in missing:
            continue  # it will be dialled by another
        if (hop.peer, hop.span) in retried.links:
            missing.add(place)
            blamed.append(hop.peer)
        else:
            redialled.add((hop.peer, hop.span))
    accusers = [
        before.peer
        for before, hop in pairwise(hops)
        if hop.peer in blamed
        and before.peer not in blamed
        and any(_is_accused(hop, each) for each in heard)
    ]
    return _Verdict(
        missing=frozenset(missing),
        redialled=frozenset(redialled),
        blamed=tuple(dict.fromkeys(blamed)),
        refused=refused,
        accusers=tuple(accusers),
        doubted=tuple(peer for peer in accusers if peer in retried.accusers),
    )


def _is_accused(hop: Hop, trouble: Trouble) -> bool:
    """Return whether this is what the hop before says of this one."""
    is_of_it = Hop(trouble.peer, trouble.span) == hop and not trouble.is_seen_by_client
    return is_of_it and trouble.kind in _TOLD_BY_THE_HOP_BEFORE


def _has_moved(offer: Offer, kept: Sequence[Hop]) -> bool:
    """Return whether it no longer offers what it runs here; it may finish, but take no more."""
    return any(offer.peer == hop.peer and not offer.span.covers(hop.span) for hop in kept)


@dataclass(frozen=True, slots=True)
class _Search:
    """Who may serve what a verdict leaves missing. `suspects`: of before it, oldest first."""

    hops: tuple[Hop, ...]
    suspects: tuple[str, ...]
    offers: Sequence[Offer]
    blocks: int
    needed_tokens: int

    def doubting(self, verdict: _Verdict) -> _Verdict:
        """Return the verdict; on its doubted accusers too, if it leaves nobody unforgiven to serve
        and their blocks have some server.
        """
        try:
            self._usable(verdict, self._suspected(verdict))
        except NoRoute:
            harder = verdict.with_doubted_blamed(self.hops)
            with suppress(NoRoute):
                self.with_forgiveness(harder)
                return harder
        return verdict

    def with_forgiveness(self, verdict: _Verdict) -> tuple[list[Offer], list[str]]:
        """Return the usable offers, and the suspects less as few as it takes, oldest first."""
        suspected = self._suspected(verdict)
        while True:
            try:
                return self._usable(verdict, suspected), suspected
            except NoRoute as gap:
                helpful = _oldest_that_helps(
                    suspected, gap, self._unmoved(verdict), self.needed_tokens, verdict
                )
                suspected.remove(helpful)

    def _suspected(self, verdict: _Verdict) -> list[str]:
        return [peer for peer in self.suspects if peer not in verdict.blamed] + list(verdict.blamed)

    def _unmoved(self, verdict: _Verdict) -> list[Offer]:
        kept = [hop for place, hop in enumerate(self.hops) if place not in verdict.missing]
        return [offer for offer in self.offers if not _has_moved(offer, kept)]

    def _usable(self, verdict: _Verdict, suspected: Sequence[str]) -> list[Offer]:
        return usable_offers(
            self._unmoved(verdict),
            self.blocks,
            [self.hops[place].span for place in sorted(verdict.missing)],
            needed_tokens=self.needed_tokens,
            avoid=verdict.refused.union(suspected),
        )


def _oldest_that_helps(
    suspected: Sequence[str],
    gap: NoRoute,
    offers: Sequence[Offer],
    needed_tokens: int,
    verdict: _Verdict,
) -> str:
    """Return the suspect to forgive; the gap itself is raised if none would narrow it.

    One that holds none of the blocks would be forgiven for nothing, and dialled by the next repair.
    """
    helping = {
        offer.peer
        for offer in offers
        if offer.is_online
        and offer.free_tokens >= needed_tokens
        and offer.peer not in verdict.refused
        and any(offer.span.overlaps(span) for span in (*gap.avoided, *gap.full))
    }
    for peer in suspected:
        if peer in helping:
            return peer
    raise gap


@dataclass(frozen=True, slots=True)
class _Rebuilding:
    """Replaces runs of missing hops by the cheapest chains of what is usable."""

    hops: tuple[Hop, ...]
    usable: Sequence[Offer]
    cost: CostModel
    seed: int | None

    def without(self, missing: Set[int]) -> list[Hop]:
        """Return the route with the hops in these places replaced, and more only if it must be."""
        missing = self._widened(missing)
        reluctant = {hop.peer for place, hop in enumerate(self.hops) if place not in missing}
        rebuilt: list[Hop] = []
        done = 0
        for first, last in _runs(missing):
            chain = self._chain(first, last, reluctant)
            reluctant |= {hop.peer for hop in chain}
            rebuilt += [*self.hops[done:first], *chain]
            done = last + 1
        return [*rebuilt, *self.hops[done:]]

    def _widened(self, missing: Set[int]) -> Set[int]:
        """Return these places, with neighbours where only they hold what is missing beside them.

        By a neighbour that helps its own blocks are held too, so a chain through both exists: it
        begins (or ends) with the very neighbour, which by the route differs from the one before.
        """
        for first, last in _runs(missing):
            if self._is_joinable(first, last):
                continue
            ways = [(first - 1, last), (first, last + 1), (first - 1, last + 1)]
            start, stop = next(way for way in ways if self._is_joinable(*way))
            return self._widened(missing | set(range(start, stop + 1)))
        return missing

    def _is_joinable(self, first: int, last: int) -> bool:
        if first < 0 or last >= len(self.hops):
            return False
        try:
            self._chain(first, last, frozenset())
        except NoChain:
            return False
        return True

    def _chain(self, first: int, last: int, reluctant: Set[str]) -> tuple[Hop, ...]:
        """Return the cheapest hops between those before and after these places."""
        before, after = self.hops[:first], self.hops[last + 1 :]
        return cheapest_chain(
            self.usable,
            Span(self.hops[first].span.start, self.hops[last].span.stop),
            self.cost,
            origin=before[-1].peer if before else CLIENT,
            target=after[0].peer if after else CLIENT,
            seed=self.seed,
            reluctant=reluctant,
        ).hops


def _runs(places: Set[int]) -> list[tuple[int, int]]:
    """Return the (first, last) of each run of neighbouring places."""
    return [(span.start, span.stop - 1) for span in spans_of(places)]
