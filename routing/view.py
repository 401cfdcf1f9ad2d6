"""Which offers a client gets to see of a swarm that is too large to be read whole.

Invariants:
1. nothing is lost that a route needs: a block that some online server has so many tokens free for
   is held by a chosen one that has as many, for every number of tokens;
2. of each block the FAST fastest, the ROOMY roomiest and DRAWN of the others, by lot, are chosen;
3. what matters most comes first: invariant 1 holds for whatever begins with the roomiest of each
   block, and they lead;
4. the answer depends on the seed and the offers, not on their order.

Nobody but the client knows how far its servers are, and all who saw only the fastest would crowd
there. The lot gives each client others, near ones among them: who answers draws by its own seed.
It is also what remains to choose from when liars claim to be the fastest and the roomiest.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from hashlib import blake2b

from routing.offer import Offer

FAST = 4
ROOMY = 2
DRAWN = 2

WARM = 3  # linked servers of each block: one that works and two to take over
MOST_WARMED = 8  # dialled in one go

# One way across a continent: what coming to a server costs, besides its blocks, where nobody has
# measured it. A long span pays it once.
LINK_SECONDS = 0.03
# With less room a server takes hardly any session, however fast it is.
LITTLE_ROOM_TOKENS = 256


def best_offers(offers: Iterable[Offer], blocks: int, seed: str) -> tuple[Offer, ...]:
    """Return the offers worth showing, the most needed first; each peer makes one offer.

    Left out are those not online, or reaching beyond the model of `blocks` blocks.
    """
    usable = [offer for offer in offers if offer.is_online and offer.span.stop <= blocks]
    lots = {offer.peer: _lot(seed, offer.peer) for offer in usable}
    seconds = {offer.peer: _seconds_per_block(offer, blocks) for offer in usable}

    def roominess(offer: Offer) -> tuple[float, ...]:
        return (-offer.free_tokens, seconds[offer.peer])

    def slowness(offer: Offer) -> tuple[float, ...]:
        return (offer.free_tokens < LITTLE_ROOM_TOKENS, seconds[offer.peer])

    def chance(offer: Offer) -> tuple[float, ...]:
        return (offer.free_tokens < LITTLE_ROOM_TOKENS,)

    def ranked(key: Callable[[Offer], tuple[float, ...]]) -> list[Offer]:
        # Equals are drawn: else the same peer would be the first of them for everyone.
        return sorted(usable, key=lambda offer: (*key(offer), lots[offer.peer]))

    by_room = ranked(roominess)
    roomiest = _first_per_block(by_room, blocks, 1)
    fastest = _first_per_block(ranked(slowness), blocks, FAST)
    roomy = _first_per_block(by_room, blocks, ROOMY)
    shown = {offer.peer for offer in (*fastest, *roomy)}
    others = [offer for offer in ranked(chance) if offer.peer not in shown]
    drawn = _first_per_block(others, blocks, DRAWN)
    return tuple({each.peer: each for each in (*roomiest, *fastest, *drawn, *roomy)}.values())


def spares(offers: Iterable[Offer], linked: Set[str], blocks: int) -> list[str]:
    """Return whom a client should be linked to besides, fastest first.

    A repair over a link that stands takes a fraction of one that has to be dialled. So each block
    should have WARM linked servers, as far as there are so many; at most MOST_WARMED at a time.
    """
    usable = [offer for offer in offers if offer.is_online and offer.span.stop <= blocks]
    missing = [WARM] * blocks
    for offer in usable:
        if offer.peer in linked:
            for block in offer.span.blocks:
                missing[block] -= 1
    chosen = []
    others = [offer for offer in usable if offer.peer not in linked]
    for offer in sorted(others, key=lambda each: (_seconds_per_block(each, blocks), each.peer)):
        if max(missing[offer.span.start : offer.span.stop]) > 0:
            chosen.append(offer.peer)
            for block in offer.span.blocks:
                missing[block] -= 1
    return chosen[:MOST_WARMED]


def _first_per_block(order: Sequence[Offer], blocks: int, count: int) -> list[Offer]:
    """Return those that are among the first `count` holders of some block, in the same order."""
    missing = [count] * blocks
    lacking = blocks  # how many blocks still miss a holder
    found = []
    for offer in order:
        if not lacking:
            break
        start, stop = offer.span.start, offer.span.stop
        if max(missing[start:stop]) <= 0:
            continue
        found.append(offer)
        for block in range(start, stop):
            missing[block] -= 1
            lacking -= missing[block] == 0
    return found


def _seconds_per_block(offer: Offer, blocks: int) -> float:
    """Return what a decode step takes there per block, coming there and the head included."""
    head = offer.head_seconds if offer.holds_head(blocks) else 0.0
    once = LINK_SECONDS + offer.wait_seconds + head
    return offer.decode_seconds_per_block + once / len(offer.span)


def _lot(seed: str, peer: str) -> bytes:
    """Return eight bytes, the same on every machine and in every release."""
    return blake2b(peer.encode(), digest_size=8, key=seed.encode()[:64]).digest()
