"""What is computed next: legs take turns, and what can share a pass shares one."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.batching import SPARE_PLACES, Shape, StepQueue


@dataclass(frozen=True)
class Job:
    key: str
    shape: Shape | None
    number: int = 0


def step(key: str, start: int, positions: int = 1, kind: str = "plain", number: int = 0) -> Job:
    return Job(key, Shape(start, positions, kind), number)


def decode(key: str, start: int = 5, kind: str = "plain", number: int = 0) -> Job:
    return Job(key, Shape(start, 1, kind, is_decode=True), number)


def taken(
    *jobs: Job, most: int = 4, joint: int = 1, can_join: Callable[[Job], bool] | None = None
) -> list[list[Job]]:
    queue: StepQueue[Job] = StepQueue(most, joint)
    for job in jobs:
        queue.add(job)
    passes = []
    while len(queue):
        passes.append(queue.take(can_join))
    assert queue.take(can_join) == []
    return passes


def joined(*jobs: Job, joint: int = 3) -> list[list[Job]]:
    """The passes of jobs whose legs can all join."""
    return taken(*jobs, joint=joint, can_join=lambda job: True)


def test_steps_of_a_leg_that_follow_each_other_share_a_pass() -> None:
    replay = [step("a", start) for start in range(6)]
    assert taken(*replay) == [replay[:4], replay[4:]]


@pytest.mark.parametrize(
    "second",
    [
        step("a", 5),  # a gap
        step("a", 2),  # a rollback
        step("a", 3, kind="other"),
        step("a", 3, positions=4),  # no room
        Job("a", None),  # a leg to be freed
    ],
)
def test_what_does_not_go_on_has_a_pass_of_its_own(second: Job) -> None:
    first = step("a", 2)
    assert taken(first, second) == [[first], [second]]


def test_a_step_larger_than_a_pass_goes_alone() -> None:
    large = step("a", 0, positions=9)
    assert taken(large, step("a", 9)) == [[large], [step("a", 9)]]


def test_legs_take_turns() -> None:
    replay = [step("a", start) for start in range(8)]
    decode = step("b", 70)
    assert taken(*replay, decode) == [replay[:4], [decode], replay[4:]]


@pytest.mark.parametrize("most", [(0, 1), (1, 0)])
def test_a_pass_without_room_cannot_be(most: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        StepQueue(*most)


def test_a_decode_step_has_one_position() -> None:
    with pytest.raises(ValueError, match="has one position, not 2"):
        Shape(0, 2, "plain", is_decode=True)


def test_decode_steps_of_several_legs_share_a_pass_in_the_order_of_their_turns() -> None:
    jobs = [decode("a", 9), decode("b", 4), decode("c", 70), decode("d", 1)]
    assert joined(*jobs) == [jobs[:3], jobs[3:]]


def test_decode_steps_of_another_kind_have_a_pass_of_their_own() -> None:
    a, b, c, d = decode("a"), decode("b", kind="other"), decode("c"), decode("d", kind="other")
    assert joined(a, b, c, d) == [[a, c], [b, d]]


def test_a_leg_that_cannot_join_has_its_turn_alone() -> None:
    jobs = [decode("a"), decode("b"), decode("c")]
    passes = taken(*jobs, joint=3, can_join=lambda job: job.key != "b")
    assert passes == [[jobs[0], jobs[2]], [jobs[1]]]


def test_a_leg_with_several_steps_that_follow_each_other_runs_them_itself() -> None:
    replay = [decode("r", start) for start in range(6)]
    a, b = decode("a"), decode("b")
    assert joined(*replay, a, b) == [[a, b], replay[:4], replay[4:]]


def test_replays_and_decode_steps_take_turns_however_many_legs_replay() -> None:
    first, second = ([step(key, start) for start in range(8)] for key in "rs")
    decodes = [decode(key) for key in "abcdef"]
    assert joined(*first, *second, *decodes, joint=2) == [
        decodes[:2],
        first[:4],
        decodes[2:4],
        second[:4],
        decodes[4:],
        first[4:],
        second[4:],
    ]


def test_a_leg_gives_one_step_to_a_joint_pass_even_if_more_wait() -> None:
    first, again, other = decode("a", 5), decode("a", 3), decode("b")
    assert joined(first, again, other) == [[first, other], [again]]


def test_a_long_past_does_not_pad_many_short_ones() -> None:
    far = decode("far", 4 * SPARE_PLACES)
    short = [decode(key, 9) for key in "abc"]
    assert joined(short[0], far, *short[1:], joint=8) == [[short[0], far], short[1:]]
    assert joined(far, *short, joint=8) == [[far, short[0]], short[1:]]
    assert joined(*short, far, joint=8) == [short, [far]]
    alike = [decode(key, 4 * SPARE_PLACES + place) for place, key in enumerate("abc")]
    assert joined(*alike, joint=8) == [alike]


def test_little_padding_is_always_allowed() -> None:
    jobs = [decode("far", SPARE_PLACES // 8), *(decode(key, 1) for key in "abcdefg")]
    assert joined(*jobs, joint=8) == [jobs]


def test_what_is_cleared_is_gone() -> None:
    queue: StepQueue[Job] = StepQueue(4)
    queue.add(step("a", 0))
    queue.clear()
    assert queue.take() == []


jobs = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 6), st.integers(1, 3), st.sampled_from("xy"))
)


@given(jobs)
def test_each_job_leaves_once_and_in_the_order_of_its_leg(
    told: list[tuple[str, int, int, str]],
) -> None:
    waiting = [step(*each, number=number) for number, each in enumerate(told)]
    passes = taken(*waiting)
    left = [job for each in passes for job in each]
    assert sorted(job.number for job in left) == list(range(len(waiting)))
    for key in "abc":
        numbers = [job.number for job in left if job.key == key]
        assert numbers == sorted(numbers)
    for each in passes:
        assert len({job.key for job in each}) == 1
        sizes = [job.shape.positions for job in each if job.shape]
        assert len(each) == 1 or sum(sizes) <= 4


waiting_jobs = st.lists(
    st.builds(
        lambda key, start, kind, is_decode: (
            decode(key, start, kind) if is_decode else step(key, start, 2, kind)
        ),
        st.sampled_from("abcde"),
        st.integers(0, 6),
        st.sampled_from("xy"),
        st.booleans(),
    )
)


@given(st.lists(st.tuples(waiting_jobs, st.integers(0, 4))), st.sets(st.sampled_from("abcde")))
def test_with_joint_passes_too_each_job_leaves_once_and_in_the_order_of_its_leg(
    rounds: list[tuple[list[Job], int]], able: set[str]
) -> None:
    queue: StepQueue[Job] = StepQueue(4, 3)
    told: dict[str, list[Job]] = {key: [] for key in "abcde"}
    left: dict[str, list[Job]] = {key: [] for key in "abcde"}

    def take() -> None:
        passed = queue.take(lambda job: job.key in able)
        for job in passed:
            left[job.key].append(job)
        if len({job.key for job in passed}) > 1:
            assert len({job.key for job in passed}) == len(passed) <= 3
            assert {job.key for job in passed} <= able
            assert all(job.shape is not None and job.shape.is_decode for job in passed)
            assert len({job.shape.kind for job in passed if job.shape is not None}) == 1

    for jobs, takes in rounds:
        for job in jobs:
            queue.add(job)
            told[job.key].append(job)
        for _ in range(takes):
            take()
    while len(queue):
        take()
    assert left == told


@given(waiting_jobs, st.sets(st.sampled_from("abcde")))
def test_kinds_of_passes_take_turns_and_so_do_legs(jobs: list[Job], able: set[str]) -> None:
    lines: dict[str, list[Job]] = {}
    for job in jobs:
        lines.setdefault(job.key, []).append(job)
    passes = taken(*jobs, joint=3, can_join=lambda job: job.key in able)
    last: str | None = None
    for each in passes:
        waiting = {kind_of(line, able) for line in lines.values() if line}
        kind = kind_of(lines[each[0].key], able)
        assert kind != last or waiting == {kind}
        last = kind
        for job in each:
            assert lines[job.key].pop(0) is job
    for key in lines:
        turns = [place for place, each in enumerate(passes) if key in {job.key for job in each}]
        gaps = [after - before for before, after in zip([-1, *turns], turns, strict=False)]
        assert max(gaps) <= 2 * len(lines)  # each of the others first, each behind another kind


def kind_of(line: list[Job], able: set[str]) -> str | None:
    """The kind of joint pass that a line's first step asks for, None if it begins a run."""
    first = line[0].shape
    assert first is not None
    after = line[1].shape if len(line) > 1 else None
    if not first.is_decode or line[0].key not in able or (after and after.follows(first)):
        return None
    return str(first.kind)
