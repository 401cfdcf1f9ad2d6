"""What waits on a stack, and what of it is computed next in one pass over the weights.

A pass costs the reading of all weights, however few positions it computes. So steps share passes,
in two ways: a run holds steps of one leg that follow each other, as a replay arrives as the
hundreds of steps it replays, one position each; a joint pass holds one decode step of each of
several legs, as many sessions write at once. Pure: no clock, no thread, no tensor.

1. The jobs of a leg leave in the order they came, each once; one leaves whenever one waits.
2. Passes of three kinds take turns: joint ones, short ones of one leg, and fills (prefills and
   replays). Of those that wait, the kind whose pass was longest ago is next: who waits to decode
   waits for one fill at most before a pass of that kind, and the other way round.
3. Training waits until nothing else does, but for `MOST_PASSED_OVER` passes in a row at most.
4. Within a kind clients take turns, and so do the legs of a client (`blocks.turns`). A joint pass
   holds one step of each client before it holds a second one of any.
5. So with C clients that wait for passes of a kind, one of them with L legs, each of these legs
   has its turn within C * L passes of the kind, and these are a third of all or more, but for
   training's share.
6. A run holds as many positions as its steps allow (`Shape.most`), unless its first alone has more.
7. A joint pass holds at most `most_joint` legs, and where it `pads` their pasts differ so little in
   length that no more than half of what is read for it is padding, or it is little. Nobody is left
   who fitted in when its turn came.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Generic, Protocol, TypeVar

from blocks.turns import Turns

# Pasts are padded to the longest, in each layer anew. So much padding is always allowed: 32 legs
# of 256 positions each, some 32 MB in a layer of a model of eight billion weights.
SPARE_PLACES = 8192
# Training is slow anyway, and its clients wait minutes: a share of the passes keeps it alive.
MOST_PASSED_OVER = 32


class Service(IntEnum):
    """How soon a step is wanted: the lower, the sooner."""

    DECODE = 0  # somebody watches the text grow
    FILL = 1  # a prompt, or a replay
    TRAIN = 2


class Waiting(Protocol):
    """A job as the queue sees it: whose it is, and what it can share a pass with."""

    @property
    def key(self) -> Hashable:
        """The leg."""

    @property
    def client(self) -> Hashable:
        """Whose leg it is."""

    @property
    def shape(self) -> "Shape | None":
        """What of it is computed; None for an errand, which takes no pass and nobody's turn."""


Job = TypeVar("Job", bound=Waiting)


@dataclass(frozen=True, slots=True)
class Shape:
    """A step's place, and what it can share a pass with.

    `kind` must be equal in all steps of a run; a step of kind None has a run to itself. `most` are
    the positions of a pass that it may be in. `is_decode`: one position of one row, which may join
    those of other legs.
    """

    start: int
    positions: int
    kind: Hashable
    most: int
    is_decode: bool = False
    service: Service = Service.FILL

    def __post_init__(self) -> None:
        if self.is_decode and self.positions != 1:
            raise ValueError(f"a decode step has one position, not {self.positions}")
        if self.most < 1:
            raise ValueError("a pass has at least one position")

    def follows(self, before: "Shape") -> bool:
        """Return whether it goes on where `before` ends, and is of its kind."""
        is_next = self.start == before.start + before.positions
        return is_next and self.kind is not None and self.kind == before.kind


class _Kind(Enum):
    """The kinds of passes."""

    JOINT = "joint"
    SHORT = "short"
    FILL = "fill"
    TRAIN = "train"


@dataclass(slots=True)
class _Line(Generic[Job]):
    """The jobs of a leg. `kind`: in which turns it is; None as long as nobody has looked."""

    jobs: deque[Job] = field(default_factory=deque)
    kind: _Kind | None = None
    client: Hashable = None  # as of the job that was looked at


