import pytest
from chain_builders import KEPT, Desk, attach, ready, route, said, serials, step

from swarm.chain import Dial, Shut
from swarm.leg import Action, Compute, Forget, Grace
from swarm.messages import Attach, Close, Fault, Gone, Message, Open, Output, Ready, Refused, Step

STALE = Refused(reason="stale", message="a newer epoch was seen here")
SUPERSEDED = Gone(reason="superseded")
FORGOTTEN = Gone(reason="forgotten")


def dials(actions: list[Action]) -> list[Dial]:
    return [action for action in actions if isinstance(action, Dial)]


def outputs(actions: list[object]) -> list[int]:
    return [m.serial for m in said(actions, 2) if isinstance(m, Output)]


def full(opened: Open) -> Refused | None:
    return Refused(reason="full")


def test_an_open_begins_a_leg_and_goes_on_at_once() -> None:
    desk = Desk()
    opened = route(1, "here", ("next", "1:2", "keep"))
    actions = desk.legs.opened(1, opened)
    assert said(actions, 1) == [ready(0)]
    (dial,) = dials(actions)
    assert dial.peer == "next"
    assert dial.first == route(1, "here", ("next", "1:2", "keep"), at=1)


def test_a_refused_open_leaves_nothing_behind() -> None:
    desk = Desk(full)
    actions = desk.legs.opened(1, route(1, "here"))
    assert said(actions, 1) == [Refused(reason="full")]
    assert Shut(1) in actions
    assert desk.legs.free_of_sessions


def test_a_kept_leg_is_not_refused_for_being_full() -> None:
    answers = iter([None, Refused(reason="full")])
    desk = Desk(lambda opened: next(answers))
    desk.legs.opened(1, route(1, "here"))
    assert said(desk.legs.opened(3, route(2, ("here", "0:1", "keep"))), 3) == [ready(0)]


