"""What a hop holds of one session: a sans-IO state machine.

A leg listens to one up stream, feeds its steps to the executor in order of serial, keeps what
came out as its history, and sends its next hop (or, on the last hop, the client) whatever that
one lacks. `legs` decides which streams and epochs reach it.

1. A step is admitted once, in order of serial, on the true prefix: `start` is at most the length.
2. Nothing is sent beyond the receiver's credit, and nothing twice on one stream.
3. The next hop is dialled at most once in an epoch.
4. A lost up stream frees nothing: the leg goes on computing what it admitted.
5. Only what was sent on, and what the live link does not lack, is ever dropped from the history;
   a receiver that lacks it is sent nothing, and the client is told.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from swarm.chain import Dial, Entry, History, Inlet, Outlet, Payload, Send, Shut, step_of
from swarm.messages import (
    Close,
    Credit,
    Fault,
    FaultKind,
    Gone,
    HopName,
    HopTime,
    Message,
    Open,
    Output,
    Ready,
    Refused,
    Step,
    payload_bytes,
)


@dataclass(frozen=True, slots=True)
class Compute:
    """Give the step to the executor, for the cache of the leg with this number."""

    leg: int
    span: str
    step: Step


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the cache of the leg with this number; its results no longer matter."""

    leg: int


@dataclass(frozen=True, slots=True)
class Grace:
    """Start (or stop) the grace time of a leg without up stream."""

    leg: int
    is_running: bool


Action = Dial | Send | Shut | Compute | Forget | Grace
Emit = Callable[[Action], None]
NewLink = Callable[["Leg"], int]

_DROPPED = "what this hop had sent on is no longer held here"


def step_length(step: Step) -> int:
    """How many positions the step holds, 0 if its payload has no such axis."""
    tensor = step.payload.get("ids") or step.payload.get("hidden")
    return tensor.shape[1] if tensor is not None and len(tensor.shape) >= 2 else 0


