"""Which span a newcomer should hold.

Invariants:
1. a chosen span lies within the model and, where sizes are given, within the memory;
2. the blocks served worst come first: a span is taken only if no other candidate's blocks,
   compared as sorted throughputs, are served worse;
3. joining servers count as if they served already, so that newcomers do not follow each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from routing.coverage import coverage
from routing.offer import Offer
from routing.span import Span

# Of the free memory; the rest is for activations, fragmentation and what else the machine does.
HEADROOM = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """What a server pays in bytes for what it holds."""

    block_bytes: tuple[int, ...]  # the weights of each block, as they will lie in memory
    embedding_bytes: int  # with block 0
    head_bytes: int  # final norm and head, with the last block; the whole matrix also if tied
    cache_bytes_per_token: int  # keys and values of one token in one block
    history_bytes_per_token: int  # what a hop keeps of a token it has sent on, whatever its span
    cache_tokens: int  # how many tokens of all sessions it wants room for
    is_tied: bool = False  # head and embedding are one matrix: who has both pays once

    def __post_init__(self) -> None:
        """Raise ValueError for a model without blocks or a negative size."""
        if not self.block_bytes:
            raise ValueError("a model has at least one block")
        ends = (self.embedding_bytes, self.head_bytes)
        tokens = (self.cache_bytes_per_token, self.history_bytes_per_token, self.cache_tokens)
        if min(*self.block_bytes, *ends, *tokens) < 0:
            raise ValueError("sizes cannot be negative")

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.block_bytes)

    def parts(self, span: Span) -> tuple[tuple[int, int], ...]:
        """Return (block, bytes) for each block with its cache, and for each end beside its block.

        Raises ValueError for a span beyond the model.
        """
        if span.stop > self.blocks:
            raise ValueError(f"{span} reaches beyond the {self.blocks} blocks of the model")
        cache = self.cache_bytes_per_token * self.cache_tokens
        parts = [(block, self.block_bytes[block] + cache) for block in span.blocks]
        has_embedding, has_head = span.start == 0, span.stop == self.blocks
        if has_embedding:
            parts.append((0, self.embedding_bytes))
        if has_head:
            shared = self.embedding_bytes if self.is_tied and has_embedding else 0
            parts.append((self.blocks - 1, max(0, self.head_bytes - shared)))
        return tuple(parts)

    def span_bytes(self, span: Span) -> int:
        """Return the memory a server of this span needs: blocks, ends, cache and history."""
        history = self.history_bytes_per_token * self.cache_tokens
        return sum(size for _, size in self.parts(span)) + history


class DoesNotFit(Exception):
    """Not even one block fits. Has `needed_bytes` and `usable_bytes`; says what to do next."""

    def __init__(self, needed_bytes: int, usable_bytes: int, free_bytes: int) -> None:
        """Name what the cheapest block needs and what is there."""
        super().__init__(
            f"one block with its cache needs {_gigabytes(needed_bytes)}, but only "
            f"{_gigabytes(usable_bytes)} of {_gigabytes(free_bytes)} may be used: "
            "give more with --memory, or serve a smaller model"
        )
        self.needed_bytes = needed_bytes
        self.usable_bytes = usable_bytes


def blocks_that_fit(
    sizes: BlockSizes, free_bytes: int, *, start: int = 0, headroom: float = HEADROOM
) -> int:
    """Return how many blocks from `start` on fit into `free_bytes` less the headroom; 0 if none.

    Raises ValueError for a headroom outside [0, 1) or a start outside the model.
    """
    if not 0 <= start < sizes.blocks:
        raise ValueError(f"the model has blocks 0 to {sizes.blocks - 1}, not {start}")
    usable = _usable_bytes(free_bytes, headroom)
    count = 0
    for stop in range(start + 1, sizes.blocks + 1):
        if sizes.span_bytes(Span(start, stop)) > usable:
            break
        count += 1
    return count


def newcomer_span(
    offers: Sequence[Offer], blocks: int, count: int, *, seed: int | None = None
) -> Span:
    """Return the span of `count` blocks that are served worst; of all blocks if count is larger.

    Spans are compared by the throughputs of their blocks, sorted, worst first. Ties go to the span
    with more ends where the model or another server's span ends: so newcomers lie side by side, an
    empty swarm fills with the fewest servers, and no gap remains that is shorter than a span.
    What is tied even then is drawn by the seed, so that two who come at once part; without a seed
    the lowest start is taken.

    Raises ValueError if count or blocks is below 1.
    """
    if count < 1 or blocks < 1:
        raise ValueError(f"a newcomer takes at least 1 of at least 1 block, not {count}/{blocks}")
    count = min(count, blocks)
    candidates = [Span(start, start + count) for start in range(blocks - count + 1)]
    parts = [tuple((block, 1) for block in span.blocks) for span in candidates]
    return _worst_served(candidates, parts, offers, blocks, seed)


def auto_span(
    offers: Sequence[Offer],
    sizes: BlockSizes,
    free_bytes: int,
    *,
    headroom: float = HEADROOM,
    seed: int | None = None,
) -> Span:
    """Return the span for `--blocks auto`: as much as fits, where it is needed most.

    Candidates are the spans that fit and could not grow at either end; if the whole model fits, it
    is the only one. They differ in length, for the ends take the room of blocks. So they are
    compared byte by byte: each block, with its cache, counts by its size, and an end by its own
    beside its block, up to the bytes the smallest candidate fills. What is beyond is
    the rounding of whole blocks and decides only after the ties of `newcomer_span`.

    Raises DoesNotFit if no block fits; ValueError for a headroom outside [0, 1).
    """
    candidates = largest_spans(sizes, free_bytes, headroom)
    if not candidates:
        singles = (Span(block, block + 1) for block in range(sizes.blocks))
        needed = min(map(sizes.span_bytes, singles))
        raise DoesNotFit(needed, _usable_bytes(free_bytes, headroom), free_bytes)
    parts = [sizes.parts(span) for span in candidates]
    return _worst_served(candidates, parts, offers, sizes.blocks, seed)


def largest_spans(sizes: BlockSizes, free_bytes: int, headroom: float = HEADROOM) -> list[Span]:
    """Return every span that fits and is not part of another that fits, by start.

    Raises ValueError for a headroom outside [0, 1).
    """
    largest: list[Span] = []
    for start in range(sizes.blocks):
        count = blocks_that_fit(sizes, free_bytes, start=start, headroom=headroom)
        if not count:
            continue
        span = Span(start, start + count)
        if not any(kept.covers(span) for kept in largest):
            largest.append(span)
    return largest


def _worst_served(
    candidates: Sequence[Span],
    parts: Sequence[Sequence[tuple[int, int]]],
    offers: Sequence[Offer],
    blocks: int,
    seed: int | None,
) -> Span:
    """Return the candidate whose parts (block, weight) are served worst."""
    served = coverage(offers, blocks, with_joining=True)
    edges = {0, blocks}
    for offer in offers:
        if (offer.is_online or offer.is_joining) and offer.span.stop <= blocks:
            edges |= {offer.span.start, offer.span.stop}
    weights = [sum(weight for _, weight in each) for each in parts]
    limit = min(weights)
    keys = [
        (
            _levels(each, served, limit),
            -((span.start in edges) + (span.stop in edges)),
            -weight,
        )
        for span, each, weight in zip(candidates, parts, weights, strict=True)
    ]
    best = min(keys)
    tied = [span for span, key in zip(candidates, keys, strict=True) if key == best]
    return tied[0] if seed is None else Random(seed).choice(tied)


def _levels(
    parts: Sequence[tuple[int, int]], served: Sequence[float], limit: int
) -> list[tuple[float, int]]:
    """Return (throughput, -weight) for each throughput, worst first, cut at `limit` in weight.

    Less is served worse: at the first throughput where two differ, the one that has more weight
    there has it in place of something served better. For weights of 1 this is the order of the
    sorted throughputs.
    """
    weight_at: dict[float, int] = {}
    for block, weight in parts:
        weight_at[served[block]] = weight_at.get(served[block], 0) + weight
    levels: list[tuple[float, int]] = []
    for throughput in sorted(weight_at):
        taken = min(weight_at[throughput], limit)
        if taken:
            levels.append((throughput, -taken))
        limit -= taken
    return levels


def _usable_bytes(free_bytes: int, headroom: float) -> int:
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom is a share in [0, 1), not {headroom}")
    return int(free_bytes * (1 - headroom))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
