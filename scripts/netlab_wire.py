"""One direction of a cable: when a packet that enters now comes out, or why it never does.

Invariants:
 1. Nothing here reads a clock, a socket or a random source: time and chance are handed in.
 2. Packets come out in the order in which they entered, whatever is changed meanwhile.
 3. A packet leaves when it has been put on the wire after all packets before it (its bytes, as IP
    sees them, at the cable's rate), and arrives half a round trip later.
 4. A packet that finds more than `queue_ms` of others before it is dropped; one that finds less is
    taken whole. So a cable that is idle takes a packet of any size.
 5. A cut cable takes nothing, and what was on its way when it was cut never arrives.
"""

from dataclasses import asdict, dataclass
from typing import Self

NANOSECONDS_PER_MS = 1_000_000
OFFLOAD_BYTES = 65_535
"""The most that a kernel hands over as one packet, when it leaves the cutting to the device."""

QUEUE_PACKETS = 4000
"""What a host's device holds for the router: so much that only the wire drops anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """What joins two hosts, the same in both directions. Without `mbit` any rate passes."""

    rtt_ms: float = 0.0
    mbit: float | None = None  # 10^6 bits of IP packets a second
    loss: float = 0.0  # the chance of each packet to vanish on the way
    queue_ms: float = 100.0  # how long a packet may wait for those before it
    is_cut: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a cable that cannot be."""
        if not 0 <= self.rtt_ms < 60_000:
            raise ValueError(f"a round trip takes 0 to 60,000 ms, not {self.rtt_ms}")
        if self.mbit is not None and not 0 < self.mbit <= 100_000:
            raise ValueError(f"a rate lies above 0 and up to 100,000 Mbit/s, not {self.mbit}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"a loss is a chance from 0 to 1, not {self.loss}")
        if not self.queue_ms > 0:
            raise ValueError(f"a queue holds more than 0 ms, not {self.queue_ms}")


@dataclass(slots=True)
class Tally:
    """What became of the packets of one direction. What the kernel hands over as one counts one."""

    packets: int = 0  # delivered
    byte_count: int = 0  # delivered
    lost: int = 0  # by chance
    overflowed: int = 0  # found the queue full
    severed: int = 0  # by a cut

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, int]) -> Self:
        return cls(**facts)


class Direction:
    """The way from one host to another, as a machine: packets in, times of arrival out."""

    def __init__(self, cable: Cable) -> None:
        self.tally = Tally()
        self._free_ns = 0  # when the last byte taken so far is on the wire
        self._last_arrival_ns = 0
        self.cuts = 0  # a packet belongs to the count it entered under: see `is_intact`
        self.change(cable)

    def change(self, cable: Cable) -> None:
        """Be such a cable from now on."""
        if cable.is_cut:
            self.cuts += 1
            self._free_ns = self._last_arrival_ns = 0
        self.cable = cable
        self._oneway_ns = round(cable.rtt_ms * NANOSECONDS_PER_MS / 2)
        self._queue_ns = round(cable.queue_ms * NANOSECONDS_PER_MS)
        self._ns_per_byte = 8_000 / cable.mbit if cable.mbit else 0.0

    def enter(self, now_ns: int, size: int, chance: float) -> int | None:
        """Return when a packet of `size` bytes arrives; None: it never does, and is counted.

        `chance` is drawn evenly from [0, 1) for this packet.
        """
        if self.cable.is_cut:
            self.tally.severed += 1
            return None
        free_ns = max(self._free_ns, now_ns)
        if free_ns - now_ns > self._queue_ns:
            self.tally.overflowed += 1
            return None
        self._free_ns = free_ns + round(size * self._ns_per_byte)
        if chance < self.cable.loss:  # lost on the way, so it took its time on the wire
            self.tally.lost += 1
            return None
        self._last_arrival_ns = max(self._last_arrival_ns, self._free_ns + self._oneway_ns)
        return self._last_arrival_ns

    def is_intact(self, cuts: int) -> bool:
        """Whether a packet that entered under this count of cuts may arrive; counts the others."""
        if cuts == self.cuts:
            return True
        self.tally.severed += 1
        return False
