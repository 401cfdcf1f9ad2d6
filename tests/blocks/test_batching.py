"""What is computed next: legs take turns, and steps that follow each other share a pass."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.batching import Shape, StepQueue


@dataclass(frozen=True)
class Job:
    key: str
    shape: Shape | None
    number: int = 0


def step(key: str, start: int, positions: int = 1, kind: str = "plain", number: int = 0) -> Job:
    return Job(key, Shape(start, positions, kind), number)


def taken(*jobs: Job, most: int = 4) -> list[list[Job]]:
    queue: StepQueue[Job] = StepQueue(most)
    for job in jobs:
        queue.add(job)
    passes = []
    while len(queue):
        passes.append(queue.take())
    assert queue.take() == []
    return passes


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


def test_a_pass_without_room_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one"):
        StepQueue(0)


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