class StepQueue(Generic[Job]):
    """The jobs that wait, by leg. Not safe between threads: its owner locks."""

    def __init__(self, most_joint: int = 1) -> None:
        """ValueError if no step would fit into a joint pass."""
        if most_joint < 1:
            raise ValueError("a pass has at least one position")
        self.pads = True  # as long as nobody has seen that joint passes do not
        self._most_joint = most_joint
        self._lines: dict[Hashable, _Line[Job]] = {}
        self._unseen: dict[Hashable, None] = {}  # legs whose next job nobody has looked at
        self._turns = {kind: Turns() for kind in _Kind}
        self._order = [_Kind.JOINT, _Kind.SHORT, _Kind.FILL]  # whose pass was longest ago is first
        self._passed_over = 0  # passes in a row for which training waited
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job) -> None:
        """Queue a job behind those of its leg."""
        line = self._lines.get(job.key)
        if line is None:
            line = self._lines[job.key] = _Line()
            self._unseen[job.key] = None
        line.jobs.append(job)
        self._count += 1
        is_decode = line.kind in (_Kind.JOINT, _Kind.SHORT)
        if is_decode and len(line.jobs) == 2 and _goes_on(line.jobs[0], job):
            self._look_again(job.key)  # the two are a run, as of a replay

    def take(self, can_join: Callable[[Job], bool] | None = None) -> list[Job]:
        """Return the jobs of the next pass, in order, or one errand; none if nothing waits.

        They are a run of one leg, or of several legs one decode step each. `can_join` tells of the
        next step of a leg whether the leg itself, as all its steps before have left it, could share
        this step's pass with others (None: never). It is asked about decode steps only, once.
        """
        errand = self._look(can_join)
        if errand is not None:
            return [self._popped(errand)]
        kind = self._next_kind()
        if kind is None:
            return []
        self._had(kind)
        return self._joint() if kind is _Kind.JOINT else self._run(kind)

    def ready(self, can_join: Callable[[Job], bool] | None = None) -> int:
        """How many legs wait for the next pass, if that is a joint one, else 0; as `take` asks."""
        is_errand = self._look(can_join) is not None
        is_joint = not is_errand and self._next_kind() is _Kind.JOINT
        return len(self._turns[_Kind.JOINT]) if is_joint else 0

    def change(self, key: Hashable, change: Callable[[Job], Job | None]) -> None:
        """Put in the place of each job of a leg that waits what `change` gives; None: nothing."""
        line = self._lines.get(key)
        if line is None:
            return
        self._look_again(key)
        changed = (change(job) for job in line.jobs)
        left = deque(job for job in changed if job is not None)
        self._count += len(left) - len(line.jobs)
        line.jobs = left
        if not left:
            del self._lines[key], self._unseen[key]

    def clear(self) -> None:
        """Forget everything that waits."""
        self._lines.clear()
        self._unseen.clear()
        self._count = 0
        for turns in self._turns.values():
            turns.clear()

    def _look(self, can_join: Callable[[Job], bool] | None) -> Hashable | None:
        """Put legs into the turns that their next jobs wait for, up to one that has an errand."""
        for key in list(self._unseen):
            line = self._lines[key]
            if line.jobs[0].shape is None:
                return key
            line.kind, line.client = _kind_of(line.jobs, can_join), line.jobs[0].client
            self._turns[line.kind].add(line.client, key)
            del self._unseen[key]
        return None

    def _next_kind(self) -> _Kind | None:
        """Which kind's pass is next, None if nobody waits."""
        kind = next((kind for kind in self._order if self._turns[kind]), None)
        if self._turns[_Kind.TRAIN] and (kind is None or self._passed_over >= MOST_PASSED_OVER):
            return _Kind.TRAIN
        return kind

    def _had(self, kind: _Kind) -> None:
        """Count a pass of this kind as had."""
        if kind is _Kind.TRAIN:
            self._passed_over = 0
        else:
            self._passed_over += bool(self._turns[_Kind.TRAIN])
            self._order.remove(kind)
            self._order.append(kind)

    def _run(self, kind: _Kind) -> list[Job]:
        """Take the next step of the leg in turn, and those that go on from it."""
        key = next(iter(self._turns[kind]))
        taken = [self._turn(key)]
        line = self._lines.get(key)
        room = _most(taken[0]) - _positions(taken[0])
        while line and line.jobs and _goes_on(taken[-1], line.jobs[0]):
            room -= _positions(line.jobs[0])
            if room < 0:
                break
            taken.append(self._popped(key))
        return taken

    def _joint(self) -> list[Job]:
        """Take the next steps of the legs in turn, of as many as may share a pass."""
        keys: list[Hashable] = []
        longest = total = 0
        most = self._most_joint
        for key in self._turns[_Kind.JOINT]:
            if len(keys) >= most:
                break
            shape = self._lines[key].jobs[0].shape
            if shape is None or (keys and len(keys) >= shape.most):
                continue
            length = shape.start + 1
            is_alike = is_dense(len(keys) + 1, max(longest, length), total + length)
            if keys and self.pads and not is_alike:
                continue
            most = min(most, shape.most)
            longest, total = max(longest, length), total + length
            keys.append(key)
        return [self._turn(key) for key in keys]

    def _turn(self, key: Hashable) -> Job:
        """Take a leg's next job: it has its turn."""
        line = self._lines[key]
        if line.kind is not None:
            self._turns[line.kind].had(line.client, key)
        line.kind = None
        self._unseen[key] = None
        return self._popped(key)

    def _look_again(self, key: Hashable) -> None:
        """What kind of pass this leg waits for may have changed."""
        line = self._lines[key]
        if line.kind is not None:
            self._turns[line.kind].remove(line.client, key)
            line.kind = None
            self._unseen[key] = None

    def _popped(self, key: Hashable) -> Job:
        """Take out a leg's next job, and forget the leg if it was the last. It is in no turns."""
        line = self._lines[key]
        self._count -= 1
        job = line.jobs.popleft()
        if not line.jobs:
            del self._lines[key], self._unseen[key]
        return job


def is_dense(legs: int, longest: int, total: int) -> bool:
    """Return whether the pasts of so many legs, padded to the longest, are not mostly padding.

    `total`: the sum of their lengths.
    """
    return legs * longest <= 2 * total + SPARE_PLACES


def _kind_of(jobs: deque[Job], can_join: Callable[[Job], bool] | None) -> _Kind:
    """The kind of pass that a leg's next step waits for."""
    shape = jobs[0].shape
    if shape is None or shape.service is Service.TRAIN:
        return _Kind.TRAIN
    if len(jobs) > 1 and _goes_on(jobs[0], jobs[1]):
        return _Kind.FILL  # a replay comes as steps of one position
    if shape.is_decode and can_join is not None and can_join(jobs[0]):
        return _Kind.JOINT
    return _Kind.SHORT if shape.service is Service.DECODE else _Kind.FILL


def _positions(job: Waiting) -> int:
    return job.shape.positions if job.shape else 0


def _most(job: Waiting) -> int:
    return job.shape.most if job.shape else 0


def _goes_on(before: Waiting, after: Waiting) -> bool:
    return (
        before.shape is not None and after.shape is not None and after.shape.follows(before.shape)
    )
