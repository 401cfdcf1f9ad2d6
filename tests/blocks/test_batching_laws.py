"""Whatever comes in whatever order: nothing is lost, nobody starves, nobody who fits is left."""

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.batching import (
    MOST_PASSED_OVER,
    SPARE_PLACES,
    Service,
    Shape,
    StepQueue,
    is_dense,
)

MOST_RUN = 4
MOST_JOINT = 4
FAR = 4 * SPARE_PLACES  # a past beside which few short ones have room
KINDS = ("joint", "short", "fill")


@dataclass(frozen=True)
class Job:
    key: str  # its first letter is its client's name
    shape: Shape | None
    number: int

    @property
    def client(self) -> str:
        return self.key[0]


def decode(start: int) -> Shape:
    return Shape(start, 1, "plain", MOST_RUN, is_decode=True, service=Service.DECODE)


decodes = st.builds(decode, st.one_of(st.integers(0, 4), st.just(FAR - 1)))
shapes = st.one_of(
    decodes,
    decodes,
    st.builds(
        Shape,
        st.integers(0, 4),
        st.integers(1, 6),
        st.sampled_from(["plain", "other", None]),
        st.just(MOST_RUN),
        service=st.sampled_from(Service),
    ),
    st.none(),
)
# Between two takes some jobs come; most often few, so that turns are had while others wait.
legs = st.builds("{}{}".format, st.sampled_from("abcd"), st.integers(1, 3))
rounds = st.lists(st.lists(st.tuples(legs, shapes), max_size=12), max_size=25)
unable = st.sets(legs, max_size=4)


@dataclass
class Wait:
    """A leg that waits for a pass of a kind with one and the same job."""

    number: int
    kind: str
    passes: int = 0  # of the kind that it saw, its own included
    clients: int = 1  # the most that waited for the kind with it
    legs: int = 1  # the most of its own client


@dataclass
class Model:
    """What a queue should hold, and how long each leg has waited."""

    unable: set[str]
    pads: bool
    lines: dict[str, list[Job]] = field(default_factory=dict)
    waits: dict[str, Wait] = field(default_factory=dict)
    for_train: int = 0  # passes in a row for which training waited
    since: dict[str, int] = field(default_factory=dict)  # passes for which a kind waited

    def fits(self, lengths: list[int]) -> bool:
        """May pasts of these lengths share a pass?"""
        return not self.pads or is_dense(len(lengths), max(lengths), sum(lengths))

    def kind(self, key: str) -> str:
        """The kind of pass that a leg waits for."""
        first = self.lines[key][0].shape
        if first is None:
            return "errand"
        if first.service is Service.TRAIN:
            return "train"
        after = self.lines[key][1].shape if len(self.lines[key]) > 1 else None
        if after is not None and after.follows(first):
            return "fill"
        if first.is_decode and key not in self.unable:
            return "joint"
        return "short" if first.service is Service.DECODE else "fill"

    def looked_at(self) -> dict[str, str]:
        """The kind of each leg that waits, as the queue should see it now; and who waits so."""
        kinds = {key: self.kind(key) for key in self.lines}
        for key, kind in kinds.items():
            number = self.lines[key][0].number
            wait = self.waits.get(key)
            if wait is None or (wait.number, wait.kind) != (number, kind):
                wait = self.waits[key] = Wait(number, kind)
            alike = [other for other in kinds if kinds[other] == kind]
            wait.clients = max(wait.clients, len({other[0] for other in alike}))
            wait.legs = max(wait.legs, sum(other[0] == key[0] for other in alike))
        return kinds


def check_pass(model: Model, taken: list[Job], kinds: dict[str, str]) -> None:
    """What left was right to leave now, and the model is as after it."""
    kind = kinds[taken[0].key]
    if "errand" in kinds.values():
        assert (kind, len(taken)) == ("errand", 1)
    elif kind == "joint":
        check_joint(model, taken, kinds)
    else:
        check_run(model, taken)
    for job in taken:
        assert model.lines[job.key].pop(0) is job
        if not model.lines[job.key]:
            del model.lines[job.key]
    if kind != "errand":
        check_waits(model, {job.key for job in taken}, kind, kinds)


