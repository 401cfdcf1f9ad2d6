import msgspec
import pytest
from chain_builders import KEPT, TIME, Desk, attach, payload, ready, route, said, serials, step

from swarm.chain import CREDIT_PIECE, EARLY_CREDIT, FIRST_CREDIT, STEP_BYTES, Dial, Shut
from swarm.leg import Compute, Forget, Grace
from swarm.messages import (
    Close,
    Credit,
    Fault,
    Gone,
    Message,
    Open,
    Output,
    Ready,
    Refused,
    Step,
)


def middle() -> Desk:
    """A first hop of two: up stream 1, down stream 101."""
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    return desk


def last() -> Desk:
    """A last hop: up stream 1, downlink 2."""
    desk = Desk()
    desk.legs.opened(1, route(1, "before", "here", at=1))
    desk.legs.attached(2, "me", attach(1, "1:2"))
    return desk


def faults(messages: list[Message]) -> list[tuple[str, str, str, int]]:
    return [(m.failure, m.peer, m.span, m.epoch) for m in messages if isinstance(m, Fault)]


def test_a_step_is_computed_once_and_sent_on() -> None:
    desk = middle()
    actions = desk.legs.received(1, step(1, 0, length=3))
    (compute,) = [a for a in actions if isinstance(a, Compute)]
    assert compute.step.serial == 1
    assert said(desk.compute(actions), 101) == [
        Step(serial=1, after=0, start=0, wanted="last", times=(TIME,), payload=payload(3))
    ]
    assert desk.legs.received(1, step(1, 0, length=3)) == []


def test_a_step_is_sent_on_with_the_length_of_its_text() -> None:
    desk = middle()
    one = Step(serial=1, after=0, start=0, sequence_length=9, payload=payload(3))
    actions = desk.legs.received(1, one)
    (compute,) = [a for a in actions if isinstance(a, Compute)]
    (sent,) = said(desk.compute(actions), 101)
    assert isinstance(sent, Step)
    assert (compute.step.sequence_length, sent.sequence_length) == (9, 9)


def test_a_text_longer_than_the_session_breaks_the_senders_word() -> None:
    desk = middle()
    one = Step(serial=1, after=0, start=0, sequence_length=1 << 40, payload=payload(3))
    (fault,) = [m for m in said(desk.legs.received(1, one), 1) if isinstance(m, Fault)]
    assert fault.failure == "broke_word"


def test_each_hop_adds_its_time() -> None:
    desk = middle()
    one = Step(serial=1, after=0, start=0, times=(TIME,), payload=payload())
    (sent,) = said(desk.compute(desk.legs.received(1, one)), 101)
    assert isinstance(sent, Step)
    assert sent.times == (TIME, TIME)


@pytest.mark.parametrize(
    "bad",
    [
        step(3, 3),
        step(2, 4, after=1),
        step(2, 1, length=0),
        step(2, 62, length=3),
    ],
    ids=["a gap in the serials", "a start above the length", "no positions", "beyond max_tokens"],
)
def test_a_step_that_cannot_follow_is_the_fault_of_the_hop_before(bad: Step) -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "before", "here", "next", at=1))
    desk.legs.received(1, step(1, 0, length=63 if bad.start == 62 else 3))
    actions = desk.legs.received(1, bad)
    assert not [a for a in actions if isinstance(a, Compute)]
    assert faults(said(actions, 1)) == [("broke_word", "before", "0:1", 1)]
    assert desk.leg.admitted == 1


def test_a_rollback_lets_go_of_what_it_rolls_back() -> None:
    desk = middle()
    for made in (step(1, 0, length=4), step(2, 4, length=3), step(3, 5)):
        desk.compute(desk.legs.received(1, made))
    assert desk.leg.length == 6
    assert [e.serial for e in desk.leg.history.entries] == [1, 2, 3]
    desk.compute(desk.legs.received(1, step(4, 4)))
    assert [e.serial for e in desk.leg.history.entries] == [1, 4]


def test_hole_1_a_short_step_after_a_rollback_reaches_a_hop_that_is_longer() -> None:
    """Verify [8..11) gave one token; the next step is [9..10); the link broke under it."""
    first = middle()
    sent: list[Message] = []
    for made in (step(1, 0, length=8), step(2, 8, length=3, wanted="all")):
        sent += said(first.compute(first.legs.received(1, made)), 101)
    second = last()
    for message in sent:
        second.compute(second.legs.received(1, message))
    second.legs.ended(1, "closed", "")
    first.legs.ended(101, "closed", "")
    first.compute(first.legs.received(1, step(3, 9)))

    (dial,) = [a for a in first.legs.received(1, route(2, *KEPT)) if isinstance(a, Dial)]
    assert isinstance(dial.first, Open)
    assert second.leg.length == 11
    assert said(second.legs.opened(3, dial.first), 3) == [ready(2)]
    again = said(first.legs.received(dial.link, Ready(have=2)), dial.link)
    assert [(m.serial, m.after, m.start) for m in again if isinstance(m, Step)] == [(3, 2, 9)]
    outputs = said(second.compute(second.legs.received(3, again[0])), 2)
    assert [m.serial for m in outputs if isinstance(m, Output)] == [3]
    assert second.leg.length == 10


