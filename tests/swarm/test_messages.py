import contextlib
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import PeerFault
from swarm.messages import (
    AnyMessage,
    Attach,
    Close,
    Credit,
    Fault,
    Gone,
    HopName,
    HopTime,
    Message,
    Open,
    Output,
    Prepare,
    Ready,
    Refused,
    Step,
    Wish,
    pack,
    payload_bytes,
    unpack,
)
from swarm.wire import Frame, Tensor, decode_body, encode

IDS = {"ids": Tensor("int32", (1, 2), b"12345678")}
SESSION = b"s" * 16
OPEN = Open(
    session=SESSION,
    epoch=3,
    hops=(HopName("one", "0:4", "keep"), HopName("two", "4:8")),
    at=1,
    client="me",
    fingerprint="f",
    max_tokens=64,
    valid_until=1.5,
    signature=b"x" * 64,
)
WISH = Wish(count=3, penalised=(1, 2), bias=((5, -0.5),), allowed=(7, 8))
STEP = Step(
    serial=2, after=1, start=8, wanted="all", wish=WISH, times=(HopTime(0.1, 0.2),), payload=IDS
)
MESSAGES: list[Message] = [
    OPEN,
    Ready(have=0),
    Refused(reason="full", message="no room", retry_seconds=2.0),
    Attach(session=SESSION, epoch=1, span="4:8", have=9),
    STEP,
    Step(serial=1, after=0, start=0, payload=IDS),
    Output(serial=2, start=8, times=(HopTime(0.0, 1.0),), payload=IDS),
    Credit(more=1 << 20),
    Fault(epoch=1, peer="one", span="0:4", failure="silent", message="why", retry_seconds=1.0),
    Gone(reason="superseded"),
    Close(),
    Prepare(peer="two"),
]


def header_of(sent: Message, **changes: Any) -> Frame:
    frame = pack(sent)
    return Frame({**frame.header, **changes}, frame.tensors)


def travelled(message: Message) -> AnyMessage:
    return unpack(decode_body(encode(pack(message))[4:]))


def test_every_kind_of_message_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(AnyMessage.__args__)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was_sent(message: Message) -> None:
    assert unpack(pack(message)) == message
    assert travelled(message) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_unknown_fields_are_ignored(message: Message) -> None:
    assert unpack(header_of(message, colour="red", more_of_it=[1, {"a": None}])) == message


@pytest.mark.parametrize("kind", ["dance", "", 3, None, ["open"], {}, "OPEN"])
def test_an_unknown_kind_is_refused_with_a_sentence(kind: Any) -> None:
    with pytest.raises(PeerFault, match="a malformed message"):
        unpack(Frame({"k": kind}))
    with pytest.raises(PeerFault, match="a malformed message"):
        unpack(Frame({}))


def nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("field", ["k", "hops", "payload", "session", "unknown"])
def test_deep_nesting_is_refused_or_ignored(field: str) -> None:
    frame = header_of(OPEN, **{field: nested(100_000)})
    if field in ("payload", "unknown"):
        assert unpack(frame) == OPEN
    else:
        with pytest.raises(PeerFault):
            unpack(frame)


