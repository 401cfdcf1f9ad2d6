"""What waits on a stack, and what of it is computed next in one pass over the weights.

A pass costs the reading of all weights, however few positions it computes. So steps share passes,
in two ways: a run holds steps of one leg that follow each other, as a replay arrives as the
hundreds of steps it replays, one position each; a joint pass holds one decode step of each of
several legs, as many sessions write at once. Pure: no clock, no thread, no tensor.

1. The steps of a leg leave in the order they came, each once.
2. Legs take turns, and so do kinds of passes: all runs are of one kind, joint passes of as many as
   their steps. No kind has two passes in a row while another waits, and who is first in turn
   waits for one pass of another kind at most: replays and decode steps do not hold each other up.
3. A run holds at most `most_positions`, unless its first step alone has more.
4. A joint pass holds at most `most_joint` legs, in the order of their turns, and their pasts differ
   so little in length that no more than half of what is read for it is padding, or it is little.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

# Pasts are padded to the longest, in each layer anew. So much padding is always allowed: 32 legs
# of 256 positions each, some 32 MB in a layer of a model of eight billion weights.
SPARE_PLACES = 8192


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
    """A step's place, and what must be equal in all steps of a pass.

    `is_decode`: one position of one row, which may join those of other legs.
    """

    start: int
    positions: int
    kind: Hashable
    is_decode: bool = False

    def __post_init__(self) -> None:
        if self.is_decode and self.positions != 1:
            raise ValueError(f"a decode step has one position, not {self.positions}")

    def follows(self, before: "Shape") -> bool:
        """Return whether it goes on where `before` ends, and is of its kind."""
        return self.start == before.start + before.positions and self.kind == before.kind


class StepQueue(Generic[Job]):
    """The jobs that wait, by leg. Not safe between threads: its owner locks."""

    def __init__(self, most_positions: int, most_joint: int = 1) -> None:
        """ValueError if no step would fit into a pass."""
        if most_positions < 1 or most_joint < 1:
            raise ValueError("a pass has at least one position")
        self._most_positions = most_positions
        self._most_joint = most_joint
        self._lines: dict[Hashable, deque[Job]] = {}  # in the order of their turns
        self._last: Hashable = None  # kind of the last pass: a joint one's, or None for a run

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, job: Job) -> None:
        """Queue a job behind those of its leg."""
        self._lines.setdefault(job.key, deque()).append(job)

    def take(self, can_join: Callable[[Job], bool] | None = None) -> list[Job]:
        """Return the jobs of the next pass, in order; none if nothing waits.

        They are a run of one leg, or of several legs one decode step each. `can_join` tells of the
        next step of a leg whether the leg itself, as all its steps before have left it, could share
        this step's pass with others (None: never). It is asked about decode steps only.
        """
        kinds = {key: _joint_kind(line, can_join) for key, line in self._lines.items()}
        if not kinds:
            return []
        first = next((key for key in kinds if kinds[key] != self._last), next(iter(kinds)))
        self._last = kinds[first]
        if self._last is None:
            return self._run(first)
        alike = [key for key in kinds if kinds[key] == self._last and key != first]
        return self._joint([first, *alike])

    def clear(self) -> None:
        """Forget everything that waits."""
        self._lines.clear()

    def _run(self, key: Hashable) -> list[Job]:
        """Take a leg's next step and those that go on from it."""
        line = self._lines[key]
        taken = [line.popleft()]
        room = self._most_positions - _positions(taken[0])
        while line and _goes_on(taken[-1], line[0]) and _positions(line[0]) <= room:
            room -= _positions(line[0])
            taken.append(line.popleft())
        self._had_turn(key)
        return taken

    def _joint(self, keys: Sequence[Hashable]) -> list[Job]:
        """Take the next steps of these legs, of as many as may share a pass."""
        taken: list[Job] = []
        lengths: list[int] = []
        for key in keys:
            job = self._lines[key][0]
            length = job.shape.start + 1 if job.shape else 0
            if len(taken) < self._most_joint and is_dense([*lengths, length]):
                lengths.append(length)
                taken.append(self._lines[key].popleft())
                self._had_turn(key)
        return taken

    def _had_turn(self, key: Hashable) -> None:
        """Put the leg behind the others, or forget it if nothing of it waits."""
        if line := self._lines.pop(key):
            self._lines[key] = line


def is_dense(lengths: Sequence[int]) -> bool:
    """Return whether pasts of these lengths, padded to the longest, are not mostly padding."""
    return len(lengths) * max(lengths) <= 2 * sum(lengths) + SPARE_PLACES


def _joint_kind(line: Sequence[Job], can_join: Callable[[Job], bool] | None) -> Hashable:
    """The kind of joint pass that a leg's next step could be in, None if it begins a run."""
    shape = line[0].shape
    if shape is None or not shape.is_decode or can_join is None:
        return None
    is_run = len(line) > 1 and _goes_on(line[0], line[1])
    return ("joint", shape.kind) if not is_run and can_join(line[0]) else None


def _positions(job: Waiting) -> int:
    return job.shape.positions if job.shape else 0


def _goes_on(before: Waiting, after: Waiting) -> bool:
    return (
        before.shape is not None and after.shape is not None and after.shape.follows(before.shape)
    )
