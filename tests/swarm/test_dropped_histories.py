"""Histories are bounded: what is dropped, in which order, and what a repair that misses it does."""

from dataclasses import replace

import pytest
from chain_builders import (
    KEPT,
    Desk,
    attach,
    entry,
    payload,
    ready,
    route,
    said,
    serials,
    session_of,
    step,
)
from repair_worlds import PROMPT, TOKENS, kill, told
from session_worlds import Served, World, run, said_after

from swarm.chain import (
    FIRST_CREDIT,
    STEP_BYTES,
    Dial,
    History,
    Outlet,
    Shut,
    Spare,
    histories_to_drop,
)
from swarm.client_session import ClientSession
from swarm.messages import Attach, Close, Credit, Fault, Gone, Message, Output, Ready
from swarm.session import Trouble

DROPPED = ("dropped", "here")
UNDISTURBED = len(PROMPT) + TOKENS - 1


def faults(messages: list[Message]) -> list[tuple[str, str]]:
    return [(m.failure, m.peer) for m in messages if isinstance(m, Fault)]


def history(*wanted: bool) -> History:
    made = History()
    for serial, is_wanted in enumerate(wanted, 1):
        made.append(entry(serial, serial, wanted="last" if is_wanted else "none"))
    return made


def dropped(desk: Desk) -> Desk:
    for spare in list(desk.legs.spares()):
        desk.legs.drop_history(spare.leg)
    return desk


def middle(steps: int = 3, size: int = 4) -> Desk:
    """A first hop of two that sent on some steps: up stream 1, down stream 101."""
    desk = Desk()
    desk.legs.opened(1, route(1, "here", "next"))
    desk.legs.received(101, ready(0))
    for serial in range(1, steps + 1):
        desk.compute(desk.legs.received(1, step(serial, serial - 1)), size=size)
    return desk


def last(*wanted: bool) -> Desk:
    """A last hop that answered some steps: up stream 1, downlink 2."""
    desk = Desk()
    desk.legs.opened(1, route(1, "here"))
    desk.legs.attached(2, "me", attach(1, "0:1"))
    for serial, is_wanted in enumerate(wanted, 1):
        asked = step(serial, serial - 1, wanted="last" if is_wanted else "none")
        desk.compute(desk.legs.received(1, asked))
    return desk


def rerouted(desk: Desk, have: int, mode: str = "keep") -> list[Message]:
    """What link 1 hears when the link to the next hop broke and that has some of it."""
    desk.legs.ended(101, "closed", "")
    hops = (("here", "0:1", "keep"), ("next", "1:2", mode))
    actions = desk.legs.received(1, route(2, *hops))  # type: ignore[arg-type]
    (dial,) = [a for a in actions if isinstance(a, Dial)]
    actions += desk.legs.received(dial.link, Ready(have=have))
    return [*said(actions, 1), *said(actions, dial.link)]


# --- what is dropped -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spares", "excess", "chosen"),
    [
        ((), 5, []),
        ((4, 4, 4), 0, []),
        ((4, 4, 4), -1, []),
        ((4, 4, 4), 1, [0]),
        ((4, 4, 4), 4, [0]),
        ((4, 4, 4), 5, [0, 1]),
        ((0, 4, 4), 3, [1]),
        ((0, 4, 0), 9, [1]),
        ((1, 9, 9), 9, [0, 1]),
    ],
)
def test_the_histories_idle_longest_are_dropped_until_the_rest_fits(
    spares: tuple[int, ...], excess: int, chosen: list[int]
) -> None:
    idle = [Spare(leg, size) for leg, size in enumerate(spares)]
    assert histories_to_drop(idle, excess) == chosen


def test_a_history_counts_its_bytes_as_it_is_dropped() -> None:
    made = history(True, True, True)
    assert [made.bytes_to(serial) for serial in range(5)] == [0, 4, 8, 12, 12]
    made.drop(2)
    assert (made.byte_count, [e.serial for e in made.after(0)]) == (4, [3])
    made.append(entry(4, 0))
    assert (made.byte_count, [e.serial for e in made.after(0)]) == (4, [4])
    made.drop(0)
    assert made.byte_count == 4


def test_only_who_has_what_was_dropped_can_be_resumed() -> None:
    made = history(True, True, False, True)
    made.drop(3)
    assert [made.reaches(serial) for serial in range(5)] == [False, False, False, True, True]
    downlink = [made.reaches(serial, is_downlink=True) for serial in range(5)]
    assert downlink == [False, False, True, True, True], "nobody ever lacks an unwanted output"


def test_outputs_that_nobody_wants_count_as_sent() -> None:
    outlet, made = Outlet(1, 1, step_bytes=0), history(True, False, False)
    assert [e.serial for e in outlet.ready(made, is_downlink=True)] == [1]
    assert (outlet.sent, outlet.outstanding) == (3, 4)


