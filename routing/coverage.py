"""Who serves each block, and how strongly.

Invariants:
1. only online servers serve; joining ones count where the caller asks for them;
2. an offer that reaches beyond the model cannot be true and counts for nothing;
3. the ends need no entry of their own: the embedding is served as block 0, the head as the last.
"""

from collections.abc import Sequence
from math import fsum

from routing.offer import Offer
from routing.span import Span, spans_of


def coverage(
    offers: Sequence[Offer], blocks: int, *, with_joining: bool = False
) -> tuple[float, ...]:
    """Return the tokens per second of each block: the sum over the servers that hold it.

    A server gives each of its blocks what its whole span makes. 0.0 means nobody holds the block.
    """
    served: list[list[float]] = [[] for _ in range(blocks)]
    for offer in offers:
        is_counted = offer.is_online or (with_joining and offer.is_joining)
        if not is_counted or offer.span.stop > blocks:
            continue
        rate = offer.tokens_per_second(blocks)
        for block in offer.span.blocks:
            served[block].append(rate)
    return tuple(map(fsum, served))  # fsum: equal servers tie exactly, in whatever order they came


def uncovered(offers: Sequence[Offer], blocks: int) -> tuple[Span, ...]:
    """Return the spans that no online server holds, in order; empty in a healthy swarm."""
    held = {
        block
        for offer in offers
        if offer.is_online and offer.span.stop <= blocks
        for block in offer.span.blocks
    }
    return spans_of(set(range(blocks)) - held)
