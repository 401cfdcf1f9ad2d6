"""The legs of one stack: each with its cache, and which of them can share a pass.

1. A leg keeps to the blocks it began with.
2. Whether sessions of some blocks can join is asked once, after a step has run through them: only
   then their layers show whether they keep a state of their own.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from blocks.cache import StackCache
from blocks.errors import StepError
from blocks.stack import Stack


@dataclass(slots=True)
class Part:
    """Some of the stack's blocks, for all legs through them."""

    stack: Stack
    joins: bool | None = None  # None as long as nobody has looked


@dataclass(frozen=True, slots=True)
class Leg:
    """A session's past in its blocks."""

    part: Part
    cache: StackCache

    @property
    def stack(self) -> Stack:
        """Its blocks."""
        return self.part.stack

    @property
    def span(self) -> tuple[int, int]:
        """The first of its blocks, and the one after the last."""
        return self.stack.start, self.stack.stop

    def look(self) -> None:
        """Note whether sessions of its blocks can join. A step has run through them."""
        if self.part.joins is None:
            self.part.joins = self.stack.why_not_joined is None

    def can_join(self, span: tuple[int, int], start: int) -> bool:
        """Return whether a step from `start` on is the next, and may run with other legs'."""
        cache = self.cache
        is_next = not cache.is_torn and cache.length == start and cache.rows == 1
        return is_next and self.span == span and bool(self.part.joins)


class Legs:
    """The legs by their keys. Not safe between threads."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._legs: dict[Hashable, Leg] = {}
        self._parts: dict[tuple[int, int], Part] = {}  # no more than the stack has spans

    def __len__(self) -> int:
        return len(self._legs)

    def __getitem__(self, key: Hashable) -> Leg:
        """The leg; KeyError if there is none."""
        return self._legs[key]

    def get(self, key: Hashable) -> Leg | None:
        """The leg, None if there is none."""
        return self._legs.get(key)

    def opened(self, key: Hashable, span: tuple[int, int]) -> Leg:
        """The leg, begun now if need be. StepError if its blocks are not held, or are others."""
        leg = self._legs.get(key)
        if leg is None:
            part = self._parts.get(span) or Part(self._stack.part(*span))
            self._parts[span] = part
            leg = self._legs[key] = Leg(part, part.stack.new_cache())
        elif leg.span != span:
            began, stop = leg.span
            raise StepError(f"a leg of blocks {began}:{stop} cannot go on with {span[0]}:{span[1]}")
        return leg

    def forget(self, key: Hashable) -> None:
        """Free the leg; unknown ones are none's fault."""
        self._legs.pop(key, None)

    def clear(self) -> None:
        """Free all."""
        self._legs.clear()