@pytest.mark.parametrize("mode", ["keep", "new", "anew"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_hole_14_an_open_that_comes_late_is_stale(epoch: int, mode: str) -> None:
    desk = Desk()
    desk.legs.opened(1, route(2, "here"))
    late = route(epoch, ("here", "0:1", mode))  # type: ignore[arg-type]
    actions = desk.legs.opened(3, late)
    assert said(actions, 3) == [STALE]
    assert desk.leg.up == 1


def test_hole_14_a_dead_leg_does_not_rise_again() -> None:
    desk = Desk()
    desk.legs.opened(1, route(2, "here"))
    desk.legs.received(1, Close())
    assert said(desk.legs.opened(3, route(1, "here")), 3) == [STALE]
    assert len(desk.legs) == 0


def test_hole_14_a_refused_open_makes_older_ones_stale() -> None:
    answers = iter([Refused(reason="full"), None])
    desk = Desk(lambda opened: next(answers))
    (grace,) = [a for a in desk.legs.opened(1, route(2, "here")) if isinstance(a, Grace)]
    assert said(desk.legs.opened(3, route(1, "here")), 3) == [STALE]
    desk.legs.grace_over(grace.leg)
    assert said(desk.legs.opened(4, route(1, "here")), 4) == [ready(0)]


def test_the_highest_epoch_is_known_for_a_grace_time_after_the_last_leg() -> None:
    desk = Desk()
    graces: list[Grace] = []
    for epoch in (1, 2):
        desk.legs.opened(epoch, route(epoch, "here"))
        actions = desk.legs.received(epoch, Close())
        graces += [a for a in actions if isinstance(a, Grace) and a.is_running]
    first, second = graces
    desk.legs.grace_over(first.leg)
    assert said(desk.legs.opened(3, route(1, "here")), 3) == [STALE], "the first grace ended it"
    desk.legs.grace_over(second.leg)
    assert said(desk.legs.opened(4, route(1, "here")), 4) == [ready(0)]


def test_the_newest_open_takes_the_leg_from_an_older_stream() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    actions = desk.legs.opened(3, route(2, ("here", "0:1", "keep")))
    assert said(actions, 1) == [SUPERSEDED]
    assert Shut(1) in actions
    assert desk.legs.received(1, step(1, 0)) == [], "nothing older is heard after it"
    assert desk.legs.ended(1, "closed", "") == []
    assert [type(a) for a in desk.legs.received(3, step(1, 0))] == [Compute]


def test_anew_frees_the_leg_without_closing_what_is_below() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.compute(desk.legs.received(1, step(1, 0)))
    old = desk.leg.number
    actions = desk.legs.opened(3, route(2, ("here", "0:1", "anew"), ("next", "1:2", "anew")))
    assert said(actions, 101) == [SUPERSEDED]
    assert Forget(old) in actions
    assert said(actions, 3) == [ready(0)]
    assert desk.leg.admitted == 0


def test_a_reroute_is_passed_on_over_a_stream_that_lives() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next", "far"))
    actions = desk.legs.received(1, route(2, "here", "next", "other"))
    assert dials(actions) == []
    assert said(actions, 101) == [route(2, "here", "next", "other", at=1)]
    assert desk.leg.epoch == 2


def test_a_reroute_to_another_hop_leaves_the_old_one_without_closing_it() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.compute(desk.legs.received(1, step(1, 0)))
    actions = desk.legs.received(1, route(2, "here", "other"))
    assert said(actions, 101) == [SUPERSEDED]
    (dial,) = dials(actions)
    assert dial.peer == "other"
    assert serials(said(actions, dial.link)) == [1], "a new hop is sent to before its Ready"


def test_hole_7_a_reroute_overtakes_steps_that_wait() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    waiting = [*desk.legs.received(1, step(1, 0)), *desk.legs.received(1, step(2, 1))]
    (dial,) = dials(desk.legs.received(1, route(2, "here", "other")))
    assert serials(said(desk.compute(waiting), dial.link)) == [1, 2]


def test_a_next_hop_that_begins_anew_is_not_reached_over_the_old_stream() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.compute(desk.legs.received(1, step(1, 0)))
    actions = desk.legs.received(1, route(2, "here", ("next", "1:2", "anew")))
    (dial,) = dials(actions)
    assert said(actions, 101) == [SUPERSEDED]
    assert serials(said(actions, dial.link)) == [1]


def test_a_reroute_anew_over_a_live_stream_asks_for_a_new_one() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.compute(desk.legs.received(1, step(1, 0)))
    actions = desk.legs.received(1, route(2, ("here", "0:1", "anew")))
    assert said(actions, 1) == [SUPERSEDED]
    assert said(desk.legs.opened(3, route(2, ("here", "0:1", "anew"))), 3) == [ready(0)]
    assert desk.leg.admitted == 0


def test_a_reroute_older_than_what_another_leg_has_heard_is_stale() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.opened(3, route(3, "before", "here", at=1))
    actions = desk.legs.received(1, route(2, "here"))
    assert said(actions, 1) == [STALE]
    assert said(desk.legs.opened(4, route(2, ("here", "0:1", "keep"))), 4) == [STALE]


def test_a_kept_next_hop_is_sent_nothing_before_its_ready() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    for serial in (1, 2, 3):
        desk.compute(desk.legs.received(1, step(serial, serial - 1)))
    desk.legs.ended(101, "closed", "")
    actions = desk.legs.received(1, route(2, *KEPT))
    (dial,) = dials(actions)
    assert serials(said(actions, dial.link)) == []
    again = said(desk.legs.received(dial.link, Ready(have=1)), dial.link)
    assert serials(again) == [2, 3]
    assert [message.after for message in again if isinstance(message, Step)] == [1, 2]


def test_hole_3_a_next_hop_that_forgot_everything_is_sent_everything() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    for serial in (1, 2):
        desk.compute(desk.legs.received(1, step(serial, serial - 1)))
    desk.legs.ended(101, "closed", "")
    (dial,) = dials(desk.legs.received(1, route(2, *KEPT)))
    assert serials(said(desk.legs.received(dial.link, Ready(have=0)), dial.link)) == [1, 2]


@pytest.mark.parametrize(
    "message", [route(1, "here"), route(2, ("here", "5:6")), route(2, "here", session=b"t" * 16)]
)
def test_a_reroute_of_another_place_or_time_ends_the_stream(message: Open) -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    actions = desk.legs.received(1, message)
    assert actions == [Shut(1), Grace(desk.leg.number, is_running=True)]


def test_hole_8_an_attach_that_comes_first_waits_for_its_open() -> None:
    desk = Desk()
    (grace,) = desk.legs.attached(2, "me", attach(1, "0:1"))
    assert isinstance(grace, Grace)
    assert grace.is_running
    assert Grace(grace.leg, is_running=False) in desk.legs.opened(1, route(1, "here"))
    assert outputs(desk.compute(desk.legs.received(1, step(1, 0)))) == [1]


def test_hole_8_a_parked_attach_is_forgotten_after_the_grace_time() -> None:
    desk = Desk()
    (grace,) = desk.legs.attached(2, "me", attach(1, "0:1"))
    assert isinstance(grace, Grace)
    actions = desk.legs.grace_over(grace.leg)
    assert said(actions, 2) == [FORGOTTEN]
    assert desk.legs.free_of_sessions


def test_hole_8_a_parked_attach_whose_stream_ends_is_forgotten() -> None:
    desk = Desk()
    (grace,) = desk.legs.attached(2, "me", attach(1, "0:1"))
    assert isinstance(grace, Grace)
    assert desk.legs.ended(2, "closed", "") == [Grace(grace.leg, is_running=False)]
    assert desk.legs.free_of_sessions


def test_of_two_parked_attaches_the_newest_wins() -> None:
    for first, second in ((1, 2), (2, 1)):
        desk = Desk()
        desk.legs.attached(first, "me", attach(first, "0:1"))
        desk.legs.attached(second, "me", attach(second, "0:1"))
        actions = desk.legs.opened(9, route(2, "here"))
        assert said(actions, 1) == [SUPERSEDED]
        assert desk.leg.downlink is not None
        assert desk.leg.downlink.link == 2


def test_a_downlink_is_taken_from_the_sessions_client_only() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(2, "thief", attach(5, "0:1"))
    assert desk.leg.downlink is None
    assert outputs(desk.compute(desk.legs.received(1, step(1, 0)))) == []


def test_only_so_many_attaches_are_parked() -> None:
    desk = Desk()
    for link in range(1, 66):
        unheard = Attach(session=bytes([link]) * 16, epoch=1, span="0:1", have=0)
        actions = desk.legs.attached(link, "me", unheard)
    assert [m.reason for m in said(actions, 65) if isinstance(m, Refused)] == ["full"]


def test_hole_5_outputs_are_kept_until_the_client_attaches_again() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(3, "me", attach(1, "0:1"))
    desk.legs.ended(3, "closed", "")
    for serial in (1, 2, 3):
        desk.compute(desk.legs.received(1, step(serial, serial - 1)))
    assert outputs([*desk.legs.attached(2, "me", attach(2, "0:1", have=1))]) == [2, 3]


def test_the_newest_attach_wins() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(3, "me", attach(1, "0:1"))
    assert said(desk.legs.attached(2, "me", attach(2, "0:1")), 3) == [SUPERSEDED]
    assert said(desk.legs.attached(4, "me", attach(1, "0:1")), 4) == [SUPERSEDED]
    assert outputs(desk.compute(desk.legs.received(1, step(1, 0)))) == [1]


def test_an_attach_that_overtakes_an_open_anew_is_handed_on_with_its_credit() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.compute(desk.legs.received(1, step(1, 0)), size=100)
    assert outputs([*desk.legs.attached(2, "me", attach(2, "0:1"))]) == [1]
    outlet = desk.leg.downlink
    actions = desk.legs.opened(3, route(2, ("here", "0:1", "anew")))
    assert said(actions, 2) == []
    assert desk.leg.downlink == outlet, "what is outstanding on a link is not forgotten"
    assert outputs(desk.compute(desk.legs.received(3, step(1, 0)))) == []
    assert outputs(desk.compute(desk.legs.received(3, step(2, 1)))) == [2]


def test_a_failed_leg_that_begins_again_keeps_the_downlink() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(2, "me", attach(1, "0:1"))
    desk.legs.received(1, step(1, 0))
    desk.legs.failed(desk.leg.number, "out of memory")
    assert said(desk.legs.opened(3, route(2, ("here", "0:1", "keep"))), 2) == []
    assert outputs(desk.compute(desk.legs.received(3, step(1, 0)))) == [1]


def test_hole_10_a_reroute_dials_a_next_hop_that_is_gone() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.legs.ended(1, "closed", "")
    assert said(desk.legs.ended(101, "closed", ""), 1) == [], "nobody hears the report"
    (dial,) = dials(desk.legs.opened(3, route(2, ("here", "0:1", "keep"), "next")))
    assert dial.peer == "next"
    told = said(desk.legs.ended(dial.link, "unreachable", ""), 3)
    assert [m.epoch for m in told if isinstance(m, Fault)] == [2]


def test_hole_11_two_spans_of_a_session_on_one_peer_are_two_legs() -> None:
    desk = Desk()
    hops = (("here", "0:1"), ("other", "1:2"), ("here", "2:3"))
    desk.legs.opened(1, route(1, *hops))
    desk.legs.opened(3, route(1, *hops, at=2))
    assert len(desk.legs) == 2
    first, second = desk.legs.legs()
    desk.legs.received(1, step(1, 0, length=3))
    assert (first.length, second.length) == (3, 0)
    desk.legs.received(1, Close())
    assert [leg.span for leg in desk.legs.legs()] == ["2:3"]


def test_a_leg_of_another_client_or_session_is_another_leg() -> None:
    desk = Desk()
    desk.legs.opened(1, route(5, "here"))
    desk.legs.opened(3, route(1, "here", client="you"))
    desk.legs.opened(4, route(1, "here", session=b"t" * 16))
    assert len(desk.legs) == 3


def test_hole_13_a_next_hop_that_was_superseded_is_dialled_again_in_a_newer_epoch() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.legs.received(1, route(2, "here", "next"))
    actions = desk.legs.received(101, SUPERSEDED)
    assert said(actions, 1) == [], "nobody is blamed"
    (dial,) = dials(actions)
    assert dial.peer == "next"
    for said_by_it in (SUPERSEDED, STALE):
        again = desk.legs.received(dial.link, said_by_it)
        assert dials(again) == [], "once in an epoch"
        assert said(again, 1) == []


def test_hole_15_a_new_leg_replaces_older_ones_of_the_same_blocks() -> None:
    room = Desk(lambda opened: Refused(reason="full") if len(room.legs) else None)
    room.legs.opened(1, route(1, ("here", "0:2"), ("next", "2:3")))
    room.legs.ended(1, "closed", "")
    actions = room.legs.opened(3, route(2, ("before", "0:1"), ("here", "1:3"), at=1))
    assert said(actions, 3) == [ready(0)]
    assert said(actions, 101) == [SUPERSEDED]
    assert room.leg.span == "1:3"


def test_hole_15_when_grace_is_over_all_hops_below_are_closed() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    number = desk.leg.number
    desk.legs.ended(1, "closed", "")
    actions = desk.legs.grace_over(number)
    assert said(actions, 101) == [Close()]
    assert Forget(number) in actions
    assert desk.legs.free_of_sessions


def test_a_grace_time_that_was_stopped_ends_nothing() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    number = desk.leg.number
    desk.legs.ended(1, "closed", "")
    desk.legs.opened(3, route(2, ("here", "0:1", "keep")))
    assert desk.legs.grace_over(number) == []
    assert len(desk.legs) == 1


def test_hole_16_a_client_is_told_that_its_leg_was_forgotten() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(2, "me", attach(1, "0:1"))
    desk.legs.ended(1, "closed", "")
    assert said(desk.legs.grace_over(desk.leg.number), 2) == [FORGOTTEN]


@pytest.mark.parametrize("message", [Ready(have=1), Gone(reason="done"), attach(1, "0:1")])
def test_an_up_stream_that_says_what_it_must_not_is_left(message: Message) -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    assert desk.legs.received(1, message) == [Shut(1), Grace(desk.leg.number, is_running=True)]


def test_results_for_a_leg_that_is_gone_are_ignored() -> None:
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    waiting = desk.legs.received(1, step(1, 0))
    desk.legs.received(1, Close())
    assert desk.compute(waiting) == []
    assert desk.legs.failed(1, "late") == []
