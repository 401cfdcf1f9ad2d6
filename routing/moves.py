"""Whether a server that is placed should hold another span.

A move costs: sessions are drained, weights are loaded, and whoever planned with the old span plans
anew. So it has to pay for the whole swarm, whose throughput is that of its weakest block.

Invariants:
1. a move never goes to where the server is, and never leaves a block without an online server;
2. it is made only if the swarm's throughput, averaged over the horizon with the time of loading in
   it, rises by the gain or more, once the others have given their greedy answers;
3. every decision is a function of its arguments; the order of the offers does not matter. Sums are
   of whole numbers, so that equal swarms compare as equal;
4. a joining server counts as if it served, but the less the longer it has been joining.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import fsum
from random import Random

from routing.coverage import uncovered
from routing.offer import Offer
from routing.span import Span

GAIN = 0.2  # the paper's figure (Petals, NeurIPS 2023): a smaller rise is not worth a reload

# What a move is for lasts about that long: volunteers come and go within hours.
HORIZON_SECONDS = 3600.0

# Joining takes minutes. Who has not come online after five is believed half, after ten a quarter.
JOINING_HALF_LIFE_SECONDS = 300.0

MOST_ROUNDS = 3  # of greedy answers: what needs more of them is too far off to move for
MOST_ANSWERS = 256  # servers that answer in a round; beyond, a sample stands for all

CHECK_SECONDS = 60.0  # between two looks at the swarm, on average
GAP_CHECK_SECONDS = 10.0  # while the swarm cannot generate at all
REST_SECONDS = 600.0  # after a move: it must show its effect before the next is judged
REST_PER_LOAD = 5.0  # and who loads long, moves seldom

_PER_TOKEN = 10**6  # rates are counted in millionths of a token per second


def better_span(
    own: Offer,
    offers: Sequence[Offer],
    blocks: int,
    *,
    seed: int,
    candidates: Sequence[Span] | None = None,
    gain: float = GAIN,
    seconds_to_load: float = 0.0,
    horizon_seconds: float = HORIZON_SECONDS,
    joining_seconds: Mapping[str, float] | None = None,
) -> Span | None:
    """Return the span that `own` should move to, or None if it should stay.

    `offers` are the swarm's; one under the own name is replaced by `own`. `candidates` are the
    spans it may hold, `placement.largest_spans` for instance; by default those as long as its own.
    `joining_seconds` says how long joining servers have been joining. The seed orders the others'
    answers.

    Nothing is simulated unless it can pay: the server's blocks must all be held by others online,
    even a perfect balance must be better by the gain, and the span that is served worst without it
    must not be its own. Raises ValueError for a gain or times below 0, or an own span beyond the
    model.
    """
    if gain < 0 or seconds_to_load < 0 or horizon_seconds <= 0:
        raise ValueError("gain and load time are >= 0, the horizon is longer")
    if own.span.stop > blocks:
        raise ValueError(f"{own.span} reaches beyond the {blocks} blocks of the model")
    others = [offer for offer in offers if offer.peer != own.peer and offer.span.stop <= blocks]
    if any(span.overlaps(own.span) for span in uncovered(others, blocks)):
        return None
    swarm = _Swarm.of(others, blocks, joining_seconds or {})
    without = min(swarm.rates)
    mine = _Placed.at(own, own.span, 1.0, blocks)
    present = min(
        rate + (mine.rate if block in own.span else 0) for block, rate in enumerate(swarm.rates)
    )
    loading = min(1.0, seconds_to_load / horizon_seconds)
    if not _pays(_perfect(swarm, own), present, without, loading, gain):
        return None
    target = swarm.worst_served(candidates or _same_length(own.span, blocks), own.span)
    if target == own.span:
        return None
    swarm.add(_Placed.at(own, target, 1.0, blocks))
    for reached in swarm.answers(Random(seed)):
        if _pays(reached, present, without, loading, gain):
            return target
    return None


def should_consider(
    now: float,
    *,
    peer: str,
    checked_at: float,
    moved_at: float,
    seconds_to_load: float = 0.0,
    has_gap: bool = False,
) -> bool:
    """Return whether this server should look for a better span now.

    All times are of one clock, in seconds; `checked_at` is when it last looked, `moved_at` when it
    last began to hold its span. It looks every CHECK_SECONDS on average, at moments drawn from its
    name, so that servers who see the same swarm do not move at once: the first to move
    announces that it is joining, and the others see its new span before they decide. After a move
    it rests for REST_SECONDS, or REST_PER_LOAD times its load time if that is longer.

    `has_gap`: some block is served by nobody and loaded by nobody, so nothing can be generated.
    Then nobody rests, and all look every GAP_CHECK_SECONDS on average.
    """
    if not has_gap and now - moved_at < max(REST_SECONDS, REST_PER_LOAD * seconds_to_load):
        return False
    digest = blake2b(f"{peer}:{checked_at}".encode(), digest_size=6).digest()
    drawn = int.from_bytes(digest, "big") / 2**48
    period = GAP_CHECK_SECONDS if has_gap else CHECK_SECONDS
    return now - checked_at >= period * (0.5 + drawn)


def goes_first(own: Offer, offers: Sequence[Offer]) -> bool:
    """Return whether no other server that is leaving its span comes before `own` by name.

    Servers that look at the same moment see the same need. One of them is enough: the others look
    again when the first has announced what it loads.
    """
    leaving = [offer.peer for offer in offers if not (offer.is_online or offer.is_joining)]
    return all(own.peer <= peer for peer in leaving)


def _perfect(swarm: "_Swarm", own: Offer) -> float:
    """Return the throughput if all that servers can do lay evenly on the blocks: none is higher."""
    work = [each.share / each.offer.decode_seconds_per_block for each in swarm.placed]
    return _PER_TOKEN * (fsum(work) + 1 / own.decode_seconds_per_block) / swarm.blocks


def _pays(reached: float, present: float, without: float, loading: float, gain: float) -> bool:
    """Return whether the mean throughput over the horizon is enough above the present one."""
    mean = reached * (1 - loading) + without * loading
    return mean > present and mean >= present * (1 + gain)


def _same_length(span: Span, blocks: int) -> list[Span]:
    return [Span(start, start + len(span)) for start in range(blocks - len(span) + 1)]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A server where it is, or where it might go."""

    offer: Offer
    share: float  # how much of it counts: 1 online, less the longer it has been joining
    rate: int  # what each of its blocks gets

    @classmethod
    def at(cls, offer: Offer, span: Span, share: float, blocks: int) -> "_Placed":
        moved = replace(offer, span=span)
        return cls(moved, share, round(share * _PER_TOKEN * moved.tokens_per_second(blocks)))


