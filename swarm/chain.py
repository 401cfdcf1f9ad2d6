"""What the chain's two state machines share: actions, histories, the sender's end of a link.

A link is a stream as the machines know it: a number. Every link is a resumable log: the sender
keeps what it sent, numbered by serial; the receiver says how far it has it.

1. The machines have no clock and no socket: events in, a list of actions out.
2. Actions are carried out in the order given; those about one link reach it in that order.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from swarm.messages import Credit, HopTime, Message, Ready, Step, Wanted, Wish, payload_bytes
from swarm.wire import DEFAULT_LIMITS, Tensor

# What may be outstanding on a link at most. A 512-token chunk at hidden 8192 in bf16 is 8 MiB: two
# such chunks keep a hop busy while the next one travels. What a sender takes for granted on a
# client's downlink, and took on every link before receivers told their windows.
FIRST_CREDIT = 16 << 20
# What a sender takes for granted before its receiver has said Ready, and the narrowest window: all
# ids of any prompt. Of hidden states the first payload travels whatever its size.
EARLY_CREDIT = 1 << 20
# What a step weighs on its link beside its payload: to its receiver a step of one id is hardly
# lighter than one of a hundred (1280 bytes of memory, measured in `blocks.backlog`).
STEP_BYTES = 1280
# Credit is given back in pieces of a quarter, so that a decode step costs no message of its own.
_PIECES = 4
CREDIT_PIECE = FIRST_CREDIT // _PIECES

Payload = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a stream to `peer`, call it `link`, and write `first` as its first message."""

    link: int
    peer: str
    first: Message


@dataclass(frozen=True, slots=True)
class Send:
    """Write a message to a link."""

    link: int
    message: Message


