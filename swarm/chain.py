"""What the chain's two state machines share: actions, histories, the sender's end of a link.

A link is a stream as the machines know it: a number. Every link is a resumable log: the sender
keeps what it sent, numbered by serial; the receiver says how far it has it.

1. The machines have no clock and no socket: events in, a list of actions out.
2. Actions are carried out in the order given; those about one link reach it in that order.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from swarm.messages import Credit, HopTime, Message, Step, Wanted, Wish, payload_bytes
from swarm.wire import DEFAULT_LIMITS, Tensor

# What a link's receiver takes before it has said anything. A 512-token chunk at hidden 8192 in
# bf16 is 8 MiB: two such chunks keep a hop busy while the next one travels.
FIRST_CREDIT = 16 << 20
# Credit is given back in pieces of this size, so that a decode step costs no message of its own.
CREDIT_PIECE = FIRST_CREDIT // 4

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


def step_of(entry: Entry, *, after: int) -> Step:
    """The step that carries an entry of a history onwards."""
    return Step(
        serial=entry.serial,
        after=after,
        start=entry.start,
        wanted=entry.wanted,
        wish=entry.wish,
        times=entry.times,
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


@dataclass(slots=True)
class Inlet:
    """The receiver's end of a link: what waits here, and what may be given back."""

    waiting: int = 0
    _owed: int = 0

    @property
    def is_within_credit(self) -> bool:
        """False if the sender went beyond its credit."""
        return self.waiting <= FIRST_CREDIT + DEFAULT_LIMITS.frame_bytes

    def arrive(self, size: int) -> None:
        """Note that a payload of this size waits."""
        self.waiting += size

    def done(self, size: int) -> list[Credit]:
        """Note that a payload was dealt with; return the credit to give back, mostly none."""
        self.waiting -= size
        self._owed += size
        if self._owed < CREDIT_PIECE:
            return []
        given, self._owed = self._owed, 0
        return [Credit(more=given)]


@dataclass(slots=True)
class Outlet:
    """The sender's end of a link: how far the receiver has it, and how much more it takes.

    `epoch` is the one the link was opened in. `is_known` is False until the receiver of a kept leg
    has said what it has.
    """

    link: int
    epoch: int
    sent: int = 0
    is_known: bool = True
    credit: int = FIRST_CREDIT
    outstanding: int = 0

    def takes(self, size: int) -> bool:
        """True if a payload of this size may be sent now.

        A payload greater than all credit travels nearly alone, or it would never travel: what is
        outstanding below a piece may be done and not yet given back.
        """
        return size <= self.credit or self.outstanding < CREDIT_PIECE

    def spend(self, serial: int, size: int) -> None:
        """Note that the entry was sent."""
        self.sent = serial
        self.credit -= size
        self.outstanding += size

    def refill(self, size: int) -> None:
        """Note that the receiver will take `size` more bytes."""
        size = min(size, self.outstanding)
        self.credit += size
        self.outstanding -= size

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