def test_a_lost_up_stream_frees_nothing() -> None:
    desk = middle()
    waiting = desk.legs.received(1, step(1, 0))
    number = desk.leg.number
    assert desk.legs.ended(1, "closed", "") == [Grace(number, is_running=True)]
    assert serials(said(desk.compute(waiting), 101)) == [1]
    reopened = desk.legs.opened(2, route(2, ("here", "0:1", "keep"), ("next", "1:2", "keep")))
    assert Grace(number, is_running=False) in reopened
    assert said(reopened, 2) == [ready(1)]


def test_nothing_is_sent_beyond_the_credit_of_the_next_hop() -> None:
    desk, size = middle(), FIRST_CREDIT // 2 - STEP_BYTES
    desk.legs.received(101, ready(0))
    sent = []
    for serial in range(1, 5):
        arrived = desk.legs.received(1, step(serial, serial - 1))
        sent += said(desk.compute(arrived, size=size), 101)
    assert serials(sent) == [1, 2]
    assert serials(said(desk.legs.received(101, Credit(more=size + STEP_BYTES)), 101)) == [3]


def test_before_its_ready_a_next_hop_is_sent_little_more_than_one_payload() -> None:
    desk, sent = middle(), []
    for serial in range(1, 4):
        arrived = desk.legs.received(1, step(serial, serial - 1))
        sent += said(desk.compute(arrived, size=EARLY_CREDIT - STEP_BYTES), 101)
    assert serials(sent) == [1]
    told = desk.legs.received(101, Ready(have=0, window=2 * EARLY_CREDIT))
    assert serials(said(told, 101)) == [2]


def test_no_more_is_computed_ahead_of_the_next_hop_than_a_window_holds() -> None:
    """Else a slow hop behind a fast one would have the whole of every prompt wait before it."""
    desk = Desk()
    desk.legs.opened(1, msgspec.structs.replace(route(1, "here", "next"), max_tokens=1 << 20))
    chunk, each = 256, 16 << 10  # 4 MiB of hidden states of each chunk of ids
    prompt = [step(n, chunk * (n - 1), length=chunk) for n in range(1, 13)]
    waiting = [action for made in prompt for action in desk.legs.received(1, made)]
    computed: list[int] = []
    while waiting:
        computed += [a.step.serial for a in waiting if isinstance(a, Compute)]
        waiting = desk.compute(waiting, size=each)
    assert computed == [1, 2, 3, 4, 5], "the first is sent, four fill a window"
    assert desk.leg.unsent_bytes == FIRST_CREDIT
    going_on = desk.legs.received(101, Ready(have=0, window=9 * EARLY_CREDIT))
    assert [a.step.serial for a in going_on if isinstance(a, Compute)] == [6]


def test_a_small_result_lets_many_steps_be_computed_in_one_pass() -> None:
    desk = middle()
    desk.compute(desk.legs.received(1, step(1, 0)))
    given = [a for n in range(2, 60) for a in desk.legs.received(1, step(n, n - 1))]
    assert len([a for a in given if isinstance(a, Compute)]) == 58


def test_a_hop_gives_its_credit_back_only_when_it_has_computed() -> None:
    desk = middle()
    size = CREDIT_PIECE - STEP_BYTES
    arrived = desk.legs.received(1, step(1, 0, size=size))
    assert said(arrived, 1) == []
    assert said(desk.compute(arrived), 1) == [Credit(more=CREDIT_PIECE)]
    assert said(desk.legs.received(1, step(1, 0, size=size)), 1) == [Credit(more=CREDIT_PIECE)], (
        "what is dropped is given back too"
    )


def test_steps_of_one_id_are_given_back_with_what_they_weigh_here() -> None:
    """A replay of many would else take hundreds of times the memory that its credit says."""
    desk = middle()
    for serial in range(1, 60):
        desk.legs.received(1, step(serial, serial - 1))
    assert desk.leg.waiting_bytes == 59 * (4 + STEP_BYTES)


