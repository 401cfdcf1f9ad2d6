"""A server's record as routing sees it.

Invariants:
1. every figure is finite and not negative, and no block takes less than a nanosecond: one peer's
   announcement can never make a sum of others infinite;
2. an offer is joining, online or neither (draining); never two at once;
3. the ends follow from the span: who holds block 0 embeds, who holds the last block has the head.
"""

from dataclasses import dataclass
from math import isfinite

from routing.span import Span

# No machine reads the weights of a block in less; below this it is a lie, and 1/seconds overflows.
FASTEST_SECONDS_PER_BLOCK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one server offers. A peer makes one offer at a time."""

    peer: str
    span: Span
    decode_seconds_per_block: float  # one decode step through one block
    prefill_seconds_per_block_token: float  # one token of a long prompt through one block
    free_tokens: int  # the longest session it would admit
    head_seconds: float = 0.0  # final norm and head, once per step; counts on the last block only
    wait_seconds: float = 0.0  # expected wait in its queue before a step is computed
    is_online: bool = True
    is_joining: bool = False  # loads the span now: no route yet, but placement counts it

    def __post_init__(self) -> None:
        """Raise ValueError for a figure that no honest server has."""
        if not self.peer:
            raise ValueError("an offer needs a peer; the empty name is the client's")
        if self.is_online and self.is_joining:
            raise ValueError(f"{self.peer} cannot be online and joining at once")
        for name in (
            "decode_seconds_per_block",
            "prefill_seconds_per_block_token",
            "free_tokens",
            "head_seconds",
            "wait_seconds",
        ):
            figure = getattr(self, name)
            if not (isfinite(figure) and figure >= 0):
                raise ValueError(f"{name} of {self.peer} must be finite and >= 0, not {figure}")
        if self.decode_seconds_per_block < FASTEST_SECONDS_PER_BLOCK:
            raise ValueError(
                f"decode_seconds_per_block of {self.peer} must be at least "
                f"{FASTEST_SECONDS_PER_BLOCK}, not {self.decode_seconds_per_block}"
            )

    def holds_head(self, blocks: int) -> bool:
        """Return whether its span reaches the end of a model of `blocks` blocks."""
        return self.span.stop == blocks

    def tokens_per_second(self, blocks: int) -> float:
        """Return how many decode steps a second run through its whole span, head included."""
        head = self.head_seconds if self.holds_head(blocks) else 0.0
        return 1 / (self.decode_seconds_per_block * len(self.span) + head)
