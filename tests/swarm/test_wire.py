import contextlib
import math
import struct
import tracemalloc
from collections.abc import Iterable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import PeerFault
from swarm.wire import DTYPE_BYTES, Decoder, Frame, Limits, Tensor, decode_body, encode

SMALL = Limits(frame_bytes=4096, header_bytes=1024, tensors=3, axes=2)
quickly = settings(max_examples=150, deadline=None, derandomize=True)


def frames_of(pieces: Iterable[bytes], limits: Limits = SMALL) -> list[Frame]:
    decoder = Decoder(limits)
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def body_of(header: Any, tail: bytes = b"") -> bytes:
    packed: bytes = msgpack.packb(header, use_bin_type=True)
    return packed + tail


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=2)))
    size = DTYPE_BYTES[dtype] * math.prod(shape)
    return Tensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


names = st.text(max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
frames = st.builds(
    Frame,
    st.dictionaries(names.filter(lambda name: name != "t"), values, max_size=4),
    st.dictionaries(names, tensors(), max_size=3),
)


@quickly
@given(st.lists(frames, max_size=4), st.data())
def test_any_cut_of_the_bytes_gives_the_same_frames(sent: list[Frame], data: st.DataObject) -> None:
    whole = b"".join(encode(frame, SMALL) for frame in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert frames_of(pieces) == sent
    assert frames_of(bytes([byte]) for byte in whole) == sent


@quickly
@given(st.lists(st.binary(max_size=64), max_size=4))
def test_arbitrary_bytes_raise_nothing_but_a_peer_fault(pieces: list[bytes]) -> None:
    decoder = Decoder(SMALL)
    faults: set[PeerFault] = set()
    for piece in pieces:
        try:
            list(decoder.feed(piece))
        except PeerFault as error:
            faults.add(error)
        else:
            assert not faults, "a decoder went on after a fault"
    assert len(faults) <= 1


@quickly
@given(st.binary(max_size=200))
def test_arbitrary_bodies_raise_nothing_but_a_peer_fault(body: bytes) -> None:
    try:
        frame = decode_body(body, SMALL)
    except PeerFault:
        return
    assert isinstance(frame.header, dict)


@quickly
@given(frames, st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_frame_is_a_frame_or_a_peer_fault(frame: Frame, place: int, byte: int) -> None:
    body = bytearray(encode(frame, SMALL)[4:])
    body[place % len(body)] = byte
    with contextlib.suppress(PeerFault):
        decode_body(bytes(body), SMALL)


def test_a_length_over_the_limit_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(PeerFault, match="over the limit"):
        frames_of([struct.pack("!I", SMALL.frame_bytes + 1)])


def test_a_decoder_knows_whether_it_stands_between_frames() -> None:
    decoder = Decoder(SMALL)
    whole = encode(Frame({"k": "x"}), SMALL)
    assert decoder.is_empty
    assert list(decoder.feed(whole[:3])) == []
    assert not decoder.is_empty
    assert len(list(decoder.feed(whole[3:]))) == 1
    assert decoder.is_empty


ENTRY = ["a", "uint8", [2]]


@pytest.mark.parametrize(
    ("listed", "tail"),
    [
        ("ids", b""),
        ({"a": 1}, b""),
        ([ENTRY] * 4, b"12" * 4),
        ([ENTRY, ENTRY], b"1212"),
        ([ENTRY], b"1"),
        ([ENTRY], b"123"),
        ([["a", "uint8"]], b""),
        ([["a", "uint8", [2], 0]], b"12"),
        ([[1, "uint8", [2]]], b"12"),
        ([["a", "object", [2]]], b"12"),
        ([["a", b"uint8", [2]]], b"12"),
        ([["a", ["uint8"], [2]]], b"12"),
        ([["a", "uint8", 2]], b"12"),
        ([["a", "uint8", [1, 1, 2]]], b"12"),
        ([["a", "uint8", [-2]]], b"12"),
        ([["a", "uint8", [-1, -2]]], b"12"),
        ([["a", "uint8", [2.0]]], b"12"),
        ([["a", "uint8", [True]]], b"1"),
        ([["a", "uint8", [2**62]]], b"12"),
        ([["a", "int64", [2**12, 2**12]]], b"12"),
    ],
)
def test_a_false_list_of_tensors_is_refused(listed: Any, tail: bytes) -> None:
    with pytest.raises(PeerFault):
        decode_body(body_of({"k": "step", "t": listed}, tail), SMALL)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        body_of([1, 2]),
        body_of("text"),
        body_of({1: 2}),
        body_of({b"k": 2}),
        body_of({"k": msgpack.ExtType(5, b"data")}),
        body_of({"k": msgpack.Timestamp(1)}),
        body_of({"k": "x" * SMALL.header_bytes}),
        body_of({"k": "x"}) + b"rest",
        b"\x81\xa1k\xa1\xff",
        b"\x91" * 900,
        b"\x81\xa1k" + b"\x91" * 900 + b"\xc0",
    ],
)
def test_a_false_header_is_refused_or_harmless(body: bytes) -> None:
    try:
        assert isinstance(decode_body(body, SMALL).header["k"], list)
    except PeerFault:
        return
    assert body.startswith(b"\x81\xa1k\x91"), "only the nested list may pass: messages refuse it"


@pytest.mark.parametrize("kind", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
def test_a_huge_declared_length_takes_no_memory(kind: bytes) -> None:
    body = b"\x81\xa1k" + (kind + struct.pack("!I", 2**32 - 1)) * 200
    allowed = b"\x81\xa1k" + (b"\xdd" + struct.pack("!I", 900)) * 150
    tracemalloc.start()
    try:
        for hostile in (body, allowed):
            with pytest.raises(PeerFault):
                decode_body(hostile, Limits())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_frame_that_breaks_the_limits_is_not_sent() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        encode(Frame({"k": "x" * 2000}), SMALL)
    big = Tensor("uint8", (5000,), bytes(5000))
    with pytest.raises(ValueError, match="over the limit"):
        encode(Frame({}, {"a": big}), SMALL)


def test_a_large_tensor_is_a_view_of_what_came_and_a_small_one_holds_nothing_else() -> None:
    large, small = Tensor("uint8", (1 << 17,), bytes(1 << 17)), Tensor("uint8", (3,), b"abc")
    whole = encode(Frame({}, {"large": large, "small": small}))
    (frame,) = Decoder().feed(whole)
    view = frame.tensors["large"].data
    assert isinstance(view, memoryview)
    assert view.obj is whole
    assert isinstance(frame.tensors["small"].data, bytes)


def test_views_of_a_frame_stay_as_they_are_when_the_next_one_comes() -> None:
    frames = [Frame({}, {"x": Tensor("uint8", (1 << 16,), bytes([k]) * (1 << 16))}) for k in (1, 2)]
    whole = b"".join(map(encode, frames))
    decoder = Decoder()
    taken = [
        frame for at in range(0, len(whole), 1000) for frame in decoder.feed(whole[at : at + 1000])
    ]
    assert taken == frames
