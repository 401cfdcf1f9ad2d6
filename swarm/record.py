"""What a peer says of itself: a signed record, small, newest sequence wins.

On the wire a record is the msgpack of [record bytes, signature]. The signature covers the bytes as
they came, so fields that a newer version adds survive being passed on by an older one.

1. `open_record` raises PeerFault for everything that its peer did not sign, or that cannot be true.
2. `open_record(sign_record(record, identity)) == record`, and the bytes are at most 2 KB.
3. Every record that can be opened has an offer that `routing` accepts.
4. No text in a record holds characters that a terminal would obey.
"""

from typing import Annotated, Literal

import msgspec

from routing.coordinates import Coordinate
from routing.offer import Offer
from routing.span import Span
from swarm.errors import PeerFault
from swarm.identity import Identity, verify
from swarm.messages import Count, Number, PeerName, SpanText

PROTOCOL_VERSION = 1
MOST_RECORD_BYTES = 2048  # two per packet train of a slow uplink; gossip sends each several times
MOST_VALID_SECONDS = 120.0  # a ghost lives no longer, whatever it promised
DEFAULT_VALID_SECONDS = 35.0  # three announcements of ten seconds may be lost

MOST_DIGESTS_BYTES = 1024
DIGEST_BYTES = 6  # of each block: equal by chance once in 10**14 pairs

_SIGNED_AS = b"swarm record 1\0"  # so that no other signature of the key passes for a record's
_MOST_BLOCKS = 1024  # the deepest models have some 130; a bound on what one record can make us do

State = Literal["joining", "online", "draining", "gone"]
Line = Annotated[str, msgspec.Meta(max_length=128)]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern="^/")]


class PeerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a server announces about itself. Only that server may raise its sequence."""

    peer: PeerName
    sequence: Count
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    fingerprint: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    checkpoint_digest: Line = ""  # with files_digest it proves the fingerprint: see `files`
    files_digest: Line = ""
    hub_name: Line = ""
    revision: Line = ""
    model_name: Line = ""
    blocks: Annotated[int, msgspec.Meta(ge=1, le=_MOST_BLOCKS)]  # of the whole model
    span: SpanText
    state: State = "online"
    decode_seconds_per_block: Number
    prefill_seconds_per_block_token: Number
    head_seconds: Number = 0.0  # final norm and head, once per step; if the span has the last block
    wait_seconds: Number = 0.0  # expected wait in its queue before a step is computed
    free_tokens: Count = 0  # the longest session that it would admit now
    dtype: Line = "float32"
    quantization: Line = "none"
    device: Line = "cpu"
    adapters: Annotated[tuple[Line, ...], msgspec.Meta(max_length=16)] = ()
    # the network coordinate: four axes, height, error; empty if unknown
    place: Annotated[tuple[float, ...], msgspec.Meta(max_length=6)] = ()
    # DIGEST_BYTES for each block held, or none: see `digests`
    digests: Annotated[bytes, msgspec.Meta(max_length=MOST_DIGESTS_BYTES)] = b""
    name: Line = ""
    version: Line = ""  # of the program
    protocol: Count = PROTOCOL_VERSION
    valid_seconds: Number = DEFAULT_VALID_SECONDS  # on the holder's clock, from first receipt

    def __post_init__(self) -> None:
        """Raise ValueError for a span beyond the model, an impossible figure, or control codes."""
        if self.held.stop > self.blocks:
            raise ValueError(f"the span {self.span} reaches beyond {self.blocks} blocks")
        if not 0 < self.valid_seconds < float("inf"):
            raise ValueError(f"valid for {self.valid_seconds} seconds")
        if not all(text.isprintable() for text in self._texts()):
            raise ValueError("a text that cannot be printed on one line")
        if len(self.digests) not in (0, DIGEST_BYTES * len(self.held)):
            raise ValueError(f"{len(self.digests)} bytes of digests for {len(self.held)} blocks")
        offer_of(self)
        _ = self.coordinate

    @property
    def coordinate(self) -> Coordinate | None:
        """Where it says it is; None if it does not."""
        if not self.place:
            return None
        *vector, height, error = self.place
        return Coordinate(tuple(vector), height, error)

    @property
    def held(self) -> Span:
        """The blocks it holds."""
        return Span.parse(self.span)

    @property
    def block_digests(self) -> dict[int, bytes]:
        """The digest of each block it holds, if it tells them."""
        return digests_of(self.held, self.digests)

    @property
    def is_gone(self) -> bool:
        """True for a tombstone: its peer has left, and nothing else in it counts."""
        return self.state == "gone"

    @property
    def lifetime_seconds(self) -> float:
        """How long a holder may keep it: what it promises, capped."""
        return min(self.valid_seconds, MOST_VALID_SECONDS)

    def supersedes(self, other: "PeerRecord") -> bool:
        """Tell whether it takes the place of the other."""
        return self.peer == other.peer and self.sequence > other.sequence

    def _texts(self) -> tuple[str, ...]:
        own = (self.peer, self.fingerprint, self.hub_name, self.revision, self.model_name)
        machine = (self.dtype, self.quantization, self.device, self.name, self.version)
        return (*own, *machine, *self.addresses, *self.adapters)


def sign_record(record: PeerRecord, identity: Identity) -> bytes:
    """Return the record's signed bytes.

    ValueError if the record is another peer's, out of bounds, or over MOST_RECORD_BYTES.
    """
    if record.peer != identity.peer:
        raise ValueError(f"{identity.peer} cannot sign for {record.peer}")
    body = msgspec.msgpack.encode(record)
    signed = msgspec.msgpack.encode((body, identity.sign(_SIGNED_AS + body)))
    try:
        open_record(signed)
    except PeerFault as fault:
        raise ValueError(fault.message) from fault
    return signed


def open_record(signed: bytes) -> PeerRecord:
    """Return what the peer signed. PeerFault for anything malformed, oversized or not its own."""
    body, signature, record = _parse(signed)
    if not verify(record.peer, _SIGNED_AS + body, signature):
        raise PeerFault(f"a record that {record.peer} did not sign")
    return record


def claimed_record(signed: bytes) -> PeerRecord:
    """Return what the record claims, its signature unseen: enough to tell that it is no news.

    PeerFault if it is malformed or oversized.
    """
    return _parse(signed)[2]


def digests_of(span: Span, joined: bytes) -> dict[int, bytes]:
    """Return each block's digest; none if `joined` is empty."""
    starts = range(0, len(joined), DIGEST_BYTES)
    parts = [joined[start : start + DIGEST_BYTES] for start in starts]
    return dict(zip(span.blocks, parts, strict=False))


def place_of(coordinate: Coordinate) -> tuple[float, ...]:
    """Return the coordinate as a record carries it, to 10 microseconds."""
    figures = (*coordinate.vector, coordinate.height, coordinate.error)
    return tuple(round(figure, 5) for figure in figures)


def tombstone_of(record: PeerRecord) -> PeerRecord:
    """Return the record that says its peer has left. The caller raises its sequence."""
    return msgspec.structs.replace(record, state="gone", addresses=(), adapters=(), digests=b"")


def next_sequence(stored: int, unix_ms: int) -> int:
    """Return a sequence above every earlier one, also when the wall clock went back."""
    return max(stored + 1, unix_ms)


def offer_of(record: PeerRecord) -> Offer:
    """Return the record as routing sees it."""
    return Offer(
        peer=record.peer,
        span=record.held,
        decode_seconds_per_block=record.decode_seconds_per_block,
        prefill_seconds_per_block_token=record.prefill_seconds_per_block_token,
        free_tokens=record.free_tokens,
        head_seconds=record.head_seconds,
        wait_seconds=record.wait_seconds,
        is_online=record.state == "online",
        is_joining=record.state == "joining",
    )


def _parse(signed: bytes) -> tuple[bytes, bytes, PeerRecord]:
    if len(signed) > MOST_RECORD_BYTES:
        raise PeerFault(f"a record of {len(signed)} bytes is over the limit")
    try:
        body, signature = msgspec.msgpack.decode(signed, type=tuple[bytes, bytes])
        return body, signature, msgspec.msgpack.decode(body, type=PeerRecord)
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise PeerFault(f"a malformed record: {error}") from error