def check_joint(model: Model, taken: list[Job], kinds: dict[str, str]) -> None:
    assert len({job.key for job in taken}) == len(taken) <= MOST_JOINT
    assert {kinds[job.key] for job in taken} == {"joint"}
    lengths = [job.shape.start + 1 for job in taken if job.shape is not None]
    assert model.fits(lengths) or len(taken) == 1
    left = [key for key in kinds if kinds[key] == "joint" and key not in {j.key for j in taken}]
    for key in left:  # work conserving: no room, or a past too long or short when its turn came
        shape = model.lines[key][0].shape
        assert shape is not None
        passes = [[*lengths[:count], shape.start + 1] for count in range(1, len(lengths) + 1)]
        assert len(taken) == MOST_JOINT or not all(map(model.fits, passes))
    clients = [job.client for job in taken]
    others = [model.lines[key][0].shape for key in left]
    far = FAR in [*lengths, *(shape.start + 1 for shape in others if shape)]
    if not (far and model.pads):  # all would fit
        for client in {key[0] for key in left}:
            most = max(clients.count(other) for other in clients)
            assert clients.count(client) >= most - 1


def check_run(model: Model, taken: list[Job]) -> None:
    key = taken[0].key
    assert {job.key for job in taken} == {key}
    found = [job.shape for job in taken if job.shape is not None]
    assert len(found) == len(taken)
    assert all(after.follows(before) for before, after in pairwise(found))
    size = sum(shape.positions for shape in found)
    assert len(taken) == 1 or size <= MOST_RUN
    if len(model.lines[key]) > len(taken):  # work conserving: what follows had no room
        after = model.lines[key][len(taken)].shape
        assert after is None or not after.follows(found[-1]) or size + after.positions > MOST_RUN


def check_waits(model: Model, served: set[str], kind: str, kinds: dict[str, str]) -> None:
    """Nobody waits longer than the module says."""
    for key, wait in list(model.waits.items()):
        if wait.kind == kind and key in kinds:
            wait.passes += 1
            assert wait.passes <= wait.clients * wait.legs, key
        if key in served:
            del model.waits[key]
    waiting = set(kinds.values())
    for one in KINDS:
        if one == kind or one not in waiting:
            model.since[one] = 0
        elif kind != "train":
            model.since[one] = model.since.get(one, 0) + 1
            assert model.since[one] < len(KINDS)  # each other kind once
    if kind == "train":
        assert waiting == {"train"} or model.for_train >= MOST_PASSED_OVER
    model.for_train = model.for_train + 1 if "train" in waiting and kind != "train" else 0
    assert model.for_train <= MOST_PASSED_OVER


@settings(max_examples=300)
@given(rounds, unable, st.booleans())
def test_nobody_starves_and_no_pass_leaves_out_who_fits_in(
    told: list[list[tuple[str, Shape | None]]], unable: set[str], pads: bool
) -> None:
    queue: StepQueue[Job] = StepQueue(MOST_JOINT)
    queue.pads = pads
    model = Model(unable, pads)
    number = 0
    while told or model.lines:
        for key, shape in told.pop(0) if told else ():
            number += 1
            job = Job(key, shape, number)
            queue.add(job)
            model.lines.setdefault(key, []).append(job)
        assert len(queue) == sum(map(len, model.lines.values()))
        kinds = model.looked_at()
        taken = queue.take(lambda job: job.key not in unable)
        assert bool(taken) == bool(kinds)
        if taken:
            check_pass(model, taken, kinds)
    assert not queue.take()


def test_a_client_that_floods_takes_no_more_than_every_second_turn() -> None:
    """Twenty sessions that always have a prompt waiting, beside one session of another client."""
    queue: StepQueue[Job] = StepQueue(MOST_JOINT)
    starts = {**{f"a{number}": 0 for number in range(20)}, "b0": 0}
    for key in starts:
        queue.add(Job(key, Shape(0, MOST_RUN, "plain", MOST_RUN), 0))
    order = []
    for _ in range(400):
        (job,) = queue.take()
        starts[job.key] += MOST_RUN
        queue.add(Job(job.key, Shape(starts[job.key], MOST_RUN, "plain", MOST_RUN), 0))
        order.append(job.key)
    assert order[1::2] == ["b0"] * 200
    assert {order.count(f"a{number}") for number in range(20)} == {10}
