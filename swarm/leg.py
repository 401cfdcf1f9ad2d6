"""What a hop holds of one session: a sans-IO state machine.

A leg listens to one up stream, feeds its steps to the executor in order of serial, keeps what
came out as its history, and sends its next hop (or, on the last hop, the client) whatever that
one lacks: that half of it is in `swarm.onward`. `legs` decides which streams and epochs reach it.

1. A step is admitted once, in order of serial, on the true prefix: `start` is at most the length.
2. A lost up stream frees nothing: the leg goes on computing what it admitted.
3. No more is computed ahead of the next hop than a link's window holds: what waits to be sent on
   keeps further steps waiting, and these the credit of the hop before.
4. A leg that was evicted or has failed computes nothing more; the next Open begins it anew.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from swarm.chain import FIRST_CREDIT, Dial, Entry, Inlet, Payload, Send, Shut
from swarm.messages import (
    Close,
    Gone,
    HopTime,
    Message,
    Open,
    Ready,
    Step,
    payload_bytes,
)
from swarm.onward import Onward
from swarm.prefix import Beginning, Pages


@dataclass(frozen=True, slots=True)
class Begun:
    """A leg with this number was admitted by this Open, and holds nothing yet."""

    leg: int
    opened: Open


@dataclass(frozen=True, slots=True)
class Compute:
    """Give the step to the executor, for the cache of the leg with this number."""

    leg: int
    span: str
    step: Step
    client: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the cache of the leg with this number; its results no longer matter."""

    leg: int


@dataclass(frozen=True, slots=True)
class Fork:
    """Let the cache of the leg with this number begin as that of another, at that length."""

    leg: int
    of: int
    length: int


@dataclass(frozen=True, slots=True)
class Keep:
    """The session of the leg with this number is over; its cache stays until Forget.

    It gives way to whatever else wants its memory, and is over anyhow when its grace time is.
    """

    leg: int


@dataclass(frozen=True, slots=True)
class Grace:
    """Start (or stop) the grace time of a leg without up stream."""

    leg: int
    is_running: bool


Action = Dial | Send | Shut | Begun | Fork | Compute | Keep | Forget | Grace
Emit = Callable[[Action], None]
NewLink = Callable[["Leg"], int]

# What a position of ids comes to on the wire, until a result tells: hidden 16384 in float32.
_GUESSED_POSITION_BYTES = 64 << 10


def step_length(step: Step) -> int:
    """How many positions the step holds, 0 if its payload has no such axis."""
    tensor = step.payload.get("ids") or step.payload.get("hidden")
    return tensor.shape[1] if tensor is not None and len(tensor.shape) >= 2 else 0


def overlap(one: str, other: str) -> bool:
    """Return whether the two spans have a block in common."""
    (a, b), (c, d) = (map(int, span.split(":")) for span in (one, other))
    return a < d and c < b


