"""The way of a token through the swarm, or why there is none.

Invariants:
1. the hops of a route run all blocks in order, from block 0, without gap or overlap;
2. a NoRoute names every block that stopped it, under exactly one reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from routing.span import Span


@dataclass(frozen=True, slots=True)
class Hop:
    """A server on a route, with the part of its span that the route uses."""

    peer: str
    span: Span


def check_joined(hops: Sequence[Hop]) -> None:
    """Raise ValueError unless there are hops and they join from block 0 on."""
    if not hops:
        raise ValueError("a route needs at least one hop")
    block = 0
    for hop in hops:
        if hop.span.start != block:
            raise ValueError(f"{hop.peer} runs {hop.span}, but block {block} comes next")
        block = hop.span.stop


@dataclass(frozen=True, slots=True)
class Chain:
    """Hops that run a part of the blocks, as a search found them.

    The seconds reach from leaving the origin to arriving at the target, its own work left out.
    """

    hops: tuple[Hop, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that run all blocks in order, and the seconds one step is expected to take."""

    hops: tuple[Hop, ...]
    seconds: float  # the way back to the client included

    def __post_init__(self) -> None:
        """Raise ValueError unless the hops join from block 0 on and the seconds are possible."""
        check_joined(self.hops)
        if not (isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"a route takes a finite time >= 0, not {self.seconds} seconds")

    @property
    def blocks(self) -> int:
        """How many blocks it runs."""
        return self.hops[-1].span.stop


class NoChain(Exception):
    """The part is held, but every chain through it would have a peer follow itself."""

    def __init__(self, part: Span, origin: str, target: str) -> None:
        """Name the part and who is before and after it."""
        between = f"{origin or 'the client'} and {target or 'the client'}"
        super().__init__(f"no chain of other peers runs {part} between {between}")
        self.part = part


class NoRoute(Exception):
    """Some blocks have no usable server; says which and why, in one sentence.

    `uncovered`: nobody online holds them. `full`: servers hold them, none has room for
    `needed_tokens`. `avoided`: only peers hold them that the caller wants to avoid.
    """

    def __init__(
        self,
        uncovered: Sequence[Span] = (),
        *,
        full: Sequence[Span] = (),
        avoided: Sequence[Span] = (),
        needed_tokens: int = 0,
    ) -> None:
        """Keep the three reasons apart: they end in different exit codes and next steps."""
        self.uncovered = tuple(uncovered)
        self.full = tuple(full)
        self.avoided = tuple(avoided)
        reasons = []
        if uncovered:
            reasons.append(f"{_named(uncovered)} served by nobody")
        if full:
            reasons.append(f"no server of {_blocks(full)} has room for {needed_tokens} tokens")
        if avoided:
            reasons.append(f"{_named(avoided)} served only by peers to avoid")
        super().__init__("; ".join(reasons))


def _blocks(spans: Sequence[Span]) -> str:
    listed = ", ".join(str(span) if len(span) > 1 else str(span.start) for span in spans)
    return f"block{'' if sum(map(len, spans)) == 1 else 's'} {listed}"


def _named(spans: Sequence[Span]) -> str:
    return f"{_blocks(spans)} {'is' if sum(map(len, spans)) == 1 else 'are'}"