def test_what_was_not_sent_yet_is_kept_and_sent_when_there_is_credit() -> None:
    half = FIRST_CREDIT // 2 - STEP_BYTES
    desk = dropped(middle(steps=4, size=half))
    assert desk.legs.history_bytes == 2 * half
    told_next = said(desk.legs.received(101, Credit(more=half + STEP_BYTES)), 101)
    assert [(m.serial, m.after) for m in told_next if hasattr(m, "after")] == [(3, 2)]


def test_what_a_new_next_hop_has_not_been_sent_yet_is_kept() -> None:
    half = FIRST_CREDIT // 2 - STEP_BYTES
    desk = middle(steps=2, size=half)
    desk.legs.received(101, Credit(more=FIRST_CREDIT))
    desk.compute(desk.legs.received(1, step(3, 2)), size=half)
    desk.legs.ended(101, "closed", "")
    desk.legs.received(1, route(2, "here", "other"))
    desk.legs.received(102, ready(0))  # takes two of the three by its credit
    dropped(desk)
    assert [e.serial for e in desk.leg.history.entries] == [3]


def test_nothing_is_dropped_before_a_kept_next_hop_has_said_what_it_has() -> None:
    desk = middle()
    desk.legs.ended(101, "closed", "")
    (dial,) = [a for a in desk.legs.received(1, route(2, *KEPT)) if isinstance(a, Dial)]
    dropped(desk)
    again = said(desk.legs.received(dial.link, Ready(have=1)), dial.link)
    assert serials(again) == [2, 3]


def test_without_a_link_what_was_ever_sent_on_may_be_dropped() -> None:
    desk = middle()
    desk.legs.ended(101, "closed", "")
    desk.compute(desk.legs.received(1, step(4, 3)))
    dropped(desk)
    assert [e.serial for e in desk.leg.history.entries] == [4]


def test_the_leg_that_admitted_and_sent_nothing_for_longest_comes_first() -> None:
    desk = Desk()
    for number in (1, 2, 3):
        desk.legs.opened(number, route(1, "here", session=bytes([number]) * 16))
    numbers = [spare.leg for spare in desk.legs.spares()]
    desk.legs.received(1, step(1, 0))
    assert [spare.leg for spare in desk.legs.spares()] == [*numbers[1:], numbers[0]]
    desk.compute(desk.legs.received(3, step(1, 0)))
    desk.compute(desk.legs.received(2, step(1, 0)))
    attached = Attach(session=bytes([3]) * 16, epoch=1, span="0:1", have=0)
    desk.legs.attached(9, "me", attached)
    assert [spare.leg for spare in desk.legs.spares()] == [numbers[0], numbers[1], numbers[2]]


def test_the_histories_of_sessions_that_ended_count_nothing() -> None:
    desk = middle()
    assert desk.legs.history_bytes == 12
    desk.compute(desk.legs.received(1, step(4, 1)))  # rolls back two
    assert desk.legs.history_bytes == 8
    desk.legs.received(1, Close())
    assert desk.legs.history_bytes == 0


# --- what a repair that misses it does ------------------------------------------------------------


def test_a_leg_without_history_goes_on_and_its_link_can_be_mended() -> None:
    desk = dropped(middle())
    sent = said(desk.compute(desk.legs.received(1, step(4, 3))), 101)
    assert serials(sent) == [4]
    assert serials(rerouted(desk, have=3)) == [4]


@pytest.mark.parametrize("mode", ["keep", "new", "anew"])
@pytest.mark.parametrize("have", [0, 2])
def test_a_next_hop_that_lacks_what_was_dropped_is_sent_nothing(have: int, mode: str) -> None:
    told_both = rerouted(dropped(middle()), have, mode)
    assert faults(told_both) == [DROPPED]
    assert serials(told_both) == []
    assert told_both[-1] == Gone(reason="superseded")


def test_a_new_next_hop_is_asked_what_it_has_before_the_client_is_troubled() -> None:
    """It may have held these blocks before: its peer was suspected falsely and is taken back."""
    assert faults(rerouted(dropped(middle()), have=3, mode="new")) == []


def test_what_was_dropped_is_missed_once_in_each_epoch() -> None:
    desk = dropped(middle())
    assert faults(rerouted(desk, have=0)) == [DROPPED]
    assert faults(said(desk.compute(desk.legs.received(1, step(4, 3))), 1)) == []
    actions = desk.legs.received(1, route(3, *KEPT))
    (dial,) = [a for a in actions if isinstance(a, Dial)]
    told_up = said(desk.legs.received(dial.link, Ready(have=0)), 1)
    assert [(m.failure, m.epoch) for m in told_up if isinstance(m, Fault)] == [("dropped", 3)]


def test_a_leg_that_begins_anew_has_dropped_nothing() -> None:
    desk = dropped(middle())
    hops = (("here", "0:1", "anew"), ("next", "1:2", "anew"))
    actions = desk.legs.opened(3, route(2, *hops))
    (dial,) = [a for a in actions if isinstance(a, Dial)]
    assert serials(said(desk.compute(desk.legs.received(3, step(1, 0))), dial.link)) == [1]