def test_a_sender_of_an_older_program_gets_back_payloads_only() -> None:
    desk = Desk()
    actions = desk.legs.opened(1, route(1, "here", "next", window=0))
    assert said(actions, 1) == [Ready(have=0)]
    arrived = desk.legs.received(1, step(1, 0, size=CREDIT_PIECE))
    assert said(desk.compute(arrived), 1) == [Credit(more=CREDIT_PIECE)]


def test_outputs_that_nobody_wants_cost_no_credit() -> None:
    desk = last()
    for serial in range(1, 4):
        arrived = desk.legs.received(1, step(serial, serial - 1, wanted="none"))
        assert said(desk.compute(arrived, size=FIRST_CREDIT), 2) == []
    outputs = said(desk.compute(desk.legs.received(1, step(4, 3))), 2)
    assert [m.serial for m in outputs if isinstance(m, Output)] == [4]


def test_a_flood_beyond_the_credit_is_the_fault_of_the_hop_before() -> None:
    desk, told = middle(), []
    for serial in range(1, 12):
        told += said(desk.legs.received(1, step(serial, serial - 1, size=FIRST_CREDIT // 2)), 1)
    assert faults(told)[0][0] == "broke_word"


def test_a_fault_of_the_next_hop_travels_up_unchanged() -> None:
    desk = middle()
    fault = Fault(epoch=1, peer="far", span="2:3", failure="silent")
    assert said(desk.legs.received(101, fault), 1) == [fault]


@pytest.mark.parametrize(
    ("message", "failure"),
    [
        (Refused(reason="full"), "refused"),
        (Gone(reason="forgotten"), "closed"),
        (Close(), "closed"),
    ],
)
def test_a_next_hop_that_says_no_is_reported_and_left(message: Message, failure: str) -> None:
    desk = middle()
    actions = desk.legs.received(101, message)
    assert Shut(101) in actions
    assert faults(said(actions, 1)) == [(failure, "next", "1:2", 1)]
    assert not [a for a in actions if isinstance(a, Dial)], "not dialled again in this epoch"


def test_a_next_hop_that_cannot_be_reached_is_reported() -> None:
    desk = middle()
    told = said(desk.legs.ended(101, "unreachable", "no address"), 1)
    assert faults(told) == [("unreachable", "next", "1:2", 1)]


def test_a_failed_step_is_reported_once_and_nothing_is_computed_after_it() -> None:
    desk = middle()
    desk.legs.received(1, step(1, 0))
    desk.legs.received(1, step(2, 1))
    number = desk.leg.number
    told = said(desk.legs.failed(number, "out of memory"), 1)
    told += said(desk.legs.failed(number, "a gap"), 1)
    assert faults(told) == [("failed", "here", "0:1", 1)]
    assert desk.legs.received(1, step(3, 2)) == []
    assert desk.legs.computed(number, 2, payload(), TIME) == []


def test_a_failed_leg_asks_for_a_new_stream_when_it_is_taken_up_again() -> None:
    """Its report may come to the client after it has repaired something else, and be dropped."""
    desk = middle()
    desk.legs.received(1, step(1, 0))
    desk.legs.failed(desk.leg.number, "out of memory")
    actions = desk.legs.received(1, route(2, "here", "next"))
    assert said(actions, 1) == [Gone(reason="superseded")]
    assert Shut(1) in actions
    again = desk.legs.opened(2, route(2, ("here", "0:1", "keep"), "next"))
    assert said(again, 2) == [ready(0)]


def test_a_failed_leg_begins_again_on_a_new_stream() -> None:
    desk = middle()
    desk.legs.received(1, step(1, 0))
    number = desk.leg.number
    desk.legs.failed(number, "out of memory")
    actions = desk.legs.opened(2, route(2, ("here", "0:1", "keep"), "next"))
    assert Forget(number) in actions
    assert said(actions, 2) == [ready(0)]


def test_a_payload_that_is_no_run_of_positions_is_refused() -> None:
    desk = middle()
    flat = Step(serial=1, after=0, start=0, payload={"mask": payload()["ids"]})
    assert faults(said(desk.legs.received(1, flat), 1)) == [("broke_word", "me", "0:1", 1)]


def test_a_drain_asks_every_client_to_go_elsewhere_and_serves_on() -> None:
    desk = Desk()
    opened = route(1, "here")
    desk.legs.opened(1, opened)
    (fault,) = said(desk.legs.drain(), 1)
    assert isinstance(fault, Fault)
    assert (fault.failure, fault.peer, fault.span) == ("draining", "here", opened.hops[0].span)
    computes = [a for a in desk.legs.received(1, step(1, 0)) if isinstance(a, Compute)]
    assert len(computes) == 1
