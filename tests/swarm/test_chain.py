from collections import deque
from random import Random

import pytest
from chain_builders import entry, payload
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.chain import CREDIT_PIECE, FIRST_CREDIT, Entry, History, Inlet, Outlet, step_of
from swarm.messages import payload_bytes
from swarm.wire import DEFAULT_LIMITS


def history(*starts: int) -> History:
    made = History()
    for serial, start in enumerate(starts, 1):
        made.append(entry(serial, start))
    return made


def serials(made: History, after: int = 0) -> list[int]:
    return [entry.serial for entry in made.after(after)]


@pytest.mark.parametrize(
    ("starts", "left"),
    [
        ((0, 4, 8), [1, 2, 3]),
        ((0, 4, 8, 8), [1, 2, 4]),
        ((0, 4, 8, 6), [1, 2, 4]),  # 2 straddles 6 and stays whole
        ((0, 4, 8, 4), [1, 4]),
        ((0, 4, 8, 0), [4]),
        ((0, 4, 4, 4, 5), [1, 4, 5]),
    ],
)
def test_a_step_removes_what_it_rolls_back(starts: tuple[int, ...], left: list[int]) -> None:
    made = history(*starts)
    assert serials(made) == left
    assert made.byte_count == sum(payload_bytes(e.payload) for e in made.entries)


def test_resuming_gives_what_comes_after_a_serial_trimmed_or_not() -> None:
    made = history(0, 4, 8, 4, 5)
    assert [serials(made, after) for after in range(6)] == [
        [1, 4, 5], [4, 5], [4, 5], [4, 5], [5], []
    ]  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(1, 4)), max_size=12), st.integers(0, 12))
def test_any_prefix_of_a_history_can_be_resumed(steps: list[tuple[int, int]], have: int) -> None:
    made, lengths = History(), [0]
    for serial, (wish, length) in enumerate(steps, 1):
        start = min(wish, lengths[-1])
        made.append(Entry(serial, start, payload(length), "none"))
        lengths.append(start + length)
    have = min(have, len(steps))
    length = lengths[have]
    for resumed in made.after(have):
        assert resumed.start <= length, "a gap"
        length = resumed.start + resumed.payload["ids"].shape[1]
    assert length == lengths[-1]


def test_a_step_carries_all_of_an_entry() -> None:
    made = step_of(entry(4, 7), after=2)
    assert (made.serial, made.after, made.start, made.wanted) == (4, 2, 7, "last")
    assert made.payload == entry(4, 7).payload


def test_an_unknown_receiver_is_sent_nothing() -> None:
    outlet = Outlet(1, 1, is_known=False)
    assert list(outlet.ready(history(0, 1))) == []


def test_nothing_is_sent_twice_on_one_link() -> None:
    outlet, made = Outlet(1, 1), history(0, 1)
    assert [e.serial for e in outlet.ready(made)] == [1, 2]
    assert list(outlet.ready(made)) == []
    made.append(entry(3, 2))
    assert [e.serial for e in outlet.ready(made)] == [3]


def test_more_than_the_credit_waits_until_some_comes_back() -> None:
    outlet, made = Outlet(1, 1), History()
    for serial in range(1, 6):
        made.append(entry(serial, serial, FIRST_CREDIT // 2 - 1))
    assert [e.serial for e in outlet.ready(made)] == [1, 2]
    outlet.refill(FIRST_CREDIT // 4)
    assert list(outlet.ready(made)) == []
    outlet.refill(FIRST_CREDIT // 4)
    assert [e.serial for e in outlet.ready(made)] == [3]


def test_credit_that_nobody_owes_is_not_counted() -> None:
    outlet = Outlet(1, 1)
    outlet.refill(10**12)
    assert outlet.credit == FIRST_CREDIT


def test_credit_comes_back_in_pieces() -> None:
    inlet = Inlet()
    for _ in range(3):
        inlet.arrive(CREDIT_PIECE // 2)
    assert inlet.done(CREDIT_PIECE // 2) == []
    (credit,) = inlet.done(CREDIT_PIECE // 2)
    assert credit.more == CREDIT_PIECE // 2 * 2
    assert inlet.done(CREDIT_PIECE // 2) == []


sizes = st.sampled_from(
    [
        DEFAULT_LIMITS.frame_bytes,
        0,
        1,
        CREDIT_PIECE - 1,
        CREDIT_PIECE,
        CREDIT_PIECE + 1,
        FIRST_CREDIT - 1,
        FIRST_CREDIT,
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(sizes, max_size=20), st.randoms(use_true_random=False))
def test_credit_is_never_exceeded_and_everything_arrives(
    lengths: list[int], random: Random
) -> None:
    outlet, inlet = Outlet(1, 1), Inlet()
    way: deque[int] = deque()
    arrived = sent = 0
    lacking, waiting, back = deque(lengths), deque[int](), deque[int]()
    while True:
        while lacking and outlet.takes(lacking[0]):
            size = lacking.popleft()
            sent += 1
            outlet.spend(sent, size)
            way.append(size)
        queues = [queue for queue in (way, waiting, back) if queue]
        if not queues:
            break
        queue = random.choice(queues)
        if queue is way:
            waiting.append(way.popleft())
            inlet.arrive(waiting[-1])
            assert inlet.is_within_credit
        elif queue is waiting:
            back.extend(credit.more for credit in inlet.done(waiting.popleft()))
            arrived += 1
        else:
            outlet.refill(back.popleft())
    assert arrived == len(lengths), "the credit ran dry"
