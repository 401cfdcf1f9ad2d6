"""What the chain's machines say and do about pages that are held already."""

from collections.abc import Iterable, Sequence
from itertools import count

import pytest
from chain_builders import SESSION, TIME, ready, route, said, serials
from msgspec.structs import replace

from swarm.chain import Dial, Payload, Send
from swarm.leg import Begun, Compute, Forget, Fork, Grace, Keep
from swarm.legs import Legs
from swarm.messages import Close, Fault, Gone, HopName, Message, Open, Ready, Step, Wanted
from swarm.prefix import Digests, ids_payload
from swarm.session import Session
from swarm.sharing import Sharing

PAGE = 2
TEXT = (5, 6, 7, 8, 9)


def digests(ids: Sequence[int]) -> list[bytes]:
    made = Digests("f", PAGE)
    made.add(0, ids_payload(ids))
    return made.pages


def hidden(ids: Iterable[int]) -> Payload:
    return ids_payload([100 + one for one in ids])


def sent(serial: int, start: int, ids: Sequence[int], wanted: Wanted = "none") -> Step:
    return Step(
        serial=serial, after=serial - 1, start=start, wanted=wanted, payload=ids_payload(ids)
    )


def offering(opened: Open, ids: Sequence[int] = TEXT) -> Open:
    return replace(opened, prefix=b"".join(digests(ids)), session=b"n" * 16)


class Here:
    """A peer that shares. What others open is 1 to 99, what it dials from 101."""

    def __init__(self, most_kept: int = 9) -> None:
        numbers = count(101)
        self.sharing = Sharing("f", page=PAGE, most_kept=most_kept)
        self.legs = Legs(lambda opened: None, lambda: next(numbers), sharing=self.sharing)

    def take(self, link: int, step: Step, shortest: int | None = 1) -> list[object]:
        """Compute a step: what comes of it are its ids and a hundred."""
        done: list[object] = list(self.legs.received(link, step))
        for action in tuple(done):
            if isinstance(action, Compute):
                made = hidden(numbers(action.step.payload))
                done += self.legs.computed(action.leg, action.step.serial, made, TIME, shortest)
        return done

    def live_through(self, opened: Open, shortest: int | None = 1) -> list[object]:
        """A session with the text, from its Open to its end."""
        self.legs.opened(1, opened)
        self.take(1, sent(1, 0, TEXT[:3]), shortest)
        self.take(1, sent(2, 3, TEXT[3:], "last"), shortest)
        return list(self.legs.received(1, Close()))


def numbers(payload: Payload) -> list[int]:
    data = bytes(payload["ids"].data)
    return [int.from_bytes(data[n : n + 4], "little") for n in range(0, len(data), 4)]


def kinds(actions: Iterable[object]) -> list[type]:
    return [type(action) for action in actions]


FIRST = route(1, "here", "next")
LAST = route(1, "before", "here", at=1)


def test_a_session_that_is_closed_leaves_its_cache_and_history() -> None:
    here = Here()
    ended = here.live_through(FIRST)
    assert Keep(1) in ended
    assert Forget(1) not in ended
    assert here.legs.free_of_sessions
    assert here.sharing.history_bytes == 4 * len(TEXT)
    assert here.legs.history_bytes == 0


def test_a_leg_begins_with_pages_before_it_says_ready_and_sends_on_what_the_next_lacks() -> None:
    here = Here()
    here.live_through(FIRST)
    begun = here.legs.opened(2, offering(FIRST))
    assert [type(a) for a in begun] == [Begun, Fork, Send, Dial]
    assert begun[1] == Fork(3, 1, 2 * PAGE)
    assert said(begun, 2) == [ready(2)]
    dial = begun[3]
    assert isinstance(dial, Dial)
    assert isinstance(dial.first, Open)
    theirs = Digests("f", PAGE)
    theirs.add(0, hidden(TEXT))
    assert dial.first.prefix == b"".join(theirs.pages)
    answered = here.legs.received(dial.link, Ready(have=1))
    (step,) = said(answered, dial.link)
    assert isinstance(step, Step)
    assert (step.serial, step.after, step.start, step.wanted) == (2, 1, PAGE, "none")
    assert numbers(step.payload) == [107, 108]
    goes_on = here.take(2, Step(serial=3, after=2, start=4, payload=ids_payload([9])))
    assert serials(said(goes_on, dial.link)) == [3]


def test_what_the_next_hop_may_have_is_not_sent_before_it_has_said() -> None:
    here = Here()
    here.live_through(FIRST)
    begun = here.legs.opened(2, offering(FIRST))
    (link,) = [action.link for action in begun if isinstance(action, Dial)]
    waits = here.take(2, Step(serial=3, after=2, start=4, payload=ids_payload([9])))
    assert said(waits, link) == []
    assert serials(said(here.legs.received(link, Ready(have=0)), link)) == [1, 2, 3]


