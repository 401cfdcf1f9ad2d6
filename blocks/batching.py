"""What waits on a stack, and what of it is computed next in one pass over the weights.

A pass costs the reading of all weights, however few positions it computes. So steps of one leg that
follow each other share one: a replay arrives as the hundreds of steps it replays, one position
each. Pure: no clock, no thread, no tensor.

1. The steps of a leg leave in the order they came, each once.
2. Legs take turns: one that has much to do holds up another by one pass at most.
3. A pass holds steps of one leg only, and at most `most_positions`, unless its first step alone
   has more.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A job as the queue sees it: of which leg it is, and what it can share a pass with."""

    @property
    def key(self) -> Hashable:
        """The leg."""

    @property
    def shape(self) -> "Shape | None":
        """How it may be joined; None for a job that has a pass, or none at all, to itself."""


Job = TypeVar("Job", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's place, and what must be equal in all steps of a pass."""

    start: int
    positions: int
    kind: Hashable

    def follows(self, before: "Shape") -> bool:
        """Return whether it goes on where `before` ends, and is of its kind."""
        return self.start == before.start + before.positions and self.kind == before.kind


class StepQueue(Generic[Job]):
    """The jobs that wait, by leg. Not safe between threads: its owner locks."""

    def __init__(self, most_positions: int) -> None:
        """ValueError if no step would fit into a pass."""
        if most_positions < 1:
            raise ValueError("a pass has at least one position")
        self._most_positions = most_positions
        self._lines: dict[Hashable, deque[Job]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, job: Job) -> None:
        """Queue a job behind those of its leg."""
        self._lines.setdefault(job.key, deque()).append(job)

    def take(self) -> list[Job]:
        """Return the jobs of the next pass, in order; none if nothing waits."""
        key = next(iter(self._lines), None)
        if key is None:
            return []
        line = self._lines.pop(key)
        taken = [line.popleft()]
        room = self._most_positions - _positions(taken[0])
        while line and _goes_on(taken[-1], line[0]) and _positions(line[0]) <= room:
            room -= _positions(line[0])
            taken.append(line.popleft())
        if line:
            self._lines[key] = line  # behind the others
        return taken

    def clear(self) -> None:
        """Forget everything that waits."""
        self._lines.clear()


def _positions(job: Waiting) -> int:
    return job.shape.positions if job.shape else 0


def _goes_on(before: Waiting, after: Waiting) -> bool:
    return (
        before.shape is not None and after.shape is not None and after.shape.follows(before.shape)
    )