@dataclass(slots=True)
class _Swarm:
    """The rates of all blocks while servers are put here and there."""

    blocks: int
    rates: list[int]
    placed: list[_Placed]

    @classmethod
    def of(
        cls, offers: Iterable[Offer], blocks: int, joining_seconds: Mapping[str, float]
    ) -> "_Swarm":
        swarm = cls(blocks, [0] * blocks, [])
        for offer in sorted(offers, key=lambda each: (each.peer, each.span)):
            if offer.is_online:
                swarm.add(_Placed.at(offer, offer.span, 1.0, blocks))
            elif offer.is_joining:
                halvings = joining_seconds.get(offer.peer, 0.0) / JOINING_HALF_LIFE_SECONDS
                swarm.add(_Placed.at(offer, offer.span, 0.5**halvings, blocks))
        return swarm

    def add(self, server: _Placed) -> None:
        self.placed.append(server)
        self._count(server, server.rate)

    def _count(self, server: _Placed, rate: int) -> None:
        for block in server.offer.span.blocks:
            self.rates[block] += rate

    def worst_served(self, spans: Sequence[Span], own: Span) -> Span:
        """Return the span whose blocks are served worst, `own` if none is worse than that.

        Spans are compared by the sorted rates of their blocks, as many as the shortest has.
        """
        length = min(map(len, spans))
        lowest = min(min(self.rates[span.start : span.stop]) for span in spans)
        worst = [span for span in spans if min(self.rates[span.start : span.stop]) == lowest]
        keys = [sorted(self.rates[span.start : span.stop])[:length] for span in worst]
        best = min(keys)
        tied = [span for span, key in zip(worst, keys, strict=True) if key == best]
        return own if own in tied else tied[0]

    def answers(self, random: Random) -> Iterable[int]:
        """Yield the throughput now, then after each round in which all others move greedily.

        The server added last has moved already and stays.
        """
        yield min(self.rates)
        order = [place for place, each in enumerate(self.placed[:-1]) if each.offer.is_online]
        for _ in range(MOST_ROUNDS):
            chosen = random.sample(order, min(len(order), MOST_ANSWERS))
            moved = [self._moves(place) for place in chosen]
            if not any(moved):
                return
            yield min(self.rates)

    def _moves(self, place: int) -> bool:
        """Move one server to what is served worst without it; return whether it moved."""
        server = self.placed[place]
        span = server.offer.span
        self._count(server, -server.rate)
        if min(self.rates[span.start : span.stop]) > 0:
            target = self.worst_served(_same_length(span, self.blocks), span)
            if target != span:
                server = _Placed.at(server.offer, target, server.share, self.blocks)
                self.placed[place] = server
        self._count(server, server.rate)
        return server.offer.span != span