def test_pages_that_may_have_to_be_sent_on_do_not_keep_what_follows_from_being_computed() -> None:
    here = Here()
    here.live_through(FIRST)
    here.legs.opened(2, offering(FIRST))
    (leg,) = here.legs.legs()
    leg.window = 4  # as of long pages
    step = Step(serial=3, after=2, start=4, payload=ids_payload([9]))
    assert Compute in kinds(here.legs.received(2, step))


def test_a_hop_passes_on_its_own_pages_never_those_it_was_offered() -> None:
    here = Here()
    known = offering(FIRST)
    begun = here.legs.opened(1, known)
    (dial,) = [action for action in begun if isinstance(action, Dial)]
    assert isinstance(dial.first, Open)
    assert dial.first.prefix == b""  # it holds nothing
    again = replace(known, epoch=2)
    (passed_on,) = said(here.legs.received(1, again), dial.link)
    assert isinstance(passed_on, Open)
    assert (passed_on.epoch, passed_on.prefix) == (2, b"")


def test_a_next_hop_that_is_new_is_offered_the_pages_and_one_that_begins_anew_is_not() -> None:
    for mode, is_offered in (("new", True), ("anew", False)):
        here = Here()
        here.live_through(FIRST)
        here.legs.opened(2, offering(FIRST))
        hops = (FIRST.hops[0], HopName("other", "1:2", mode))  # type: ignore[arg-type]
        moved = replace(offering(FIRST), epoch=2, hops=hops)
        (dial,) = [a for a in here.legs.received(2, moved) if isinstance(a, Dial)]
        assert isinstance(dial.first, Open)
        assert bool(dial.first.prefix) is is_offered


def test_who_is_told_to_begin_anew_begins_with_nothing() -> None:
    here = Here()
    here.live_through(FIRST)
    hops = (HopName("here", "0:1", "anew"), FIRST.hops[1])
    assert Fork not in kinds(here.legs.opened(2, replace(offering(FIRST), hops=hops)))


def test_other_blocks_of_the_same_peer_begin_with_nothing() -> None:
    here = Here()
    here.live_through(FIRST)
    hops = (HopName("here", "0:2"), HopName("next", "2:3"))
    assert Fork not in kinds(here.legs.opened(2, replace(offering(FIRST), hops=hops)))


def test_at_least_a_position_of_what_was_asked_for_is_left_to_compute() -> None:
    here = Here()
    here.live_through(FIRST)
    begun = here.legs.opened(2, replace(offering(FIRST), max_tokens=2 * PAGE))
    assert [a.length for a in begun if isinstance(a, Fork)] == [PAGE]


def test_a_last_hop_that_began_with_pages_says_so_when_another_is_put_behind_it() -> None:
    here = Here()
    here.live_through(LAST)
    assert Fork in kinds(here.legs.opened(2, offering(LAST)))
    here.take(2, Step(serial=3, after=2, start=4, payload=ids_payload([9])))
    hops = (*LAST.hops, HopName("behind", "2:3"))
    moved = here.legs.received(2, replace(offering(LAST), epoch=2, hops=hops))
    (link,) = [action.link for action in moved if isinstance(action, Dial)]
    told = here.legs.received(link, Ready(have=0))
    assert not serials(said(told, link))
    assert [m.failure for m in said(told, 2) if isinstance(m, Fault)] == ["dropped"]


@pytest.mark.parametrize("shortest", [None, 5])
def test_what_cannot_be_shared_is_not_kept(shortest: int | None) -> None:
    here = Here()
    assert Forget(1) in here.live_through(FIRST, shortest)  # 5: its last page ends at 4
    assert Fork not in kinds(here.legs.opened(2, offering(FIRST)))


def test_a_leg_whose_steps_wait_is_not_kept() -> None:
    here = Here()
    here.legs.opened(1, FIRST)
    here.take(1, sent(1, 0, TEXT[:4]))
    here.legs.received(1, sent(2, 4, TEXT[4:]))
    assert Forget(1) in here.legs.received(1, Close())
    assert len(here.sharing) == len(here.sharing._index) == 0


def test_a_session_that_ends_otherwise_leaves_nothing() -> None:
    here = Here()
    here.legs.opened(1, FIRST)
    here.take(1, sent(1, 0, TEXT))
    here.legs.ended(1, "closed", "")
    assert Forget(1) in here.legs.grace_over(1)
    assert len(here.sharing) == len(here.sharing._index) == 0


def test_a_peer_that_leaves_keeps_nothing_more() -> None:
    here = Here()
    here.live_through(FIRST)
    assert Forget(1) in here.legs.drain()
    later = replace(FIRST, session=b"l" * 16)
    assert [a.leg for a in here.live_through(later) if isinstance(a, Forget)] == [3]


def test_an_evicted_leg_gives_nothing() -> None:
    here = Here()
    here.legs.opened(1, FIRST)
    here.take(1, sent(1, 0, TEXT))
    here.legs.evict(1, "", 0.0)
    assert Fork not in kinds(here.legs.opened(2, offering(FIRST)))


