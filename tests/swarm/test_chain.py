from collections import deque
from random import Random

import pytest
from chain_builders import entry, payload
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.chain import (
    CREDIT_PIECE,
    EARLY_CREDIT,
    FIRST_CREDIT,
    STEP_BYTES,
    Entry,
    History,
    Inlet,
    Outlet,
    fair_window,
    step_of,
)
from swarm.messages import Credit, Ready, payload_bytes
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
    outlet, made = Outlet(1, 1, window=FIRST_CREDIT, step_bytes=0), History()
    for serial in range(1, 6):
        made.append(entry(serial, serial, FIRST_CREDIT // 2 - 1))
    assert [e.serial for e in outlet.ready(made)] == [1, 2]
    outlet.refill(Credit(more=FIRST_CREDIT // 4))
    assert list(outlet.ready(made)) == []
    outlet.refill(Credit(more=FIRST_CREDIT // 4))
    assert [e.serial for e in outlet.ready(made)] == [3]


def test_credit_that_nobody_owes_is_not_counted() -> None:
    outlet = Outlet(1, 1)
    outlet.refill(Credit(more=10**12))
    assert outlet.outstanding == 0
    outlet.refill(Credit(more=0, window=10**12))
    assert outlet.window == FIRST_CREDIT


def test_a_window_is_never_too_narrow_for_a_sender_to_go_on() -> None:
    outlet = Outlet(1, 1)
    outlet.refill(Credit(more=0, window=1))
    assert outlet.window == EARLY_CREDIT
    assert outlet.takes(DEFAULT_LIMITS.frame_bytes)


def test_a_narrower_window_is_heeded_at_once_and_a_wider_one_too() -> None:
    outlet, made = Outlet(1, 1, window=FIRST_CREDIT, step_bytes=0), History()
    for serial in range(1, 30):
        made.append(entry(serial, serial, EARLY_CREDIT))
    assert len(list(outlet.ready(made))) == 16
    outlet.refill(Credit(more=4 * EARLY_CREDIT, window=8 * EARLY_CREDIT))
    assert list(outlet.ready(made)) == [], "twelve are outstanding"
    outlet.refill(Credit(more=5 * EARLY_CREDIT))
    assert len(list(outlet.ready(made))) == 1
    outlet.refill(Credit(more=0, window=FIRST_CREDIT))
    assert len(list(outlet.ready(made))) == 8


def test_a_receiver_of_an_older_program_tells_no_window_and_takes_the_first_credit() -> None:
    outlet = Outlet(1, 1)
    outlet.spend(1, 100)
    outlet.is_ready(Ready(have=0))
    assert outlet.window == FIRST_CREDIT
    assert outlet.outstanding == 100, "it will give back payloads only"
    outlet.spend(2, 50)
    assert outlet.outstanding == 150


def test_a_sender_of_an_older_program_is_told_no_other_window() -> None:
    inlet = Inlet(is_fixed=True)
    inlet.arrive(FIRST_CREDIT)
    assert inlet.done(FIRST_CREDIT, EARLY_CREDIT) == [Credit(more=FIRST_CREDIT)]
    assert inlet.narrow(EARLY_CREDIT) == []


def test_windows_share_half_of_the_room_fairly_and_none_is_without() -> None:
    room = 256 << 20
    for links in (1, 2, 3, 8, 9, 32, 33, 128):
        assert links * fair_window(room, links) <= room // 2 or links > 128
    assert fair_window(room, 1) == FIRST_CREDIT
    assert fair_window(room, 32) == 4 << 20
    assert fair_window(room, 10**6) == fair_window(0, 1) == EARLY_CREDIT


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


windows = st.sampled_from([EARLY_CREDIT, 2 * EARLY_CREDIT, FIRST_CREDIT // 2, FIRST_CREDIT])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.lists(sizes, max_size=20),
    st.lists(windows, min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_credit_is_never_exceeded_and_everything_arrives(
    lengths: list[int], told: list[int], random: Random
) -> None:
    """Whatever windows the receiver tells in between, and however late that is heard."""
    outlet, inlet = Outlet(1, 1), Inlet(window=told[0])
    way: deque[int] = deque()
    arrived = sent = changes = 0
    lacking, waiting = deque(lengths), deque[int]()
    back = deque[Ready | Credit]([Ready(have=0, window=told[0])])
    while True:
        while lacking and outlet.takes(lacking[0]):
            size = lacking.popleft()
            sent += 1
            outlet.spend(sent, size)
            way.append(size + STEP_BYTES)
        queues: list[deque[int] | deque[Ready | Credit]] = [q for q in (way, waiting, back) if q]
        if not queues:
            break
        queue = random.choice(queues)
        if random.random() < 0.2 and changes < len(told):
            changes += 1
            back.extend(inlet.narrow(told[changes - 1]))
        elif queue is way:
            waiting.append(way.popleft())
            inlet.arrive(waiting[-1])
            assert inlet.is_within_credit
        elif queue is waiting:
            back.extend(inlet.done(waiting.popleft(), told[changes % len(told)]))
            arrived += 1
        else:
            message = back.popleft()
            if isinstance(message, Ready):
                outlet.is_ready(message)
                outlet.sent = sent
            else:
                outlet.refill(message)
    assert arrived == len(lengths), "the credit ran dry"
    assert outlet.window == inlet.window