class Leg(Onward):
    """One span of one session on one peer."""

    def __init__(
        self,
        number: int,
        opened: Open,
        up: int,
        emit: Emit,
        new_link: NewLink,
        window: int = FIRST_CREDIT,
        pages: Pages | None = None,
    ) -> None:
        """`window`: how many bytes may be outstanding on its links; it may be changed. `pages`: to
        note what other legs may begin with, None if that is nobody's concern.
        """
        super().__init__(opened, up, emit, new_link)
        self.number = number
        self.client = opened.client
        self.session = opened.session
        self.max_tokens = opened.max_tokens
        self.admitted = 0
        self.length = 0
        self.window = window
        self.pages = pages
        self.waiting_bytes = 0  # of the steps that are not computed yet
        self.has_failed = False
        self.is_evicted = False
        self._eviction: tuple[str, float] | None = None  # what is still to be said of it
        self._waiting: deque[tuple[Step, int, int]] = deque()  # step, the link it came by, bytes
        self._given = 0  # how many of them the executor has
        self._given_positions = 0
        self._position_bytes = 0.0  # what one comes to, as the newest result tells
        self._inlet = Inlet()

    @property
    def is_spent(self) -> bool:
        """True when it computes nothing more, and is to begin anew."""
        return self.has_failed or self.is_evicted

    def is_named_by(self, opened: Open) -> bool:
        """True if the Open is of this session, and its receiver's place is the leg's."""
        if opened.at >= len(opened.hops):
            return False
        same = (opened.client, opened.session) == (self.client, self.session)
        return same and opened.hops[opened.at].span == self.span

    @property
    def is_busy(self) -> bool:
        """True while steps are admitted that are not computed."""
        return bool(self._waiting)

    def begin_with(self, beginning: Beginning) -> None:
        """Take over what another leg here holds, before anything is said or admitted."""
        count = beginning.pages.count
        self.pages, self.vouched = beginning.pages, beginning.vouched
        self.admitted, self.length, self.sent_on = count, beginning.pages.length, count
        for entry in beginning.entries:
            self.history.append(entry)
        if self.is_last:
            self.history.dropped = count  # it never had what a next hop would lack
        self._position_bytes = self.history.byte_count / self.length
        self._emit(Fork(self.number, beginning.of, self.length))

    def welcome(self, opened: Open, up: int) -> None:
        """Answer the Open that `up` began with."""
        is_fixed = not opened.window
        self._inlet = Inlet(FIRST_CREDIT if is_fixed else self.window, is_fixed)
        window = 0 if is_fixed else self._inlet.window
        self._emit(Send(up, Ready(have=self.admitted, window=window)))

    def take_up(self, opened: Open, up: int) -> None:
        """Listen to `up`, the newest stream, which the leg was not listening to before."""
        if self.up is not None:
            self._emit(Send(self.up, Gone(reason="superseded")))
            self._emit(Shut(self.up))
        else:
            self._emit(Grace(self.number, is_running=False))
        self.up = up
        self.welcome(opened, up)
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

    def admit(self, step: Step, link: int) -> None:
        """Take a step from the up stream, once."""
        if self.is_spent:
            self._say_evicted()
            return
        size = payload_bytes(step.payload) + self._inlet.step_bytes
        self._inlet.arrive(size)
        if step.serial <= self.admitted:
            self._give_back(link, size)
            return
        length = step_length(step)
        if step.after > self.admitted or step.start > self.length or length == 0:
            self._accuse_sender("a step does not follow the one before")
            return
        if max(step.start + length, step.sequence_length) > self.max_tokens:
            self._accuse_sender("the session is longer than it asked for")
            return
        if not self._inlet.is_within_credit:
            self._accuse_sender("more was sent than credit allows")
            return
        if not self.admitted:
            self._position_bytes = (
                _GUESSED_POSITION_BYTES if "ids" in step.payload else size / length
            )
        self.admitted = step.serial
        self.length = step.start + length
        self.waiting_bytes += size
        self._waiting.append((step, link, size))
        if self.pages is not None:
            self.pages.admitted(step.serial, step.start, step.payload, step.sequence_length)
        self._go_on()

    def computed(
        self, serial: int, payload: Payload, time: HopTime, shortest_fork: int | None = None
    ) -> None:
        """The executor finished the oldest admitted step; from then on the leg's cache can be
        shared at no less than this length, None for not at all.
        """
        if self.is_spent:
            return
        step, link, size = self._waiting.popleft()
        if step.serial != serial:
            raise ValueError(f"serial {serial} was computed before {step.serial}")
        self._given -= 1
        self._given_positions -= step_length(step)
        self.waiting_bytes -= size
        self._position_bytes = payload_bytes(payload) / step_length(step)
        self._give_back(link, size)
        if self.pages is not None:
            self.pages.computed(serial, step.start + step_length(step), shortest_fork)
        times = (*step.times, time)
        entry = Entry(
            serial, step.start, payload, step.wanted, step.wish, times, step.sequence_length
        )
        self.history.append(entry)
        self._flush()

    def failed(self, message: str) -> None:
        """The executor could not compute a step: nothing after it can be computed here."""
        if self.is_spent:
            return
        self._drop_waiting()
        self.has_failed = True
        self._accuse("failed", self._own_peer, message)

    def evict(self, message: str, retry_seconds: float) -> None:
        """Let go of the cache. Who sends a step, or has one waiting, is asked to begin anew here,
        after so many seconds if not at once; whoever is to blame for it, it is nobody on the route.
        """
        if self.is_spent:
            return
        self.is_evicted, self._eviction = True, (message, retry_seconds)
        self._emit(Forget(self.number))
        if self._waiting:
            self._drop_waiting()
            self._say_evicted()

    def take_window(self, window: int) -> None:
        """Let no more be outstanding on the up stream from now on; a wider window comes with the
        next credit.
        """
        self.window = window
        if self.up is not None:
            for credit in self._inlet.narrow(window):
                self._emit(Send(self.up, credit))

    def drain(self) -> None:
        """Ask the client to take another peer for these blocks; until then go on as before."""
        self._accuse("draining", self._own_peer, "this server is leaving")

    def up_ended(self) -> None:
        """The up stream is gone; hold everything for a grace time."""
        self.up = None
        self._emit(Grace(self.number, is_running=True))

    def free(self, *, is_session_over: bool, is_kept: bool = False) -> None:
        """Give everything back, but for a cache that is kept. A session that is over is closed
        below, a replaced leg is not.
        """
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
        if is_kept:
            self._emit(Keep(self.number))
        elif not self.is_evicted:
            self._emit(Forget(self.number))

    def _flush(self) -> None:
        super()._flush()
        self._go_on()

    def _go_on(self) -> None:
        """Give the executor what waits, while what comes of it can be sent on before long."""
        room = self.window - self.unsent_bytes - self._given_positions * self._position_bytes
        while self._given < len(self._waiting) and room > 0:
            step = self._waiting[self._given][0]
            length = step_length(step)
            room -= length * self._position_bytes
            if self._given and room < 0:
                return
            self._given += 1
            self._given_positions += length
            self._emit(Compute(self.number, self.span, step, self.client))

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._given = self._given_positions = self.waiting_bytes = 0

    def _say_evicted(self) -> None:
        if self._eviction is not None and self.up is not None:
            message, retry_seconds = self._eviction
            self._eviction = None
            self._accuse("evicted", self._own_peer, message, self.span, retry_seconds)

    def _give_back(self, link: int, size: int) -> None:
        if link == self.up:
            for credit in self._inlet.done(size, self.window):
                self._emit(Send(link, credit))

    def _accuse_sender(self, message: str) -> None:
        opened = self.opened
        if opened.at:
            before = opened.hops[opened.at - 1]
            self._accuse("broke_word", before.peer, message, before.span)
        else:
            self._accuse("broke_word", opened.client, message)