class Leg:
    """One span of one session on one peer."""

    def __init__(self, number: int, opened: Open, up: int, emit: Emit, new_link: NewLink) -> None:
        self.number = number
        self.client = opened.client
        self.session = opened.session
        self.span = opened.hops[opened.at].span
        self.max_tokens = opened.max_tokens
        self.opened = opened
        self.up: int | None = up
        self.down: Outlet | None = None
        self.next: HopName | None = None
        self.downlink: Outlet | None = None
        self.downlink_epoch = -1
        self.admitted = 0
        self.length = 0
        self.history = History()
        self.sent_on = 0  # the newest serial that any next hop, or the client, was sent
        self.has_failed = False
        self._waiting: deque[tuple[Step, int, int]] = deque()  # step, the link it came by, bytes
        self._inlet = Inlet()
        self._emit = emit
        self._new_link = new_link

    @property
    def epoch(self) -> int:
        """The epoch of the newest Open."""
        return self.opened.epoch

    @property
    def is_last(self) -> bool:
        """True on the hop whose outputs go to the client."""
        return self.opened.at + 1 == len(self.opened.hops)

    @property
    def droppable(self) -> int:
        """The serial up to which the history was sent on, and is not lacked by the live link."""
        link = self.downlink if self.is_last else self.down
        if link is None:
            return self.sent_on
        return link.sent if link.is_known else 0

    def take_up(self, opened: Open, up: int) -> None:
        """Listen to `up`, the newest stream, which the leg was not listening to before."""
        if self.up is not None:
            self._emit(Send(self.up, Gone(reason="superseded")))
            self._emit(Shut(self.up))
        else:
            self._emit(Grace(self.number, is_running=False))
        self.up = up
        self._inlet = Inlet()
        self._emit(Send(up, Ready(have=self.admitted)))
        self.reroute(opened)

    def reroute(self, opened: Open) -> None:
        """Take epoch and the rest of the route at once, before queued steps, and pass them on."""
        self.opened = opened
        if self.is_last:
            self._leave_next()
            self.next = None
            self._flush()
            return
        following = opened.hops[opened.at + 1]
        is_same = self.next is not None and (self.next.peer, self.next.span) == (
            following.peer,
            following.span,
        )
        self.next = following
        if is_same and self.down is not None and following.mode != "anew":
            self._emit(Send(self.down.link, self._passed_on()))
            return
        self._leave_next()
        self.dial()

    def dial(self) -> None:
        """Open the stream to the next hop and send it what it may lack."""
        if self.next is None:
            return
        is_known = self.next.mode != "keep" and self.history.reaches(0)
        self.down = Outlet(self._new_link(self), self.epoch, is_known=is_known)
        self._emit(Dial(self.down.link, self.next.peer, self._passed_on()))
        self._flush()

    def admit(self, step: Step, link: int) -> None:
        """Take a step from the up stream, once."""
        if self.has_failed:
            return
        size = payload_bytes(step.payload)
        self._inlet.arrive(size)
        if step.serial <= self.admitted:
            self._give_back(link, size)
            return
        length = step_length(step)
        if step.after > self.admitted or step.start > self.length or length == 0:
            self._accuse_sender("a step does not follow the one before")
            return
        if step.start + length > self.max_tokens:
            self._accuse_sender("the session is longer than it asked for")
            return
        if not self._inlet.is_within_credit:
            self._accuse_sender("more was sent than credit allows")
            return
        self.admitted = step.serial
        self.length = step.start + length
        self._waiting.append((step, link, size))
        self._emit(Compute(self.number, self.span, step))

    def computed(self, serial: int, payload: Payload, time: HopTime) -> None:
        """The executor finished the oldest admitted step."""
        if self.has_failed:
            return
        step, link, size = self._waiting.popleft()
        if step.serial != serial:
            raise ValueError(f"serial {serial} was computed before {step.serial}")
        self._give_back(link, size)
        times = (*step.times, time)
        self.history.append(Entry(serial, step.start, payload, step.wanted, step.wish, times))
        self._flush()

    def failed(self, message: str) -> None:
        """The executor could not compute a step: nothing after it can be computed here."""
        if self.has_failed:
            return
        self._waiting.clear()
        self.has_failed = True
        self._accuse("failed", self._own_peer, message)

    def drain(self) -> None:
        """Ask the client to take another peer for these blocks; until then go on as before."""
        self._accuse("draining", self._own_peer, "this server is leaving")

    def drop_history(self) -> None:
        """Give up what `droppable` says, to save memory."""
        self.history.drop(self.droppable)

    def from_next(self, message: Message) -> None:
        """The down stream said something."""
        if self.down is None:
            return
        match message:
            case Ready(have=have):
                if not self.down.is_known or have > self.down.sent:
                    self.down.sent, self.down.is_known = have, True
                self._flush()
            case Credit(more=more):
                self.down.refill(more)
                self._flush()
            case Fault():
                if self.up is not None:
                    self._emit(Send(self.up, message))
            case Gone(reason="superseded") | Refused(reason="stale"):
                dialled_in = self.down.epoch
                self._emit(Shut(self.down.link))
                self.down = None
                if self.epoch > dialled_in:
                    self.dial()
            case Refused(message=why, retry_seconds=seconds):
                self._emit(Shut(self.down.link))
                self.next_ended("refused", why, seconds)
            case _:
                self._emit(Shut(self.down.link))
                self.next_ended("closed", "its stream was ended")

    def next_ended(self, failure: FaultKind, message: str, retry_seconds: float = 0.0) -> None:
        """The down stream broke or could not be opened: say so, and wait for the next route."""
        self.down = None
        if self.next is not None:
            self._accuse(failure, self.next.peer, message, self.next.span, retry_seconds)

    def up_ended(self) -> None:
        """The up stream is gone; hold everything for a grace time."""
        self.up = None
        self._emit(Grace(self.number, is_running=True))

    def attach(self, link: int, epoch: int, have: int) -> None:
        """Send outputs after serial `have` to this downlink, if it is the newest."""
        if epoch <= self.downlink_epoch:
            self._emit(Send(link, Gone(reason="superseded")))
            self._emit(Shut(link))
            return
        if self.downlink is not None:
            self._emit(Send(self.downlink.link, Gone(reason="superseded")))
            self._emit(Shut(self.downlink.link))
        self.downlink, self.downlink_epoch = Outlet(link, epoch, sent=have), epoch
        self._flush()

    def adopt(self, downlink: Outlet) -> None:
        """Take over the downlink, with its credit, of the leg that held these blocks before."""
        self.downlink, self.downlink_epoch = downlink, downlink.epoch

    def from_client(self, message: Message) -> None:
        """The downlink said something."""
        if self.downlink is not None and isinstance(message, Credit):
            self.downlink.refill(message.more)
            self._flush()

    def downlink_ended(self) -> None:
        """The client's downlink is gone; outputs are kept until it attaches again."""
        self.downlink = None

    def give_downlink(self) -> Outlet | None:
        """Let go of the downlink without ending it: another leg of these blocks takes it over."""
        downlink, self.downlink = self.downlink, None
        return downlink

    def free(self, *, is_session_over: bool) -> None:
        """Give everything back. A session that is over is closed below, a replaced leg is not."""
        if self.down is not None:
            ending: Message = Close() if is_session_over else Gone(reason="superseded")
            self._emit(Send(self.down.link, ending))
            self._emit(Shut(self.down.link))
            self.down = None
        if self.up is not None:
            self._emit(Send(self.up, Gone(reason="done" if is_session_over else "superseded")))
            self._emit(Shut(self.up))
        else:
            self._emit(Grace(self.number, is_running=False))
        if self.downlink is not None:
            self._emit(Send(self.downlink.link, Gone(reason="forgotten")))
            self._emit(Shut(self.downlink.link))
            self.downlink = None
        self._emit(Forget(self.number))

    def _flush(self) -> None:
        if self.is_last:
            self._flush_outputs()
        elif self.down is not None:
            self._flush_steps(self.down)

    def _flush_steps(self, down: Outlet) -> None:
        if down.is_known and not self.history.reaches(down.sent):
            self._leave_next()
            self._accuse("dropped", self._own_peer, _DROPPED)
            return
        for entry in down.ready(self.history):
            self._emit(Send(down.link, step_of(entry, after=down.sent)))
            self.sent_on = max(self.sent_on, entry.serial)

    def _flush_outputs(self) -> None:
        if self.downlink is None:
            return
        if not self.history.reaches(self.downlink.sent, is_downlink=True):
            if self.downlink.epoch <= self.epoch:  # else its Open comes yet, and may begin anew
                self._emit(Send(self.downlink.link, self._fault("dropped", _DROPPED)))
                self._emit(Shut(self.downlink.link))
                self.downlink = None
            return
        for entry in self.downlink.ready(self.history, is_downlink=True):
            self.sent_on = max(self.sent_on, entry.serial)
            output = Output(
                serial=entry.serial,
                start=entry.start,
                times=entry.times,
                payload=entry.payload,
            )
            self._emit(Send(self.downlink.link, output))

    def _give_back(self, link: int, size: int) -> None:
        if link == self.up:
            for credit in self._inlet.done(size):
                self._emit(Send(link, credit))

    def _leave_next(self) -> None:
        if self.down is not None:
            self._emit(Send(self.down.link, Gone(reason="superseded")))
            self._emit(Shut(self.down.link))
            self.down = None

    @property
    def _own_peer(self) -> str:
        return self.opened.hops[self.opened.at].peer

    def _passed_on(self) -> Open:
        return msgspec.structs.replace(self.opened, at=self.opened.at + 1)

    def _accuse_sender(self, message: str) -> None:
        opened = self.opened
        if opened.at:
            before = opened.hops[opened.at - 1]
            self._accuse("broke_word", before.peer, message, before.span)
        else:
            self._accuse("broke_word", opened.client, message)

    def _accuse(
        self,
        failure: FaultKind,
        peer: str,
        message: str,
        span: str = "",
        retry_seconds: float = 0.0,
    ) -> None:
        """Tell the client, by way of the hops before, who failed."""
        if self.up is not None:
            fault = self._fault(failure, message, peer, span, retry_seconds)
            self._emit(Send(self.up, fault))

    def _fault(
        self,
        failure: FaultKind,
        message: str,
        peer: str = "",
        span: str = "",
        retry_seconds: float = 0.0,
    ) -> Fault:
        return Fault(
            epoch=self.epoch,
            peer=peer or self._own_peer,
            span=span or self.span,
            failure=failure,
            message=message[:512],
            retry_seconds=retry_seconds,
        )
