"""All legs of one peer: which streams and epochs may reach them. Sans-IO, as the legs are.

1. A leg is known by client, session and span; two legs of a session never share a block.
2. A leg listens to one up stream, that of the highest epoch; nothing older is heard after it.
3. What comes from a stream that is not a current up stream, down stream or downlink is ignored.
4. A downlink is accepted from the client that the leg's Open names, and from nobody else.
5. An Attach that comes before its Open waits for it, for one grace time.
6. The highest epoch of a session is known for one grace time after its last leg is freed.
7. `history_bytes` is the sum over the legs' histories, `waiting_bytes` over their steps that are
   not computed yet: never more than `most_waiting`, unless they are all of one leg.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import msgspec

from swarm.chain import FIRST_CREDIT, Payload, Send, Shut, Spare, fair_window
from swarm.leg import Action, Begun, Compute, Forget, Grace, Leg, overlap
from swarm.messages import (
    Attach,
    Close,
    FaultKind,
    Gone,
    HopTime,
    Message,
    Open,
    Output,
    Refused,
    Step,
)
from swarm.sharing import Sharing

Admission = Callable[[Open], Refused | None]
_Session = tuple[str, bytes]  # client, session

_MOST_PARKED = 64
# Enough for a chunk of each of 32 sessions; who knows the machine can say better.
WAITING_BYTES = 256 << 20
# Until what was given to the executor is computed.
_SHED_SECONDS = 2.0
_STALE = Refused(reason="stale", message="a newer epoch was seen here")


@dataclass(frozen=True, slots=True)
class _Parked:
    """An Attach that came before its Open."""

    link: int
    client: str
    attach: Attach


class Legs:
    """The legs of one peer.

    `admission` says whether a new leg may begin (None) or why not. Links are numbered by
    `new_link`, for the streams that others open to us too. `most_waiting`: bytes of steps that may
    wait; every leg's links are given a fair window of them. `sharing`: what legs may begin with;
    without it they begin with nothing, and leave nothing behind.
    """

    def __init__(
        self,
        admission: Admission,
        new_link: Callable[[], int],
        most_waiting: int = WAITING_BYTES,
        sharing: Sharing | None = None,
    ) -> None:
        self._admission = admission
        self._sharing = Sharing("", page=0) if sharing is None else sharing
        self._sharing.on_drop = self._let_go
        self._most_waiting = most_waiting
        self._window = FIRST_CREDIT
        self._new_link = new_link
        self._legs: dict[tuple[str, bytes, str], Leg] = {}
        self._by_link: dict[int, Leg] = {}
        self._by_number: dict[int, Leg] = {}  # idle longest first
        self._numbers = count(1)
        self._highest: dict[_Session, int] = {}
        self._parked: dict[int, _Parked] = {}  # by grace number
        self._ended: dict[int, _Session] = {}  # by grace number
        self._actions: list[Action] = []
        self.history_bytes = 0
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._legs)

    @property
    def free_of_sessions(self) -> bool:
        """True when nothing of any session is held here, but what is kept for others."""
        return not self._legs and not self._parked

    def legs(self) -> Iterator[Leg]:
        """All legs, oldest first."""
        return iter(tuple(self._legs.values()))

    def opened(self, link: int, opened: Open) -> list[Action]:
        """The first message of a new stream was this Open, checked and signed."""
        self._open(link, opened)
        return self._taken()

    def attached(self, link: int, client: str, attach: Attach) -> list[Action]:
        """The first message of a new stream from `client` was this Attach."""
        key = (client, attach.session, attach.span)
        leg = self._legs.get(key)
        if leg is not None:
            self._attach(leg, link, attach)
        elif len(self._parked) >= _MOST_PARKED:
            self._end(link, Refused(reason="full", message="too many downlinks wait for a session"))
        else:
            self._park(_Parked(link, client, attach))
        return self._taken()

    def received(self, link: int, message: Message) -> list[Action]:
        """A later message came over a stream."""
        leg = self._by_link.get(link)
        if leg is None:
            return []
        if leg.up == link:
            self._from_up(leg, link, message)
        elif leg.down is not None and leg.down.link == link:
            leg.from_next(message)
        elif leg.downlink is not None and leg.downlink.link == link:
            leg.from_client(message)
        return self._taken()

    def ended(self, link: int, failure: FaultKind, message: str) -> list[Action]:
        """A stream ended, broke, or could not be opened."""
        leg = self._by_link.pop(link, None)
        if leg is None:
            pass
        elif leg.up == link:
            leg.up_ended()
        elif leg.down is not None and leg.down.link == link:
            leg.next_ended(failure, message)
        elif leg.downlink is not None and leg.downlink.link == link:
            leg.downlink_ended()
        for number, parked in tuple(self._parked.items()):
            if parked.link == link:
                del self._parked[number]
                self._emit(Grace(number, is_running=False))
        return self._taken()

    def computed(
        self,
        number: int,
        serial: int,
        payload: Payload,
        time: HopTime,
        shortest_fork: int | None = None,
    ) -> list[Action]:
        """The executor finished a step of the leg with this number: see `Leg.computed`."""
        leg = self._by_number.get(number)
        if leg is not None:
            with self._counting(leg):
                leg.computed(serial, payload, time, shortest_fork)
        return self._taken()

    def failed(self, number: int, message: str) -> list[Action]:
        """The executor could not compute a step of the leg with this number."""
        leg = self._by_number.get(number)
        if leg is not None:
            with self._counting(leg):
                leg.failed(message)
        return self._taken()

    def evict(self, number: int, message: str, retry_seconds: float) -> list[Action]:
        """Let the leg with this number give up its cache: see `Leg.evict`."""
        self._sharing.drop(number)
        leg = self._by_number.get(number)
        if leg is not None:
            with self._counting(leg):
                leg.evict(message, retry_seconds)
        return self._taken()

    def drain(self) -> list[Action]:
        """Ask all clients to go elsewhere, and keep nothing for others."""
        self._sharing.end()
        for leg in self.legs():
            leg.drain()
        return self._taken()

    def spares(self) -> Iterator[Spare]:
        """What each leg could drop; kept ones first, then idle longest (no step admitted, none
        sent) first.
        """
        yield from self._sharing.spares()
        for number, leg in self._by_number.items():
            yield Spare(number, leg.history.bytes_to(leg.droppable))

    def drop_history(self, number: int) -> list[Action]:
        """Let the leg with this number give up what it has sent on; a kept one goes altogether."""
        self._sharing.drop(number)
        if (leg := self._by_number.get(number)) is not None:
            with self._counting(leg):
                leg.drop_history()
        return self._taken()

    def grace_over(self, number: int) -> list[Action]:
        """The grace time of this number ran out: nothing is left of what waited."""
        ended = self._ended.pop(number, None)
        if ended is not None and ended not in self._ended.values() and not self._has_legs(ended):
            self._highest.pop(ended, None)
        self._sharing.drop(number)
        parked = self._parked.pop(number, None)
        if parked is not None:
            self._end(parked.link, Gone(reason="forgotten"))
        leg = self._by_number.get(number)
        if leg is not None and leg.up is None:
            self._free(leg, is_session_over=True)
        return self._taken()

    def _open(self, link: int, opened: Open) -> None:
        session = (opened.client, opened.session)
        hop = opened.hops[opened.at]
        leg = self._legs.get((*session, hop.span))
        if opened.epoch < self._highest.get(session, 0) or (
            leg is not None and opened.epoch <= leg.epoch
        ):
            self._end(link, _STALE)
            return
        self._highest[session] = opened.epoch
        if leg is not None and not leg.is_spent and hop.mode != "anew":
            self._by_link[link] = leg
            leg.take_up(opened, link)
        else:
            self._begin(link, opened, leg)

    def _begin(self, link: int, opened: Open, older: Leg | None) -> None:
        session = (opened.client, opened.session)
        span = opened.hops[opened.at].span
        downlink = None
        if older is not None:
            downlink = older.give_downlink()  # perhaps of an Attach that overtook this Open
            self._free(older, is_session_over=False)
        for other in self.legs():
            is_same = (other.client, other.session) == session
            if is_same and other.epoch < opened.epoch and overlap(other.span, span):
                self._free(other, is_session_over=False)
        refused = self._admission(opened)
        if refused is not None:
            self._end(link, refused)
            if downlink is not None:
                self._end(downlink.link, Gone(reason="forgotten"))
            self._remember(session)
            return
        self._share_windows(len(self._legs) + 1)
        leg = self._new_leg(link, opened)
        self._legs[(*session, span)] = leg
        self._by_link[link] = leg
        self._by_number[leg.number] = leg
        self._emit(Begun(leg.number, opened))
        self._begin_alike(leg, opened)
        leg.welcome(opened, link)
        leg.reroute(opened)
        if downlink is not None:
            self._by_link[downlink.link] = leg
            leg.adopt(downlink)
        self._adopt_parked(leg)

    def _new_leg(self, link: int, opened: Open) -> Leg:
        bare = msgspec.structs.replace(opened, prefix=b"")  # looked at once
        pages, number = self._sharing.empty(), next(self._numbers)
        return Leg(number, bare, link, self._emit, self._dialled, self._window, pages)

    def _begin_alike(self, leg: Leg, opened: Open) -> None:
        """Let the leg begin with what others have in common with it, if that is known."""
        beginning = self._sharing.beginning(opened)
        if beginning is not None:
            with self._counting(leg):
                leg.begin_with(beginning)

    def _let_go(self, number: int) -> None:
        """A kept leg goes."""
        self._emit(Grace(number, is_running=False))
        self._emit(Forget(number))

    def _adopt_parked(self, leg: Leg) -> None:
        for number, parked in tuple(self._parked.items()):
            attach = parked.attach
            if (parked.client, attach.session, attach.span) == (leg.client, leg.session, leg.span):
                del self._parked[number]
                self._emit(Grace(number, is_running=False))
                self._attach(leg, parked.link, attach)

    def _attach(self, leg: Leg, link: int, attach: Attach) -> None:
        self._by_link[link] = leg
        leg.attach(link, attach.epoch, attach.have)

    def _park(self, parked: _Parked) -> None:
        number = next(self._numbers)
        self._parked[number] = parked
        self._emit(Grace(number, is_running=True))

    def _from_up(self, leg: Leg, link: int, message: Message) -> None:
        match message:
            case Step():
                self._admit(leg, message, link)
            case Open() if message.epoch > leg.epoch and leg.is_named_by(message):
                self._reroute(leg, link, message)
            case Close():
                self._free(leg, is_session_over=True, is_closed=True)
            case _:
                self._emit(Shut(link))
                leg.up_ended()

    def _admit(self, leg: Leg, step: Step, link: int) -> None:
        with self._counting(leg):
            leg.admit(step, link)
        if self._most_waiting < self.waiting_bytes != leg.waiting_bytes:
            with self._counting(leg):
                leg.evict("more steps wait here than there is memory for", _SHED_SECONDS)

    def _reroute(self, leg: Leg, link: int, opened: Open) -> None:
        session = (leg.client, leg.session)
        if opened.epoch < self._highest[session]:  # another leg of the session heard a newer one
            self._end(link, _STALE)
            leg.up_ended()
            return
        self._highest[session] = opened.epoch
        if leg.is_spent or opened.hops[opened.at].mode == "anew":
            # It begins again, but on a new stream: on this one the sender counts on what it sent.
            self._end(link, Gone(reason="superseded"))
            leg.up_ended()
        else:
            leg.reroute(opened)

    def _free(self, leg: Leg, *, is_session_over: bool, is_closed: bool = False) -> None:
        is_kept = is_closed and self._sharing.keep(leg)
        if not is_kept:
            self._sharing.leave(leg.number)
        leg.free(is_session_over=is_session_over, is_kept=is_kept)
        self.history_bytes -= leg.history.byte_count
        self.waiting_bytes -= leg.waiting_bytes
        del self._legs[(leg.client, leg.session, leg.span)]
        del self._by_number[leg.number]
        self._share_windows(2 * len(self._legs), is_leaving=True)  # wider if it stays so
        self._remember((leg.client, leg.session))

    @contextmanager
    def _counting(self, leg: Leg) -> Iterator[None]:
        """Keep the sums true while something is done to a leg."""
        history, waiting = leg.history.byte_count, leg.waiting_bytes
        yield
        self._sharing.note(leg)
        self.history_bytes += leg.history.byte_count - history
        self.waiting_bytes += leg.waiting_bytes - waiting

    def _share_windows(self, links: int, *, is_leaving: bool = False) -> None:
        """Give each leg the window that is fair among so many links, as one comes or leaves."""
        window = fair_window(self._most_waiting, links)
        if window == self._window or (is_leaving and window < self._window):
            return
        self._window = window
        for leg in self._legs.values():
            leg.take_window(window)

    def _remember(self, session: _Session) -> None:
        """Tell late Opens from new ones for a while after the last leg."""
        if not self._has_legs(session):
            number = next(self._numbers)
            self._ended[number] = session
            self._emit(Grace(number, is_running=True))

    def _has_legs(self, session: _Session) -> bool:
        return any((leg.client, leg.session) == session for leg in self._legs.values())

    def _dialled(self, leg: Leg) -> int:
        link = self._new_link()
        self._by_link[link] = leg
        return link

    def _end(self, link: int, message: Message) -> None:
        self._emit(Send(link, message))
        self._emit(Shut(link))

    def _emit(self, action: Action) -> None:
        match action:
            case Shut(link=link):
                self._by_link.pop(link, None)
            case Compute(leg=number):
                self._touch(number)
            case Send(link=link, message=Step() | Output()):
                self._touch(self._by_link[link].number)
        self._actions.append(action)

    def _touch(self, number: int) -> None:
        """Note that the leg with this number is not idle."""
        self._by_number[number] = self._by_number.pop(number)

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
