"""One conversation along a route, from the client's side: a sans-IO state machine.

The client's log of steps is the history of the first link: whatever route a session takes, its
hops are sent what they lack of it. On a trouble the caller repairs the route (`reroute`: healthy
hops keep what they have) or, when in doubt, finds a fresh one over which the whole log is replayed
(`take_route`): same session, next epoch, text unchanged.

1. Outputs are delivered in order of serial, each wanted serial once.
2. A serial is never used again for other content.
3. A trouble is reported for the current epoch only; only `reroute` and `take_route` act on it.
4. A session that was opened with pages begins with steps of just these, a page each: only then may
   a hop that holds pages take them for the first steps.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from swarm.chain import (
    EARLY_CREDIT,
    Dial,
    Entry,
    History,
    Inlet,
    Outlet,
    Payload,
    Send,
    Shut,
    step_of,
)
from swarm.messages import (
    Attach,
    Close,
    Credit,
    Fault,
    FaultKind,
    Gone,
    HopName,
    Message,
    Mode,
    Open,
    Output,
    Ready,
    Refused,
    Wanted,
    Wish,
    payload_bytes,
)
from swarm.prefix import PAGE_POSITIONS, Digests, length_of


@dataclass(frozen=True, slots=True)
class Deliver:
    """An output that the caller waits for."""

    output: Output


@dataclass(frozen=True, slots=True)
class Trouble:
    """The route failed: who, at which span, how. `peer` is empty when nobody is to blame.

    "dropped": what a repair needs is no longer held; only a fresh route helps.

    `is_downlink`: the stream on which the last hop answers ended, which alone proves nothing of it.
    """

    failure: FaultKind | Literal["forgotten"]
    peer: str
    span: str
    message: str
    retry_seconds: float = 0.0
    is_downlink: bool = False


Action = Dial | Send | Shut | Deliver | Trouble
Sign = Callable[[Open], Open]


class Session:
    """The client's machine. `sign` stamps and signs each Open; links are named by `new_link`.

    `prefix`: the digests of the `page` positions long pages that its first steps will hold, one
    each (see `swarm.prefix`).
    """

    def __init__(
        self,
        *,
        session: bytes,
        client: str,
        fingerprint: str,
        max_tokens: int,
        sign: Sign,
        new_link: Callable[[], int],
        prefix: Sequence[bytes] = (),
        page: int = PAGE_POSITIONS,
    ) -> None:
        self.session = session
        self.client = client
        self.fingerprint = fingerprint
        self.max_tokens = max_tokens
        self.epoch = 0
        self.route: tuple[HopName, ...] = ()
        self.log = History()
        self.got = 0
        self.pages = len(prefix)  # how many of the first steps are pages
        self.shared = 0  # positions of them that the first hop held already
        self._prefix = tuple(prefix)
        self._page = page
        self._paged = Digests(fingerprint, page)
        self._serial = 0
        self._unanswered: deque[tuple[int, int]] = deque()  # serial, start
        self._uplink: Outlet | None = None
        self._downlink: int | None = None
        self._inlet = Inlet(is_fixed=True)
        self._positions = 0
        self._sign = sign
        self._new_link = new_link
        self._actions: list[Action] = []

    @property
    def is_waiting(self) -> bool:
        """True while an output is wanted that has not come."""
        return bool(self._unanswered)

    def take_route(self, hops: Sequence[tuple[str, str]]) -> list[Action]:
        """Open the session, or open it anew, over these (peer, span), and send the whole log."""
        mode: Mode = "anew" if self.epoch else "new"
        self.epoch += 1
        self.route = tuple(HopName(peer, span, mode) for peer, span in hops)
        self._leave()
        self._dial_first()
        self._attach()
        self._flush()
        return self._taken()

    def reroute(
        self, hops: Sequence[HopName], *, redial: bool = False, attach: bool = False
    ) -> list[Action]:
        """Take up a repaired route under the next epoch, over the links that still live.

        Hops that stay have mode keep, others new. `redial` gives up a living uplink, `attach` a
        living downlink, because their silence is the trouble.
        """
        self.epoch += 1
        before, self.route = self.route, tuple(hops)
        if redial or not _is_same(before[0], hops[0]) or self._uplink is None:
            self._end_uplink()
            self._dial_first()
        else:
            self._actions.append(Send(self._uplink.link, self._open()))
        if attach or not _is_same(before[-1], hops[-1]) or self._downlink is None:
            self._end_downlink()
            self._attach()
        self._flush()
        return self._taken()

    def step(
        self,
        start: int,
        payload: Payload,
        wanted: Wanted,
        wish: Wish | None = None,
        sequence_length: int = 0,
    ) -> list[Action]:
        """Send inputs for positions from `start`; earlier inputs from there on are rolled back.

        ValueError if the session was opened with pages, and this is not the next of them, or wants
        an output: a hop that holds the page computes none.
        """
        if self._serial < self.pages:
            self._check_page(start, payload, wanted, sequence_length)
        else:
            self._prefix = self._prefix[: start // self._page]
        self._serial += 1
        self._positions = start + next(iter(payload.values())).shape[1]
        while self._unanswered and self._unanswered[-1][1] >= start:
            self._unanswered.pop()  # it leaves the log: no replay would answer it
        if wanted != "none":
            self._unanswered.append((self._serial, start))
        entry = Entry(self._serial, start, payload, wanted, wish, sequence_length=sequence_length)
        self.log.append(entry)
        self._flush()
        return self._taken()

    def received(self, link: int, message: Message) -> list[Action]:
        """A message came over a link. Those of links left behind are ignored."""
        if self._uplink is not None and link == self._uplink.link:
            self._from_first(self._uplink, message)
        elif link == self._downlink:
            self._from_last(link, message)
        return self._taken()

    def ended(self, link: int, failure: FaultKind, message: str) -> list[Action]:
        """A link ended, broke, or could not be opened."""
        if self._uplink is not None and link == self._uplink.link:
            self._uplink = None
            first = self.route[0]
            self._actions.append(Trouble(failure, first.peer, first.span, message))
        elif link == self._downlink:
            self._downlink = None
            last = self.route[-1]
            self._actions.append(Trouble(failure, last.peer, last.span, message, is_downlink=True))
        return self._taken()

    def close(self) -> list[Action]:
        """End the session: every hop frees what it holds."""
        if self._uplink is not None:
            self._actions.append(Send(self._uplink.link, Close()))
            self._actions.append(Shut(self._uplink.link))
            self._uplink = None
        if self._downlink is not None:
            self._actions.append(Send(self._downlink, Gone(reason="done")))
            self._actions.append(Shut(self._downlink))
            self._downlink = None
        return self._taken()

    def _from_first(self, uplink: Outlet, message: Message) -> None:
        match message:
            case Ready():
                if self.epoch == 1:  # in later ones it may have them of this session
                    self.shared = min(message.have, self.pages) * self._page
                uplink.is_ready(message)
                self._flush()
            case Credit():
                uplink.refill(message)
                self._flush()
            case Fault(failure="dropped", epoch=epoch) if epoch == self.epoch:
                self._actions.append(Trouble("dropped", "", message.span, message.message))
            case Fault(epoch=epoch) if epoch == self.epoch:
                self._trouble(message.failure, message.peer, message.span, message)
            case Fault():
                pass  # of an older epoch: whom it accuses may be gone from the route
            case Gone(reason="superseded") if uplink.epoch < self.epoch:
                self._end_uplink()  # the first hop begins its leg again, on a stream of its own
                self._dial_first()
                self._flush()
            case Refused():
                self._end_uplink()
                self._trouble("refused", self.route[0].peer, self.route[0].span, message)
            case _:
                self._end_uplink()
                self._ended_unasked(self.route[0])

    def _from_last(self, link: int, message: Message) -> None:
        match message:
            case Output():
                self._output(link, message)
            case Fault(failure="dropped"):  # of any epoch: this downlink is the newest
                self._end_downlink()
                self._actions.append(Trouble("dropped", "", message.span, message.message))
            case Refused():
                self._end_downlink()
                self._trouble("refused", self.route[-1].peer, self.route[-1].span, message)
            case Gone():
                self._end_downlink()
                self._actions.append(
                    Trouble("forgotten", "", self.route[-1].span, "forgotten", is_downlink=True)
                )
            case _:
                self._end_downlink()
                self._ended_unasked(self.route[-1])

    def _check_page(
        self, start: int, payload: Payload, wanted: Wanted, sequence_length: int
    ) -> None:
        """ValueError unless the next step is the page that the first Open promised."""
        count = self._serial + 1
        self._paged.add(start, payload, sequence_length)
        is_next = start == self._serial * self._page and length_of(payload) == self._page
        is_page = self._paged.pages == list(self._prefix[:count])
        if not is_next or not is_page or wanted != "none":
            raise ValueError(f"the session was opened with another page {count}")

    def _ended_unasked(self, hop: HopName) -> None:
        """A hop ended its stream, or said something that makes no sense there."""
        self._actions.append(Trouble("broke_word", hop.peer, hop.span, "it ended its stream"))

    def _output(self, link: int, output: Output) -> None:
        size = payload_bytes(output.payload)
        self._inlet.arrive(size)
        for credit in self._inlet.done(size):
            self._actions.append(Send(link, credit))
        if self._unanswered and output.serial == self._unanswered[0][0]:
            self.got, _ = self._unanswered.popleft()
            self._actions.append(Deliver(output))

    def _trouble(self, failure: FaultKind, peer: str, span: str, message: Fault | Refused) -> None:
        self._actions.append(Trouble(failure, peer, span, message.message, message.retry_seconds))

    def _open(self) -> Open:
        return self._sign(
            Open(
                session=self.session,
                epoch=self.epoch,
                hops=self.route,
                at=0,
                client=self.client,
                fingerprint=self.fingerprint,
                max_tokens=self.max_tokens,
                valid_until=0.0,
                positions=self._positions,
                window=EARLY_CREDIT,
                prefix=b"" if self.route[0].mode == "anew" else b"".join(self._prefix),
            )
        )

    def _dial_first(self) -> None:
        first = self.route[0]
        self._uplink = Outlet(self._new_link(), self.epoch, is_known=first.mode != "keep")
        self._actions.append(Dial(self._uplink.link, first.peer, self._open()))

    def _attach(self) -> None:
        self._downlink = self._new_link()
        self._inlet = Inlet(is_fixed=True)
        last = self.route[-1]
        attach = Attach(session=self.session, epoch=self.epoch, span=last.span, have=self.got)
        self._actions.append(Dial(self._downlink, last.peer, attach))

    def _leave(self) -> None:
        if self._uplink is not None:
            self._actions.append(Send(self._uplink.link, Gone(reason="superseded")))
            self._end_uplink()
        if self._downlink is not None:
            self._actions.append(Send(self._downlink, Gone(reason="superseded")))
            self._end_downlink()

    def _end_uplink(self) -> None:
        if self._uplink is not None:
            self._actions.append(Shut(self._uplink.link))
            self._uplink = None

    def _end_downlink(self) -> None:
        if self._downlink is not None:
            self._actions.append(Shut(self._downlink))
            self._downlink = None

    def _flush(self) -> None:
        if self._uplink is not None:
            for entry in self._uplink.ready(self.log):
                step = step_of(entry, after=self._uplink.sent)
                self._actions.append(Send(self._uplink.link, step))

    def _taken(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions


def _is_same(one: HopName, other: HopName) -> bool:
    return (one.peer, one.span) == (other.peer, other.span)
