"""All legs of one peer: which streams and epochs may reach them. Sans-IO, as the legs are.

1. A leg is known by client, session and span; two legs of a session never share a block.
2. A leg listens to one up stream, that of the highest epoch; nothing older is heard after it.
3. What comes from a stream that is not a current up stream, down stream or downlink is ignored.
4. A downlink is accepted from the client that the leg's Open names, and from nobody else.
5. An Attach that comes before its Open waits for it, for one grace time.
6. The highest epoch of a session is known for one grace time after its last leg is freed.
7. `history_bytes` is the sum over the legs' histories.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from swarm.chain import Payload, Send, Shut, Spare
from swarm.leg import Action, Compute, Grace, Leg
from swarm.messages import (
    Attach,
    Close,
    FaultKind,
    Gone,
    HopTime,
    Message,
    Open,
    Output,
    Ready,
    Refused,
    Step,
)

Admission = Callable[[Open], Refused | None]
_Session = tuple[str, bytes]  # client, session

_MOST_PARKED = 64
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
    `new_link`, for the streams that others open to us too.
    """

    def __init__(self, admission: Admission, new_link: Callable[[], int]) -> None:
        self._admission = admission
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

    def __len__(self) -> int:
        return len(self._legs)

    @property
    def free_of_sessions(self) -> bool:
        """True when nothing of any session is held here."""
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

    def computed(self, number: int, serial: int, payload: Payload, time: HopTime) -> list[Action]:
        """The executor finished a step of the leg with this number."""
        leg = self._by_number.get(number)
        if leg is not None:
            before = leg.history.byte_count
            leg.computed(serial, payload, time)
            self.history_bytes += leg.history.byte_count - before
        return self._taken()

    def failed(self, number: int, message: str) -> list[Action]:
        """The executor could not compute a step of the leg with this number."""
        leg = self._by_number.get(number)
        if leg is not None:
            leg.failed(message)
        return self._taken()

    def drain(self) -> list[Action]:
        """Ask all clients to go elsewhere."""
        for leg in self.legs():
            leg.drain()
        return self._taken()

    def spares(self) -> Iterator[Spare]:
        """What each leg could drop; idle longest (no step admitted, none sent) first."""
        for number, leg in self._by_number.items():
            yield Spare(number, leg.history.bytes_to(leg.droppable))

    def drop_history(self, number: int) -> None:
        """Let the leg with this number give up what it has sent on; nothing is said of it yet."""
        leg = self._by_number[number]
        before = leg.history.byte_count
        leg.drop_history()
        self.history_bytes += leg.history.byte_count - before

    def grace_over(self, number: int) -> list[Action]:
        """The grace time of this number ran out: nothing is left of what waited."""
        ended = self._ended.pop(number, None)
        if ended is not None and ended not in self._ended.values() and not self._has_legs(ended):
            self._highest.pop(ended, None)
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
        if leg is not None and not leg.has_failed and hop.mode != "anew":
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
            if is_same and other.epoch < opened.epoch and _overlap(other.span, span):
                self._free(other, is_session_over=False)
        refused = self._admission(opened)
        if refused is not None:
            self._end(link, refused)
            if downlink is not None:
                self._end(downlink.link, Gone(reason="forgotten"))
            self._remember(session)
            return
        leg = Leg(next(self._numbers), opened, link, self._emit, self._dialled)
        self._legs[(*session, span)] = leg
        self._by_link[link] = leg
        self._by_number[leg.number] = leg
        self._emit(Send(link, Ready(have=0)))
        leg.reroute(opened)
        if downlink is not None:
            self._by_link[downlink.link] = leg
            leg.adopt(downlink)
        self._adopt_parked(leg)

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
                leg.admit(message, link)
            case Open() if message.epoch > leg.epoch and _is_same_place(message, leg):
                self._reroute(leg, link, message)
            case Close():
                self._free(leg, is_session_over=True)
            case _:
                self._emit(Shut(link))
                leg.up_ended()

    def _reroute(self, leg: Leg, link: int, opened: Open) -> None:
        session = (leg.client, leg.session)
        if opened.epoch < self._highest[session]:  # another leg of the session heard a newer one
            self._end(link, _STALE)
            leg.up_ended()
            return
        self._highest[session] = opened.epoch
        if leg.has_failed or opened.hops[opened.at].mode == "anew":
            # It begins again, but on a new stream: on this one the sender counts on what it sent.
            self._end(link, Gone(reason="superseded"))
            leg.up_ended()
        else:
            leg.reroute(opened)

    def _free(self, leg: Leg, *, is_session_over: bool) -> None:
        leg.free(is_session_over=is_session_over)
        self.history_bytes -= leg.history.byte_count
        del self._legs[(leg.client, leg.session, leg.span)]
        del self._by_number[leg.number]
        self._remember((leg.client, leg.session))

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


def _overlap(one: str, other: str) -> bool:
    (a, b), (c, d) = (map(int, span.split(":")) for span in (one, other))
    return a < d and c < b


def _is_same_place(message: Open, leg: Leg) -> bool:
    if message.at >= len(message.hops):
        return False
    same = (message.client, message.session) == (leg.client, leg.session)
    return same and message.hops[message.at].span == leg.span
