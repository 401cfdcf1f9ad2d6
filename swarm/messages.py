"""What peers say to each other along the chain, as frozen structs, and the frames they travel in.

docs/protocol.md tells what they mean. Unknown header fields are ignored, unknown kinds refused.

1. `unpack` raises PeerFault for everything that is not one of these messages within its bounds.
2. `unpack(pack(message)) == message`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from swarm.errors import PeerFault
from swarm.wire import Frame, Tensor

CHAIN_PROTOCOL = "/swarm/chain/1"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
PeerName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
# One way only to write a span: it is part of a leg's name.
SpanText = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,4}):[1-9][0-9]{0,4}\Z")]
Number = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Bias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]  # finite in float32 and after adding
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

Mode = Literal["keep", "new", "anew"]
Wanted = Literal["none", "last", "all"]
RefusalReason = Literal["full", "draining", "stale", "wrong_model", "span_not_held", "not_allowed"]
FaultKind = Literal[
    "closed",
    "silent",
    "unreachable",
    "refused",
    "draining",
    "broke_word",
    "failed",
    "dropped",
    "evicted",
]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="k", omit_defaults=True):
    """The base of all messages; `k` names the kind on the wire."""


class HopName(msgspec.Struct, frozen=True, array_like=True):
    """A hop as Open names it: a peer, the part of its span, and how it is taken up.

    keep: wait for its Ready; new: send from the first frame; anew: free what it holds first.
    """

    peer: PeerName
    span: SpanText
    mode: Mode = "new"


class HopTime(msgspec.Struct, frozen=True, array_like=True):
    """What one step cost on one hop, in seconds."""

    computed: Number
    waited: Number


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """The candidates a thin client asks for: see `sampling`. `count` 0 means every token."""

    count: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 256
    penalised: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=1 << 17)] = ()
    bias: Annotated[tuple[tuple[TokenId, Bias], ...], msgspec.Meta(max_length=1024)] = ()
    allowed: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=1 << 18)] | None = None


class Open(Message, frozen=True, tag="open"):
    """Begin a stream of a session or, on a live stream, take its route up again (Reroute).

    `hops` is the whole route and `at` the receiver's place on it. `positions`: how many a hop that
    begins anew will be sent. `window`: how many bytes the sender takes for granted on this stream
    before Ready; 0: FIRST_CREDIT of `swarm.chain`, and it heeds no window. `prefix`: the digests of
    the pages that the sender has for this receiver, see `swarm.prefix`. The client signs all but
    `at` and these three, which each hop sets and other versions may lack.
    """

    session: SessionId
    epoch: Count
    hops: Annotated[tuple[HopName, ...], msgspec.Meta(min_length=1, max_length=512)]
    at: Count
    client: PeerName
    fingerprint: Text
    max_tokens: Count
    valid_until: Number  # unix seconds
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    positions: Count = 0
    window: Count = 0
    prefix: Annotated[bytes, msgspec.Meta(max_length=8192)] = b""

    def signed_bytes(self) -> bytes:
        """What the signature covers: see above."""
        bare = msgspec.structs.replace(self, at=0, signature=b"", positions=0, window=0, prefix=b"")
        return msgspec.msgpack.encode(bare)


class Ready(Message, frozen=True, tag="ready"):
    """To the hop before: the last serial admitted here, 0 for nothing.

    `window`: how many bytes may be outstanding on this link; 0: FIRST_CREDIT of `swarm.chain`.
    """

    have: Count
    window: Count = 0


class Refused(Message, frozen=True, tag="refused"):
    """To the hop before: no, why, and when asking again may help."""

    reason: RefusalReason
    message: Text = ""
    retry_seconds: Number = 0.0


class Attach(Message, frozen=True, tag="attach"):
    """From the client to the last hop: send the outputs after serial `have` here."""

    session: SessionId
    epoch: Count
    span: SpanText
    have: Count


class Step(Message, frozen=True, tag="step"):
    """One trip through the route: inputs for positions from `start`.

    `after` is the serial sent before it on this stream (at first, what the receiver had).
    `payload` holds "ids" [1, S] or "hidden" [1, S, ...]. `sequence_length`: 0, or the least length
    of a text whose positions are computed as these are (`LengthScaling`).
    """

    serial: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    after: Count
    start: Count
    wanted: Wanted = "none"
    wish: Wish | None = None
    times: Annotated[tuple[HopTime, ...], msgspec.Meta(max_length=512)] = ()
    sequence_length: Count = 0
    payload: dict[str, Any] = {}


class Output(Message, frozen=True, tag="output"):
    """From the last hop to the client: hidden states, or candidates."""

    serial: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    start: Count
    times: Annotated[tuple[HopTime, ...], msgspec.Meta(max_length=512)] = ()
    payload: dict[str, Any] = {}


class Credit(Message, frozen=True, tag="credit"):
    """Against the data: so many bytes sent on this link are dealt with.

    `window`: how many may be outstanding from now on; 0: as many as before.
    """

    more: Count
    window: Count = 0


class Fault(Message, frozen=True, tag="fault"):
    """Up, to the client: under my `epoch`, this hop failed.

    "dropped" accuses nobody: this hop no longer holds what its receiver lacks. Nor does "evicted":
    it no longer holds its cache, and may begin anew here, in `retry_seconds` if that is not 0.
    """

    epoch: Count
    peer: PeerName
    span: SpanText
    failure: FaultKind
    message: Text = ""
    retry_seconds: Number = 0.0


class Gone(Message, frozen=True, tag="gone"):
    """Before every deliberate close, both ways: why the stream ends."""

    reason: Literal["superseded", "forgotten", "done"]


class Close(Message, frozen=True, tag="close"):
    """Down: the session has ended, free what you hold of it."""


class Prepare(Message, frozen=True, tag="prepare"):
    """From the client to a hop: you will soon need a link to this peer. A hint."""

    peer: PeerName


AnyMessage = (
    Open | Ready | Refused | Attach | Step | Output | Credit | Fault | Gone | Close | Prepare
)


def pack(message: Message) -> Frame:
    """Return the frame that carries the message."""
    if isinstance(message, Step | Output):
        bare: Message = msgspec.structs.replace(message, payload={})
        return Frame(_builtins(bare), message.payload)
    return Frame(_builtins(message))


def unpack(frame: Frame) -> AnyMessage:
    """Return the message that the frame carries. PeerFault names what is wrong with it."""
    header: Mapping[str, Any] = frame.header
    if frame.tensors or "payload" in header:
        header = {**header, "payload": dict(frame.tensors)}
    try:
        message: AnyMessage = msgspec.convert(header, AnyMessage, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        kind = header.get("k")
        name = kind[:32] if isinstance(kind, str) else "of no kind"
        raise PeerFault(f"a malformed message ({name}): {error}") from error
    if isinstance(message, Open) and message.at >= len(message.hops):
        raise PeerFault("a route that ends before its receiver")
    if isinstance(message, Step) and not message.payload:
        raise PeerFault("a step without a payload")
    return message


def payload_bytes(payload: Mapping[str, Tensor]) -> int:
    """The size of a payload, by which credit is counted."""
    return sum(len(tensor.data) for tensor in payload.values())


def _builtins(message: Message) -> dict[str, Any]:
    header: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return header
