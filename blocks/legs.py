"""The legs of one stack: each with its cache, and which of them can share a pass.

1. A leg keeps to the blocks it began with.
2. Whether sessions of some blocks can join is asked once, after a step has run through them: only
   then their layers show whether they keep a state of their own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.hf import caches
from blocks.stack import Stack


@dataclass(slots=True)
class Part:
    """Some of the stack's blocks, for all legs through them."""

    stack: Stack
    joins: bool | None = None  # None as long as nobody has looked
    forks: bool = False  # caches hold all there is to a session; as long as nobody looked, False

    def look_again(self) -> None:
        """Note whether sessions of these blocks can join, whatever was seen before."""
        self.joins = self.stack.why_not_joined is None
        self.forks = not self.stack.keeps_state


@dataclass(slots=True)
class Leg:
    """A session's past in its blocks. `layout`: of the payload that it took last."""

    part: Part
    cache: StackCache
    layout: Sequence[Hashable] | None = None

    @property
    def stack(self) -> Stack:
        """Its blocks."""
        return self.part.stack

    @property
    def span(self) -> tuple[int, int]:
        """The first of its blocks, and the one after the last."""
        return self.stack.start, self.stack.stop

    @property
    def shortest_fork(self) -> int | None:
        """The least length at which another may begin with its past, None if none can."""
        return self.cache.shortest_fork if self.part.forks else None

    def look(self, layout: Sequence[Hashable]) -> None:
        """Note whether sessions of its blocks can join. A step of that layout has run."""
        self.layout = layout
        if self.part.joins is None:
            self.part.look_again()

    def can_join(self, span: tuple[int, int], start: int, layout: Sequence[Hashable]) -> bool:
        """Return whether a step from `start` on is the next, and may run with other legs'."""
        cache = self.cache
        is_next = not cache.is_torn and cache.length == start and cache.rows == 1
        is_alike = self.span == span and self.layout == layout
        return is_next and is_alike and bool(self.part.joins)


class Legs:
    """The legs by their keys. Not safe between threads."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
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
            part = self._parts.get(span) or Part(self.stack.part(*span))
            self._parts[span] = part
            leg = self._legs[key] = Leg(part, part.stack.new_cache())
        elif leg.span != span:
            began, stop = leg.span
            raise StepError(f"a leg of blocks {began}:{stop} cannot go on with {span[0]}:{span[1]}")
        return leg

    def fork(self, key: Hashable, of: Hashable, length: int) -> None:
        """Begin a leg with the first positions of another. BlocksError if that is not possible."""
        donor = self._legs.get(of)
        if donor is None or donor.shortest_fork is None or key in self._legs:
            raise BlocksError(f"{key} cannot begin with what {of} holds")
        self._legs[key] = Leg(donor.part, donor.cache.fork(length), donor.layout)

    def forget(self, key: Hashable) -> None:
        """Free the leg; unknown ones are none's fault."""
        self._legs.pop(key, None)

    def clear(self) -> None:
        """Free all."""
        self._legs.clear()


def is_recurrent(stack: Stack) -> bool:
    """True if some of the stack's layers hold a state instead of a past that can be masked."""
    held = stack.new_cache().held
    return any(caches.is_recurrent(layer) for layer in held)