def test_a_client_that_lacks_a_dropped_output_is_told_on_its_downlink() -> None:
    desk = dropped(last(True, True))
    actions = desk.legs.attached(3, "me", attach(1, "0:1", have=1))
    assert said(actions, 3) == [Gone(reason="superseded")], "of the same epoch"
    desk.legs.received(1, route(2, "here"))
    actions = desk.legs.attached(4, "me", attach(2, "0:1", have=1))
    assert faults(said(actions, 4)) == [DROPPED]
    assert Shut(4) in actions


def test_a_client_that_has_every_wanted_output_attaches_again() -> None:
    desk = dropped(last(True, True, False))
    desk.legs.ended(2, "closed", "")
    desk.legs.received(1, route(2, "here"))
    assert faults(said(desk.legs.attached(4, "me", attach(2, "0:1", have=2)), 4)) == []
    answered = said(desk.compute(desk.legs.received(1, step(4, 3))), 4)
    assert [m.serial for m in answered if isinstance(m, Output)] == [4]


def test_a_client_that_attaches_before_its_open_is_told_when_that_comes() -> None:
    desk = dropped(last(True, True))
    assert said(desk.legs.attached(4, "me", attach(2, "0:1", have=1)), 4) == []
    assert faults(said(desk.legs.received(1, route(2, "here")), 4)) == [DROPPED]


def test_a_client_that_attaches_before_an_open_anew_is_told_nothing() -> None:
    desk = dropped(last(True, True))
    told_client = said(desk.legs.attached(4, "me", attach(2, "0:1", have=1)), 4)
    opened = desk.legs.opened(5, route(2, ("here", "0:1", "anew")))
    told_client += said(opened, 4)
    for serial in (1, 2):
        made = desk.compute(desk.legs.received(5, step(serial, serial - 1)))
        told_client += said(made, 4)
    assert [m.serial for m in told_client if isinstance(m, Output)] == [2]
    assert faults(told_client) == []


LOST = Fault(epoch=2, peer="one", span="0:4", failure="dropped", message="not held")
HOPS = (("one", "0:4"), ("two", "4:8"))


def test_a_dropped_history_is_a_trouble_that_blames_nobody() -> None:
    session, _ = session_of(*HOPS)
    session.step(0, payload(), "last")
    session.take_route(HOPS)
    assert session.received(3, LOST) == [Trouble("dropped", "", "0:4", "not held")]


@pytest.mark.parametrize("epoch", [1, 3])
def test_what_was_dropped_under_another_epoch_is_no_trouble(epoch: int) -> None:
    session, _ = session_of(*HOPS)
    session.take_route(HOPS)
    fault = Fault(epoch=epoch, peer="one", span="0:4", failure="dropped")
    assert session.received(3, fault) == []


def test_the_newest_downlink_is_believed_whatever_its_epoch() -> None:
    """The client may have gone on to another epoch over this very downlink: it is gone all the
    same."""
    session, _ = session_of(*HOPS)
    session.take_route(HOPS)
    fault = Fault(epoch=1, peer="two", span="4:8", failure="dropped")
    actions = session.received(4, fault)
    assert actions == [Shut(4), Trouble("dropped", "", "4:8", "")]
    assert session.received(4, fault) == []


# --- servers with little memory -------------------------------------------------------------------


def limit(servers: list[Served], history_bytes: int) -> None:
    for served in servers:
        served.server.room = replace(served.server.room, history_bytes=history_bytes)


def test_histories_stay_within_their_room_and_the_text_is_the_same() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:1", "1:3", "3:4")
        limit(servers, 40)
        held: list[int] = []

        def look(_world: World, _session: ClientSession) -> None:
            held.extend(served.server.history_bytes for served in servers)

        made = await told(world, dict.fromkeys(range(1, TOKENS), look))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.session.journal.failovers == 0
        assert 0 < max(held) <= 40
        assert [served.server.history_bytes for served in servers] == [0, 0, 0]

    run(body)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hop_lost_behind_a_dropped_history_is_replaced_and_all_ids_replayed(place: int) -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        limit(world.servers, 0)
        made = await told(world, kill(place))
        assert made.ids == said_after(PROMPT, TOKENS)
        missed = made.failures["dropped"]
        assert missed == (1 if place > 0 else 0), "the client's own log is never dropped"
        route = [served.peer for served in first]
        route[place] = spares[place].peer
        assert made.peers == route, "nobody healthy is blamed"
        assert all(served.server.history_bytes == 0 for served in world.servers)

    run(body)


def test_a_broken_link_behind_a_dropped_history_replays_nothing() -> None:
    def snap(world: World, session: ClientSession) -> None:
        world.network.break_link(session.route[0][0], session.route[1][0])

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        limit(first, 0)
        made = await told(world, snap)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.failures["dropped"] == 0
        assert [served.positions for served in first] == [UNDISTURBED] * 3

    run(body)