def test_a_kept_leg_that_must_go_is_freed_once_and_forgotten() -> None:
    for how in ("evict", "grace_over", "drop_history"):
        here = Here()
        here.live_through(FIRST)
        arguments = ("", 0.0) if how == "evict" else ()
        assert Forget(1) in getattr(here.legs, how)(1, *arguments)
        assert here.sharing.history_bytes == 0
        assert getattr(here.legs, how)(1, *arguments) == []
        assert Fork not in kinds(here.legs.opened(2, offering(FIRST)))


def test_more_than_are_kept_push_out_the_one_unused_the_longest() -> None:
    here = Here(most_kept=2)
    for number, ids in enumerate(((1, 2, 3), (4, 5, 6), (1, 2, 3, 9), (7, 8, 9)), 1):
        session = bytes([number]) * 16
        here.legs.opened(number, replace(offering(FIRST, ids), session=session))
        leg = next(iter(here.legs.legs()))
        if not leg.admitted:
            here.take(number, sent(1, 0, ids))
        else:
            here.take(number, sent(2, PAGE, ids[PAGE:]))
        ended = here.legs.received(number, Close())
    freed = [action.leg for action in ended if isinstance(action, Forget)]
    kept = [held.pages.digests for held in here.sharing._kept.values()]
    assert kept == [digests((1, 2, 3, 9)), digests((7, 8, 9))]
    assert len(freed) == 1
    assert Grace(freed[0], is_running=False) in ended


# --- the client ---------------------------------------------------------------------------------


def session_with(ids: Sequence[int]) -> tuple[Session, list[object]]:
    links = count(1)
    session = Session(
        session=SESSION,
        client="me",
        fingerprint="f",
        max_tokens=64,
        sign=lambda opened: opened,
        new_link=lambda: next(links),
        prefix=digests(ids),
        page=PAGE,
    )
    return session, list(session.take_route([("one", "0:4"), ("two", "4:8")]))


def opens(actions: Iterable[object]) -> list[Open]:
    firsts: list[Message] = [a.first for a in actions if isinstance(a, Dial)]
    firsts += [a.message for a in actions if isinstance(a, Send)]
    return [message for message in firsts if isinstance(message, Open)]


def test_a_client_offers_the_pages_that_its_first_steps_hold() -> None:
    session, actions = session_with(TEXT[:4])
    assert [opened.prefix for opened in opens(actions)] == [b"".join(digests(TEXT[:4]))]
    assert session.pages == 2
    for serial, start in ((1, 0), (2, PAGE)):
        step = said(session.step(start, ids_payload(TEXT[start : start + 2]), "none"), 1)
        assert serials(step) == [serial]  # at once: ids are small
    session.received(1, Ready(have=1))
    assert session.shared == PAGE


@pytest.mark.parametrize(
    ("start", "ids", "wanted"),
    [
        (0, TEXT[:3], "none"),  # no page
        (0, TEXT[:1], "none"),
        (0, (9, 9), "none"),  # another text
        (0, TEXT[:2], "last"),  # who holds the page computes no output for it
    ],
)
def test_a_client_that_offered_pages_cannot_begin_otherwise(
    start: int, ids: tuple[int, ...], wanted: Wanted
) -> None:
    session, _ = session_with(TEXT[:4])
    with pytest.raises(ValueError, match="opened with another page 1"):
        session.step(start, ids_payload(ids), wanted)


def test_a_new_first_hop_is_offered_the_pages_and_who_begins_anew_is_not() -> None:
    session, _ = session_with(TEXT[:4])
    for start in (0, PAGE):
        session.step(start, ids_payload(TEXT[start : start + 2]), "none")
    hops = [HopName("other", "0:4", "new"), HopName("two", "4:8", "keep")]
    (opened,) = opens(session.reroute(hops))
    assert opened.prefix == b"".join(digests(TEXT[:4]))
    (opened,) = opens(session.take_route([("one", "0:4"), ("two", "4:8")]))
    assert opened.prefix == b""
    session.received(session._uplink.link if session._uplink else 0, Ready(have=2))
    assert session.shared == 0  # it may have them of this session


def test_pages_that_the_client_rolled_back_are_not_offered() -> None:
    session, _ = session_with(TEXT[:4])
    for start in (0, PAGE):
        session.step(start, ids_payload(TEXT[start : start + 2]), "none")
    session.step(3, ids_payload([1]), "last")
    hops = [HopName("other", "0:4", "new"), HopName("two", "4:8", "keep")]
    (opened,) = opens(session.reroute(hops))
    assert opened.prefix == digests(TEXT[:4])[0]


def test_a_stream_that_is_left_behind_says_nothing_of_pages() -> None:
    here = Here()
    here.live_through(FIRST)
    here.legs.opened(2, offering(FIRST))
    taken_up = here.legs.opened(3, replace(offering(FIRST), epoch=2))
    assert said(taken_up, 2) == [Gone(reason="superseded")]
    assert said(taken_up, 3) == [ready(2)]
    assert Fork not in kinds(taken_up)


def test_pages_are_no_part_of_what_the_client_signs() -> None:
    assert offering(FIRST).signed_bytes() == replace(FIRST, session=b"n" * 16).signed_bytes()