NUMBERS = [-1, -1.5, math.nan, math.inf, -math.inf, 2**63, 2**64 - 1, 1e300, True, "1", None, []]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("message", "field"),
    [
        (OPEN, "epoch"),
        (OPEN, "at"),
        (OPEN, "max_tokens"),
        (OPEN, "valid_until"),
        (Ready(have=0), "have"),
        (MESSAGES[2], "retry_seconds"),
        (MESSAGES[3], "have"),
        (MESSAGES[3], "epoch"),
        (STEP, "serial"),
        (STEP, "after"),
        (STEP, "start"),
        (MESSAGES[6], "serial"),
        (Credit(more=1), "more"),
        (MESSAGES[8], "epoch"),
        (MESSAGES[8], "retry_seconds"),
    ],
)
def test_impossible_numbers_are_refused(message: Message, field: str, number: Any) -> None:
    with pytest.raises(PeerFault):
        unpack(header_of(message, **{field: number}))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (OPEN, {"session": b"short"}),
        (OPEN, {"session": "s" * 16}),
        (OPEN, {"hops": []}),
        (OPEN, {"hops": [["one", "0:4"]] * 513}),
        (OPEN, {"at": 2}),
        (OPEN, {"hops": [["one", "0:4", "maybe"], ["two", "4:8"]]}),
        (OPEN, {"hops": [["", "0:4"], ["two", "4:8"]]}),
        (OPEN, {"hops": [["x" * 129, "0:4"], ["two", "4:8"]]}),
        (OPEN, {"signature": b"x" * 65}),
        (OPEN, {"fingerprint": "x" * 513}),
        (STEP, {"serial": 0}),
        (STEP, {"wanted": "some"}),
        (STEP, {"times": [[-1.0, 0.0]]}),
        (STEP, {"times": [[math.nan, 0.0]]}),
        (STEP, {"times": [[0.0, 0.0]] * 513}),
        (STEP, {"wish": [-1]}),
        (STEP, {"wish": [1, [-1]]}),
        (STEP, {"wish": [1, [], [[1, "heavy"]]]}),
        (STEP, {"wish": [1, [], [[1, math.nan]]]}),
        (STEP, {"wish": [1, [], [[1, math.inf]]]}),
        (STEP, {"wish": [1, [], [[1, 0.0]] * 1025]}),
        (MESSAGES[2], {"reason": "tired"}),
        (MESSAGES[8], {"message": "x" * 513}),
        (Gone(reason="done"), {"reason": "tired"}),
        (Prepare(peer="two"), {"peer": ""}),
    ],
)
def test_impossible_fields_are_refused(message: Message, changes: dict[str, Any]) -> None:
    with pytest.raises(PeerFault):
        unpack(header_of(message, **changes))


@pytest.mark.parametrize(
    "span", ["0:4\n", "00:4", "0:04", "4", "-1:4", "0:100000", "\u0660:4", " 0:4"]
)
def test_a_span_is_written_in_one_way_only(span: str) -> None:
    with pytest.raises(PeerFault):
        unpack(header_of(MESSAGES[3], span=span))


def test_a_step_without_a_payload_is_refused() -> None:
    with pytest.raises(PeerFault, match="payload"):
        unpack(Frame(pack(STEP).header))
    with pytest.raises(PeerFault, match="payload"):
        unpack(header_of(msgspec.structs.replace(STEP, payload={}), payload={"ids": [1, 2]}))


def test_a_payload_counts_its_data_only() -> None:
    assert payload_bytes(IDS) == 8
    assert payload_bytes({**IDS, "side": Tensor("uint8", (3,), b"123")}) == 11
    assert payload_bytes({}) == 0


def test_a_signature_covers_everything_but_the_place_and_itself() -> None:
    signed = OPEN.signed_bytes()
    replace = msgspec.structs.replace
    assert replace(OPEN, at=0, signature=b"").signed_bytes() == signed
    for changes in ({"epoch": 4}, {"client": "you"}, {"max_tokens": 65}, {"valid_until": 9.0}):
        assert replace(OPEN, **changes).signed_bytes() != signed
    moved = (HopName("one", "0:4", "keep"), HopName("two", "4:8", "anew"))
    assert replace(OPEN, hops=moved).signed_bytes() != signed


fields = st.sampled_from(
    ["session", "epoch", "hops", "at", "have", "span", "serial", "after", "start", "wish", "times"]
)
values = st.recursive(
    st.none()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(MESSAGES), st.dictionaries(fields, values, max_size=3))
def test_arbitrary_headers_are_messages_or_a_peer_fault(
    message: Message, changes: dict[str, Any]
) -> None:
    with contextlib.suppress(PeerFault):
        unpack(header_of(message, **changes))


def test_what_other_versions_may_lack_is_outside_the_signature() -> None:
    for change in ({"at": 0}, {"positions": 7}, {"window": 1 << 20}):
        assert msgspec.structs.replace(OPEN, **change).signed_bytes() == OPEN.signed_bytes()
    assert msgspec.structs.replace(OPEN, max_tokens=65).signed_bytes() != OPEN.signed_bytes()