@dataclass(frozen=True, slots=True)
class Shut:
    """Close a link once everything sent before is written. Nothing is heard of it again."""

    link: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One step in a history: what was sent on, under its serial."""

    serial: int
    start: int
    payload: Payload
    wanted: Wanted
    wish: Wish | None = None
    times: tuple[HopTime, ...] = ()
    sequence_length: int = 0


def step_of(entry: Entry, *, after: int) -> Step:
    """The step that carries an entry of a history onwards."""
    return Step(
        serial=entry.serial,
        after=after,
        start=entry.start,
        wanted=entry.wanted,
        wish=entry.wish,
        times=entry.times,
        sequence_length=entry.sequence_length,
        payload=entry.payload,
    )


@dataclass(slots=True)
class History:
    """What was sent on, oldest first; serials and starts rise strictly.

    Appending a step with start s removes the entries whose start is s or more: they are rolled
    back. An entry that straddles s stays whole, the receiver's own rollback cuts it. Resuming
    after any serial is therefore valid, trimmed or not.

    What was sent on may be dropped for want of memory: then only who has the newest dropped serial
    (for a downlink: the newest whose output was wanted) can be resumed, see `reaches`.
    """

    entries: list[Entry] = field(default_factory=list)
    byte_count: int = 0
    dropped: int = 0
    dropped_wanted: int = 0

    def append(self, entry: Entry) -> None:
        """Add the newest step and drop what it rolls back."""
        while self.entries and self.entries[-1].start >= entry.start:
            self.byte_count -= payload_bytes(self.entries.pop().payload)
        self.entries.append(entry)
        self.byte_count += payload_bytes(entry.payload)

    def after(self, serial: int) -> Iterator[Entry]:
        """The entries whose serial is greater, oldest first."""
        begin = bisect_right(self.entries, serial, key=lambda entry: entry.serial)
        return iter(self.entries[begin:])

    def bytes_to(self, serial: int) -> int:
        """How many bytes dropping up to this serial would free."""
        if self.entries and self.entries[-1].serial <= serial:
            return self.byte_count
        return self.byte_count - sum(payload_bytes(entry.payload) for entry in self.after(serial))

    def drop(self, serial: int) -> None:
        """Give up the entries up to this serial; those after it stay."""
        kept = list(self.after(serial))
        for entry in self.entries[: len(self.entries) - len(kept)]:
            self.byte_count -= payload_bytes(entry.payload)
            self.dropped = entry.serial
            if entry.wanted != "none":
                self.dropped_wanted = entry.serial
        self.entries = kept

    def reaches(self, serial: int, *, is_downlink: bool = False) -> bool:
        """True if a receiver that has this serial lacks nothing that was dropped."""
        return serial >= (self.dropped_wanted if is_downlink else self.dropped)


@dataclass(frozen=True, slots=True)
class Spare:
    """What a leg could drop: the bytes that it has sent on and that its live link does not need."""

    leg: int
    byte_count: int


def histories_to_drop(spares: Iterable[Spare], excess: int) -> list[int]:
    """Return the legs whose histories to drop so that `excess` bytes are freed, or all there are.

    `spares` come idle longest first, and so are they dropped. Always the whole of one: a part of a
    history brings no new hop up to date.
    """
    chosen: list[int] = []
    for spare in spares:
        if excess <= 0:
            break
        if spare.byte_count > 0:
            chosen.append(spare.leg)
            excess -= spare.byte_count
    return chosen


def fair_window(waiting_bytes: int, links: int) -> int:
    """Return how much may be outstanding on each of so many links, given room for `waiting_bytes`.

    Half of the room is shared out: a payload may be greater than what is left of a window. Always
    a power of two between EARLY_CREDIT and FIRST_CREDIT, so that it seldom changes.
    """
    share = waiting_bytes // (2 * max(links, 1))
    window = FIRST_CREDIT
    while window > EARLY_CREDIT and window > share:
        window //= 2
    return window


@dataclass(slots=True)
class Inlet:
    """The receiver's end of a link: what waits here, and what may be given back.

    `window` is how much the sender was told it may have outstanding. `is_fixed`: it is one that
    would not heed another.
    """

    window: int = FIRST_CREDIT
    is_fixed: bool = False
    waiting: int = 0
    _owed: int = 0

    @property
    def step_bytes(self) -> int:
        """What the sender counts for a step beside its payload."""
        return 0 if self.is_fixed else STEP_BYTES

    @property
    def is_within_credit(self) -> bool:
        """False if the sender went beyond the widest window it can have been told."""
        return self.waiting <= FIRST_CREDIT + DEFAULT_LIMITS.frame_bytes

    def arrive(self, size: int) -> None:
        """Note that a payload of this size waits."""
        self.waiting += size

    def done(self, size: int, window: int = FIRST_CREDIT) -> list[Credit]:
        """Note that a payload was dealt with; return the credit to give back, mostly none.

        `window`: what the sender should have from now on; a wider one is told when it is twice as
        wide, a narrower one at once with the credit.
        """
        self.waiting -= size
        self._owed += size
        if self.is_fixed or self.window < window < 2 * self.window:
            window = self.window
        return self._told(window) if self._owed >= min(self.window, window) // _PIECES else []

    def narrow(self, window: int) -> list[Credit]:
        """Tell the sender a narrower window now, though nothing is to be given back."""
        return self._told(window) if window < self.window and not self.is_fixed else []

    def _told(self, window: int) -> list[Credit]:
        given, self._owed = self._owed, 0
        is_new = window != self.window
        self.window = window
        return [Credit(more=given, window=window if is_new else 0)]


@dataclass(slots=True)
class Outlet:
    """The sender's end of a link: how far the receiver has it, and how much more it takes.

    `epoch` is the one the link was opened in. `is_known` is False until the receiver of a kept leg
    has said what it has. `window` bounds what is outstanding: sent and not given back, with
    `step_bytes` for each payload.
    """

    link: int
    epoch: int
    sent: int = 0
    is_known: bool = True
    window: int = EARLY_CREDIT
    step_bytes: int = STEP_BYTES
    outstanding: int = 0
    _unheard: int = 0  # steps sent before Ready

    def takes(self, size: int) -> bool:
        """True if a payload of this size may be sent now.

        A payload greater than all credit travels nearly alone, or it would never travel: what is
        outstanding below a piece may be done and not yet given back.
        """
        is_within = self.outstanding + size + self.step_bytes <= self.window
        return is_within or self.outstanding < max(1, self.window // _PIECES)

    def spend(self, serial: int, size: int) -> None:
        """Note that the entry was sent."""
        self.sent = serial
        self.outstanding += size + self.step_bytes
        self._unheard += 1

    def is_ready(self, ready: Ready) -> None:
        """Note how far the receiver has it, and how wide its window is."""
        if not self.is_known or ready.have > self.sent:
            self.sent, self.is_known = ready.have, True
        if not ready.window:  # of an older program: it gives back payloads only
            self.outstanding -= self._unheard * self.step_bytes
            self.step_bytes = 0
        self._take(ready.window or FIRST_CREDIT)

    def refill(self, credit: Credit) -> None:
        """Note what the receiver has dealt with, and perhaps another window."""
        self.outstanding -= min(credit.more, self.outstanding)
        if credit.window:
            self._take(credit.window)

    def _take(self, window: int) -> None:
        self.window = max(EARLY_CREDIT, min(window, FIRST_CREDIT))

    def ready(self, history: History, *, is_downlink: bool = False) -> Iterator[Entry]:
        """Yield, and count as sent, the entries that the receiver lacks and has credit for.

        A downlink carries only outputs that are wanted: the others cost no credit either.
        """
        if not self.is_known:
            return
        for entry in history.after(self.sent):
            if is_downlink and entry.wanted == "none":
                self.sent = entry.serial  # nothing of it is ever needed
                continue
            size = payload_bytes(entry.payload)
            if not self.takes(size):
                return
            yield entry
            self.spend(entry.serial, size)
