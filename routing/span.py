"""Runs of neighbouring blocks, the nouns of every decision.

Invariants:
1. a span is never empty and never starts below block 0;
2. `Span.parse(str(span)) == span`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_WRITTEN = re.compile(r"([0-9]+):([0-9]+)")


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A run of neighbouring blocks, half-open like `range`: 8:16 is blocks 8 to 15."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Raise ValueError for a span that is empty or starts below 0."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a span needs 0 <= start < stop, not {self}")

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Return the span written as `8:16`; ValueError if it is written otherwise."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise ValueError(f"a span is written like 8:16, not {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        """Return how many blocks it has, at least 1."""
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        """Return whether this block is one of it."""
        return self.start <= block < self.stop

    @property
    def blocks(self) -> range:
        """Its blocks in order, as the plain `range` that `blocks` and `routing` share."""
        return range(self.start, self.stop)

    def overlaps(self, other: "Span") -> bool:
        """Return whether some block is in both."""
        return self.start < other.stop and other.start < self.stop

    def covers(self, other: "Span") -> bool:
        """Return whether every block of the other is in this one."""
        return self.start <= other.start and other.stop <= self.stop


def spans_of(blocks: Iterable[int]) -> tuple[Span, ...]:
    """Return the fewest spans, in order, that hold exactly these blocks."""
    spans: list[Span] = []
    for block in sorted(set(blocks)):
        if spans and spans[-1].stop == block:
            spans[-1] = Span(spans[-1].start, block + 1)
        else:
            spans.append(Span(block, block + 1))
    return tuple(spans)


def even_spans(blocks: int, parts: int) -> tuple[Span, ...]:
    """Cut a model into as many spans whose lengths differ by one at most; never into empty ones.

    Raises ValueError without a block or a part.
    """
    if blocks < 1 or parts < 1:
        raise ValueError(f"{blocks} blocks cannot be cut into {parts} spans")
    parts = min(parts, blocks)
    cuts = [blocks * number // parts for number in range(parts + 1)]
    return tuple(Span(start, stop) for start, stop in pairwise(cuts))
