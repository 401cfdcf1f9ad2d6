"""What is computed next: legs share passes, and kinds of passes take turns."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from blocks.batching import MOST_PASSED_OVER, SPARE_PLACES, Service, Shape, StepQueue


@dataclass(frozen=True)
class Job:
    key: str
    shape: Shape | None
    number: int = 0
    client: str = ""


def step(
    key: str,
    start: int,
    positions: int = 1,
    kind: str | None = "plain",
    *,
    most: int = 4,
    service: Service = Service.FILL,
    client: str = "",
) -> Job:
    return Job(key, Shape(start, positions, kind, most, service=service), client=client or key)


def decode(key: str, start: int = 5, *, most: int = 8, client: str = "") -> Job:
    shape = Shape(start, 1, "plain", most, is_decode=True, service=Service.DECODE)
    return Job(key, shape, client=client or key)


def verify(key: str, start: int = 5) -> Job:
    return step(key, start, 3, service=Service.DECODE)


def taken(
    *jobs: Job, joint: int = 1, can_join: Callable[[Job], bool] | None = None
) -> list[list[Job]]:
    queue: StepQueue[Job] = StepQueue(joint)
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
        Job("a", None),  # an errand
    ],
)
def test_what_does_not_go_on_has_a_pass_of_its_own(second: Job) -> None:
    first = step("a", 2)
    assert taken(first, second) == [[first], [second]]


def test_steps_of_no_kind_have_passes_of_their_own() -> None:
    padded = [step("a", start, kind=None) for start in range(2)]
    assert taken(*padded) == [[padded[0]], [padded[1]]]


def test_a_step_larger_than_a_pass_goes_alone() -> None:
    large = step("a", 0, positions=9)
    assert taken(large, step("a", 9)) == [[large], [step("a", 9)]]


def test_legs_take_turns() -> None:
    replay = [step("a", start) for start in range(8)]
    other = step("b", 70)
    assert taken(*replay, other) == [replay[:4], [other], replay[4:]]


def test_a_client_of_many_legs_has_no_more_turns_than_one_of_one() -> None:
    many = [step(key, 0, 4, client="many") for key in "abc"]
    one = [step("z", start, 4) for start in (0, 4, 8)]
    passes = taken(*many, *one)
    assert passes == [[many[0]], [one[0]], [many[1]], [one[1]], [many[2]], [one[2]]]


def test_a_pass_without_room_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one"):
        StepQueue(0)
    with pytest.raises(ValueError, match="at least one"):
        Shape(0, 1, "plain", 0)


def test_a_decode_step_has_one_position() -> None:
    with pytest.raises(ValueError, match="has one position, not 2"):
        Shape(0, 2, "plain", 4, is_decode=True)


def test_decode_steps_of_several_legs_share_a_pass_in_the_order_of_their_turns() -> None:
    jobs = [decode("a", 9), decode("b", 4), decode("c", 70), decode("d", 1)]
    assert joined(*jobs) == [jobs[:3], jobs[3:]]


def test_a_joint_pass_takes_one_step_of_each_client_before_a_second_of_any() -> None:
    many = [decode(key, client="many") for key in "abcde"]
    one, other = decode("y"), decode("z")
    assert joined(*many, one, other, joint=4) == [
        [many[0], one, other, many[1]],
        many[2:],
    ]


def test_a_leg_that_cannot_join_has_its_turn_alone() -> None:
    jobs = [decode("a"), decode("b"), decode("c")]
    passes = taken(*jobs, joint=3, can_join=lambda job: job.key != "b")
    assert passes == [[jobs[0], jobs[2]], [jobs[1]]]


def test_joint_passes_have_no_more_legs_than_a_step_in_them_allows() -> None:
    jobs = [decode("a"), decode("b"), decode("c", most=2), decode("d")]
    assert joined(*jobs, joint=4) == [[jobs[0], jobs[1], jobs[3]], [jobs[2]]]


def test_a_leg_with_several_steps_that_follow_each_other_runs_them_itself() -> None:
    replay = [
        Job("r", Shape(start, 1, "plain", 4, is_decode=True, service=Service.DECODE))
        for start in range(6)
    ]
    a, b = decode("a"), decode("b")
    assert joined(*replay, a, b) == [[a, b], replay[:4], replay[4:]]


def test_a_decode_step_becomes_a_replay_when_another_goes_on_from_it() -> None:
    queue: StepQueue[Job] = StepQueue(3)
    first, other = [decode("a", 5), decode("b")]
    fill = step("c", 0, 4)
    for job in (fill, first):
        queue.add(job)
    assert queue.take(lambda job: True) == [first]
    queue.add(decode("a", 6))
    queue.add(other)
    assert queue.take(lambda job: True) == [fill]
    queue.add(decode("a", 7))
    assert queue.take(lambda job: True) == [other]
    assert queue.take(lambda job: True) == [decode("a", 6), decode("a", 7)]


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


def test_short_steps_wait_for_one_fill_at_most_however_many_fill() -> None:
    fills = [step(key, 0, 4) for key in "rst"]
    shorts = [verify("a"), verify("b")]
    a, b, c = fills
    assert taken(*fills, *shorts) == [[shorts[0]], [a], [shorts[1]], [b], [c]]


def test_training_waits_until_nothing_else_does() -> None:
    train = step("t", 0, 4, service=Service.TRAIN)
    a, b, c = step("a", 0, 4), decode("b"), verify("c")
    assert joined(train, a, b, c) == [[b], [c], [a], [train]]


def test_training_does_not_wait_for_ever() -> None:
    queue: StepQueue[Job] = StepQueue(1)
    train = step("t", 0, 4, service=Service.TRAIN)
    queue.add(train)
    for number in range(MOST_PASSED_OVER):
        other = step("a", 4 * number, 4)
        queue.add(other)
        assert queue.take() == [other]
    queue.add(step("a", 4 * MOST_PASSED_OVER, 4))
    assert queue.take() == [train]


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


def test_an_errand_takes_nobodys_turn_but_waits_for_its_legs_steps() -> None:
    a, b, errand, late = step("a", 0, 4), step("b", 0, 4), Job("c", None), Job("b", None)
    assert taken(a, b, errand, late) == [[errand], [a], [b], [late]]


def test_what_waits_of_a_leg_may_be_changed_or_taken_out() -> None:
    queue: StepQueue[Job] = StepQueue(1)
    jobs = [step("a", start, 4) for start in (0, 4, 8)]
    for job in (*jobs, step("b", 0, 4)):
        queue.add(job)
    assert queue.take() == jobs[:1]
    errand = Job("a", None)
    queue.change("a", lambda job: None if job == jobs[1] else errand)
    queue.change("nobody", lambda job: None)
    assert len(queue) == 2
    assert queue.take() == [errand]
    assert queue.take() == [step("b", 0, 4)]
    queue.add(jobs[0])
    queue.change("a", lambda job: None)
    assert (len(queue), queue.take()) == (0, [])


def test_what_is_cleared_is_gone() -> None:
    queue: StepQueue[Job] = StepQueue()
    queue.add(step("a", 0))
    queue.clear()
    assert queue.take() == []
    queue.add(step("b", 0))
    assert queue.take() == [step("b", 0)]
