"""How much may be outstanding on each link of a hop, as sessions come and go."""

import msgspec
from chain_builders import Desk, said, step
from chain_builders import route as one_route

from swarm.chain import CREDIT_PIECE, EARLY_CREDIT, FIRST_CREDIT, STEP_BYTES
from swarm.leg import Compute, Forget
from swarm.legs import Legs
from swarm.messages import Close, Credit, Fault, Message, Open, Ready

ROOM = 64 << 20  # so three links have less than all credit


def route(number: int, window: int = EARLY_CREDIT) -> Open:
    """An Open of a session of its own."""
    opened = one_route(1, "here", "next", session=bytes([number]) * 16, window=window)
    return msgspec.structs.replace(opened, max_tokens=1 << 20)


def crowded(count: int, room: int = ROOM) -> tuple[Desk, list[object]]:
    """A hop with so many sessions, on links from 1; and what it said to each as they came."""
    desk, actions = Desk(), []
    desk.legs = Legs(lambda opened: None, desk.legs._new_link, room)
    for link in range(1, count + 1):
        actions += desk.legs.opened(link, route(link))
    return desk, actions


def windows(messages: list[Message]) -> list[int]:
    return [m.window for m in messages if isinstance(m, Ready | Credit) and m.window]


def test_the_first_is_told_a_wide_window_and_a_narrower_one_as_others_come() -> None:
    _, actions = crowded(32)
    assert windows(said(actions, 1)) == [FIRST_CREDIT >> n for n in range(5)]
    assert windows(said(actions, 32)) == [EARLY_CREDIT]


def test_windows_come_to_half_of_the_room_at_most_as_long_as_they_can() -> None:
    for count in range(1, 33):
        _, actions = crowded(count)
        newest = [windows(said(actions, link))[-1] for link in range(1, count + 1)]
        assert sum(newest) <= ROOM // 2


def test_a_newcomer_costs_no_message_where_the_windows_stay() -> None:
    desk, _ = crowded(5)
    actions = desk.legs.opened(6, route(6))
    assert [said(actions, link) for link in range(1, 6)] == [[]] * 5


def test_when_most_have_gone_windows_are_wider_with_the_next_credit() -> None:
    desk, _ = crowded(32)
    for link in range(2, 33):
        assert windows(said(desk.legs.received(link, Close()), 1)) == []
    arrived = desk.legs.received(1, step(1, 0, size=EARLY_CREDIT // 4))
    (credit,) = said(desk.compute(arrived), 1)
    assert isinstance(credit, Credit)
    assert credit.window == FIRST_CREDIT
    assert credit.more == EARLY_CREDIT // 4 + STEP_BYTES


def test_one_that_comes_and_goes_does_not_make_windows_flap() -> None:
    desk, _ = crowded(3)
    told = []
    for link in range(4, 14):
        told += said(desk.legs.opened(link, route(link)), 1)
        told += said(desk.legs.received(link, Close()), 1)
    assert told == []


def test_a_session_of_an_older_program_keeps_its_window() -> None:
    desk, _ = crowded(0)
    told = said(desk.legs.opened(1, route(1, window=0)), 1)
    for link in range(2, 33):
        told += said(desk.legs.opened(link, route(link)), 1)
    assert told == [Ready(have=0)]
    arrived = desk.legs.received(1, step(1, 0, size=CREDIT_PIECE))
    assert said(desk.compute(arrived), 1) == [Credit(more=CREDIT_PIECE)]


def test_what_goes_beyond_the_room_is_dropped_and_its_session_asked_to_come_back() -> None:
    size = ROOM // 2 + 1
    desk, _ = crowded(2)
    assert [type(a) for a in desk.legs.received(1, step(1, 0, size=size))] == [Compute]
    actions = desk.legs.received(2, step(1, 0, size=size))
    assert [a.leg for a in actions if isinstance(a, Forget)] == [2]
    (fault,) = [m for m in said(actions, 2) if isinstance(m, Fault)]
    assert fault.failure == "evicted"
    assert fault.retry_seconds > 0
    assert desk.legs.waiting_bytes == size + STEP_BYTES


def test_who_is_alone_may_send_whatever_a_frame_holds() -> None:
    desk, _ = crowded(2, room=1)
    actions = desk.legs.received(1, step(1, 0, size=ROOM // 4))
    assert [type(a) for a in actions] == [Compute]
