import pytest
from chain_builders import attach, payload, ready, route, said, serials, session_of, step

from swarm.chain import CREDIT_PIECE, FIRST_CREDIT, STEP_BYTES, Dial, Shut
from swarm.messages import Close, Credit, Fault, Gone, Message, Open, Output, Ready, Refused
from swarm.session import Deliver, Session, Trouble

HOPS = (("one", "0:4"), ("two", "4:8"))
SUPERSEDED = Gone(reason="superseded")


def opened() -> Session:
    session, _ = session_of(*HOPS)
    return session


def output(serial: int, start: int = 0, size: int = 4) -> Output:
    return Output(serial=serial, start=start, payload=payload(1, size))


def delivered(actions: object) -> list[int]:
    assert isinstance(actions, list)
    return [action.output.serial for action in actions if isinstance(action, Deliver)]


def troubles(actions: object) -> list[tuple[str, str, str]]:
    assert isinstance(actions, list)
    return [(a.failure, a.peer, a.span) for a in actions if isinstance(a, Trouble)]


def test_a_route_is_opened_at_both_ends_at_once() -> None:
    _, actions = session_of(*HOPS)
    assert actions == [
        Dial(1, "one", route(1, ("one", "0:4", "new"), ("two", "4:8", "new"))),
        Dial(2, "two", attach(1, "4:8")),
    ]


def test_steps_follow_without_waiting_for_ready() -> None:
    session = opened()
    assert said(session.step(0, payload(3), "none"), 1) == [step(1, 0, length=3, wanted="none")]
    assert said(session.step(3, payload(), "last"), 1) == [step(2, 3)]


def test_each_output_is_delivered_once_and_in_order() -> None:
    session = opened()
    for start in range(3):
        session.step(start, payload(), "last")
    assert delivered(session.received(2, output(2))) == []
    assert delivered(session.received(2, output(1))) == [1]
    assert delivered(session.received(2, output(1))) == []
    assert delivered(session.received(2, output(2))) == [2]
    assert session.is_waiting
    assert delivered(session.received(2, output(3))) == [3]
    assert not session.is_waiting


def test_an_output_over_the_uplink_is_none() -> None:
    session = opened()
    session.step(0, payload(), "last")
    assert delivered(session.received(1, output(1))) == []


def test_a_new_route_is_sent_the_whole_log_under_the_next_epoch() -> None:
    session = opened()
    session.step(0, payload(2), "none")
    session.step(2, payload(), "last")
    session.received(2, output(2))
    session.step(3, payload(), "last")
    actions = session.take_route([("one", "0:4"), ("three", "4:8")])
    assert said(actions, 1) == [SUPERSEDED]
    assert said(actions, 2) == [SUPERSEDED]
    assert [a for a in actions if isinstance(a, Shut)] == [Shut(1), Shut(2)]
    up, down = [a for a in actions if isinstance(a, Dial)]
    assert up.first == route(2, ("one", "0:4", "anew"), ("three", "4:8", "anew"), positions=4)
    assert down.first == attach(2, "4:8", have=2)
    assert serials(said(actions, up.link)) == [1, 2, 3]


def test_what_was_rolled_back_is_not_replayed() -> None:
    session = opened()
    for start in (0, 4, 8, 5):
        session.step(start, payload(4), "none")
    actions = session.take_route(HOPS)
    sent = said(actions, 3)
    assert [(m.serial, m.after) for m in sent if not isinstance(m, Open)] == [  # type: ignore[attr-defined]
        (1, 0), (2, 1), (4, 2)
    ]  # fmt: skip


def test_a_step_that_is_rolled_back_is_not_waited_for() -> None:
    """Its input left the log: after a repair nobody would ever answer it."""
    session = opened()
    session.step(0, payload(4), "none")
    session.step(4, payload(), "last")
    session.step(4, payload(), "last")
    session.take_route(HOPS)
    assert delivered(session.received(4, output(3, 4))) == [3]
    assert not session.is_waiting


def test_nothing_is_sent_without_a_route() -> None:
    session = opened()
    session.ended(1, "closed", "")
    assert session.step(0, payload(), "last") == []


def test_a_first_hop_that_has_something_is_not_sent_it_again() -> None:
    session = opened()
    for start in range(6):
        session.step(start, payload(1, FIRST_CREDIT // 2), "none")
    assert serials(said(session.received(1, Ready(have=5)), 1)) == [6]


def test_the_uplink_carries_no_more_than_its_credit() -> None:
    session = opened()
    sent = []
    for start in range(4):
        sent += said(session.step(start, payload(1, FIRST_CREDIT // 2 - STEP_BYTES), "none"), 1)
    assert serials(sent) == [1], "before Ready hardly more than one is taken for granted"
    assert serials(said(session.received(1, ready(0)), 1)) == [2]
    assert serials(said(session.received(1, Credit(more=FIRST_CREDIT)), 1)) == [3, 4]


def test_outputs_are_paid_back() -> None:
    session = opened()
    session.step(0, payload(), "last")
    assert said(session.received(2, output(1, size=CREDIT_PIECE)), 2) == [Credit(more=CREDIT_PIECE)]


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_hole_9_a_fault_counts_in_its_own_epoch_only(epoch: int) -> None:
    session = opened()
    session.take_route(HOPS)
    fault = Fault(epoch=epoch, peer="two", span="4:8", failure="closed", retry_seconds=1.0)
    assert session.received(3, fault) == []
    current = Fault(epoch=2, peer="two", span="4:8", failure="closed", retry_seconds=1.0)
    assert session.received(3, current) == [Trouble("closed", "two", "4:8", "", 1.0)]


@pytest.mark.parametrize(
    ("link", "message", "trouble"),
    [
        (1, Refused(reason="full"), ("refused", "one", "0:4")),
        (2, Refused(reason="full"), ("refused", "two", "4:8")),
        (2, Gone(reason="forgotten"), ("forgotten", "", "4:8")),
        (1, Gone(reason="done"), ("broke_word", "one", "0:4")),
        (1, output(1), ("broke_word", "one", "0:4")),
        (2, Ready(have=0), ("broke_word", "two", "4:8")),
    ],
)
def test_a_hop_that_ends_its_stream_is_a_trouble(
    link: int, message: Message, trouble: tuple[str, str, str]
) -> None:
    session = opened()
    actions = session.received(link, message)
    assert troubles(actions) == [trouble]
    assert Shut(link) in actions
    assert session.received(link, message) == [], "nothing is heard of it again"
    assert session.ended(link, "closed", "") == []


@pytest.mark.parametrize(("link", "peer", "span"), [(1, "one", "0:4"), (2, "two", "4:8")])
def test_a_stream_that_breaks_is_a_trouble(link: int, peer: str, span: str) -> None:
    session = opened()
    assert troubles(session.ended(link, "silent", "")) == [("silent", peer, span)]
    assert session.ended(link, "silent", "") == []


def test_links_left_behind_are_ignored() -> None:
    session = opened()
    session.step(0, payload(), "last")
    session.take_route(HOPS)
    assert session.received(2, output(1)) == []
    assert session.ended(1, "closed", "") == []


def test_a_session_that_ends_closes_the_chain() -> None:
    session = opened()
    actions = session.close()
    assert said(actions, 1) == [Close()]
    assert said(actions, 2) == [Gone(reason="done")]
    assert [a for a in actions if isinstance(a, Shut)] == [Shut(1), Shut(2)]
    assert session.close() == []
    assert session.received(2, output(1)) == []
