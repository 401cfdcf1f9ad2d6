"""What a leg sends on: its history, the stream to the next hop or the client's downlink.

The onward half of a leg (`swarm.leg` is the half that takes steps in). Sans-IO.

1. Nothing is sent beyond the receiver's credit, and nothing twice on one stream.
2. The next hop is dialled at most once in an epoch.
3. Only what was sent on, and what the live link does not lack, is ever dropped from the history;
   a receiver that lacks it is sent nothing, and the client is told.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from swarm.chain import EARLY_CREDIT, FIRST_CREDIT, Dial, History, Outlet, Send, Shut, step_of
from swarm.messages import (
    Credit,
    Fault,
    FaultKind,
    Gone,
    HopName,
    Message,
    Open,
    Output,
    Ready,
    Refused,
    payload_bytes,
)

Emit = Callable[[Any], None]
"""Takes a Dial, Send or Shut, or one of the leg's own actions."""

_DROPPED = "what this hop had sent on is no longer held here"


class Onward:
    """What a leg sends on, and to whom. `new_link` names a link for the leg it is given."""

    def __init__(self, opened: Open, up: int, emit: Emit, new_link: Callable[[Any], int]) -> None:
        self.span = opened.hops[opened.at].span
        self.opened = opened
        self.up: int | None = up
        self.next: HopName | None = None
        self.down: Outlet | None = None
        self.downlink: Outlet | None = None
        self.downlink_epoch = -1
        self.history = History()
        self.vouched: tuple[bytes, ...] = ()  # digests of the pages its history began with
        self.sent_on = 0  # the newest serial that any next hop, or the client, was sent
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

    @property
    def unsent_bytes(self) -> int:
        """Bytes of the history that the live link, or the next one, has still to be sent."""
        link = self.downlink if self.is_last else self.down
        sent = link.sent if link is not None and link.is_known else self.sent_on
        return sum(
            payload_bytes(entry.payload)
            for entry in self.history.after(sent)
            if not (self.is_last and entry.wanted == "none")
        )

    def dial(self) -> None:
        """Open the stream to the next hop and send it what it may lack."""
        if self.next is None:
            return
        offered = self._offered()
        is_known = self.next.mode != "keep" and self.history.reaches(0) and not offered
        self.down = Outlet(self._new_link(self), self.epoch, is_known=is_known)
        self._emit(Dial(self.down.link, self.next.peer, self._passed_on(offered)))
        self._flush()

    def drop_history(self) -> None:
        """Give up what `droppable` says, to save memory."""
        self.history.drop(self.droppable)

    def from_next(self, message: Message) -> None:
        """The down stream said something."""
        if self.down is None:
            return
        match message:
            case Ready():
                self.down.is_ready(message)
                self._flush()
            case Credit():
                self.down.refill(message)
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

    def attach(self, link: int, epoch: int, have: int) -> None:
        """Send outputs after serial `have` to this downlink, if it is the newest."""
        if epoch <= self.downlink_epoch:
            self._emit(Send(link, Gone(reason="superseded")))
            self._emit(Shut(link))
            return
        if self.downlink is not None:
            self._emit(Send(self.downlink.link, Gone(reason="superseded")))
            self._emit(Shut(self.downlink.link))
        self.downlink = Outlet(link, epoch, sent=have, window=FIRST_CREDIT, step_bytes=0)
        self.downlink_epoch = epoch
        self._flush()

    def adopt(self, downlink: Outlet) -> None:
        """Take over the downlink, with its credit, of the leg that held these blocks before."""
        self.downlink, self.downlink_epoch = downlink, downlink.epoch

    def from_client(self, message: Message) -> None:
        """The downlink said something."""
        if self.downlink is not None and isinstance(message, Credit):
            self.downlink.refill(message)
            self._flush()

    def downlink_ended(self) -> None:
        """The client's downlink is gone; outputs are kept until it attaches again."""
        self.downlink = None

    def give_downlink(self) -> Outlet | None:
        """Let go of the downlink without ending it: another leg of these blocks takes it over."""
        downlink, self.downlink = self.downlink, None
        return downlink

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

    def _leave_next(self) -> None:
        if self.down is not None:
            self._emit(Send(self.down.link, Gone(reason="superseded")))
            self._emit(Shut(self.down.link))
            self.down = None

    @property
    def _own_peer(self) -> str:
        return self.opened.hops[self.opened.at].peer

    def _offered(self) -> bytes:
        """The digests of those pages it began with that it still has, for a hop that is new."""
        count = len(self.vouched)
        if self.history.dropped or (self.next is not None and self.next.mode == "anew"):
            return b""
        held = sum(entry.serial <= count for entry in self.history.entries[:count])
        return b"".join(self.vouched[:held])

    def _passed_on(self, prefix: bytes = b"") -> Open:
        return msgspec.structs.replace(
            self.opened, at=self.opened.at + 1, window=EARLY_CREDIT, prefix=prefix
        )

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
