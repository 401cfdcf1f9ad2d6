"""Records: signed, bounded, and never more than their peer said."""

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from routing.span import Span
from swarm.errors import PeerFault
from swarm.identity import Identity
from swarm.record import (
    MOST_RECORD_BYTES,
    MOST_VALID_SECONDS,
    PeerRecord,
    next_sequence,
    offer_of,
    open_record,
    sign_record,
    tombstone_of,
)

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
REPLACE = msgspec.structs.replace


def record_of(identity: Identity = ALICE, **changes: object) -> PeerRecord:
    plain = PeerRecord(
        peer=identity.peer,
        sequence=7,
        addresses=(f"/ip4/192.0.2.1/tcp/4001/p2p/{identity.peer}",),
        fingerprint="ab" * 32,
        hub_name="someone/model",
        model_name="model",
        blocks=32,
        span="8:16",
        decode_seconds_per_block=0.002,
        prefill_seconds_per_block_token=0.0001,
        head_seconds=0.004,
        wait_seconds=0.01,
        free_tokens=8192,
        name="blue box",
    )
    return REPLACE(plain, **changes)


def signed_anyway(identity: Identity, fields: dict[str, object]) -> bytes:
    body = msgspec.msgpack.encode(fields)
    return msgspec.msgpack.encode((body, identity.sign(b"swarm record 1\0" + body)))


def test_a_record_comes_back_as_it_was_signed() -> None:
    record = record_of(adapters=("polite",), quantization="nf4", state="joining")
    signed = sign_record(record, ALICE)
    assert open_record(signed) == record
    assert len(signed) <= MOST_RECORD_BYTES


def test_a_full_record_with_sixteen_long_addresses_is_refused_before_it_is_signed() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        sign_record(record_of(addresses=("/" + "x" * 200,) * 16), ALICE)


def test_no_peer_signs_for_another() -> None:
    with pytest.raises(ValueError, match="cannot sign"):
        sign_record(record_of(BOB), ALICE)
    with pytest.raises(PeerFault, match="did not sign"):
        open_record(
            signed_anyway(ALICE, msgspec.to_builtins(record_of(BOB), builtin_types=(bytes,)))
        )


def test_every_single_flipped_bit_is_noticed() -> None:
    signed = sign_record(record_of(), ALICE)
    for at in range(len(signed)):
        damaged = bytearray(signed)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(PeerFault):
            open_record(bytes(damaged))


def test_a_signature_made_for_something_else_does_not_pass() -> None:
    body = msgspec.msgpack.encode(record_of())
    with pytest.raises(PeerFault, match="did not sign"):
        open_record(msgspec.msgpack.encode((body, ALICE.sign(body))))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("span", "30:40"),
        ("span", "5:5"),
        ("span", "9:3"),
        ("span", "all"),
        ("span", ""),
        ("blocks", 0),
        ("blocks", 10**6),
        ("sequence", -1),
        ("sequence", 2**60),
        ("state", "asleep"),
        ("decode_seconds_per_block", float("nan")),
        ("decode_seconds_per_block", float("inf")),
        ("decode_seconds_per_block", 0.0),
        ("wait_seconds", -1.0),
        ("free_tokens", -1),
        ("free_tokens", 0.5),
        ("valid_seconds", 0.0),
        ("valid_seconds", float("nan")),
        ("name", "\x1b[2Jgotcha"),
        ("name", "two\nlines"),
        ("name", "x" * 129),
        ("addresses", ["192.0.2.1:4001"]),
        ("addresses", ["/ip4/\x07"]),
        ("addresses", ["/a"] * 17),
        ("fingerprint", ""),
        ("adapters", "polite"),
    ],
)
def test_what_cannot_be_true_is_the_peers_fault_even_if_it_signed_it(
    field: str, value: object
) -> None:
    fields = msgspec.to_builtins(record_of(), builtin_types=(bytes,)) | {field: value}
    with pytest.raises(PeerFault):
        open_record(signed_anyway(ALICE, fields))


def test_an_impossible_record_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="beyond"):
        record_of(span="0:33")


def test_fields_of_a_newer_version_are_ignored_but_stay_signed() -> None:
    fields = msgspec.to_builtins(record_of(), builtin_types=(bytes,)) | {"coordinate": [0.1, 0.2]}
    signed = signed_anyway(ALICE, fields)
    assert open_record(signed) == record_of()


@given(st.binary(max_size=300))
@example(b"\x92\xc4\x01\xc1\xc4\x00")
@example(b"\x92\xc4\x04\x81\xa2\xff\xfe\xc4\x00")
@example(b"\x91" * 2000)
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_nothing_but_a_peer_fault(data: bytes) -> None:
    with pytest.raises(PeerFault):
        open_record(data)


def test_an_oversized_record_is_not_even_parsed() -> None:
    with pytest.raises(PeerFault, match="over the limit"):
        open_record(b"\x92" + b"\0" * MOST_RECORD_BYTES)


def test_only_a_higher_sequence_of_the_same_peer_supersedes() -> None:
    record = record_of()
    assert record_of(sequence=8).supersedes(record)
    assert not record_of(sequence=7).supersedes(record)
    assert not record_of(sequence=6).supersedes(record)
    assert not record_of(BOB, sequence=8).supersedes(record)


@pytest.mark.parametrize(
    ("stored", "unix_ms", "expected"), [(0, 1000, 1000), (1000, 1000, 1001), (5000, 1000, 5001)]
)
def test_a_sequence_rises_even_if_the_clock_goes_back(
    stored: int, unix_ms: int, expected: int
) -> None:
    assert next_sequence(stored, unix_ms) == expected


def test_no_promise_outlives_the_cap() -> None:
    assert record_of(valid_seconds=1e9).lifetime_seconds == MOST_VALID_SECONDS
    assert record_of(valid_seconds=20.0).lifetime_seconds == 20.0


def test_a_tombstone_is_a_record_of_its_own_and_offers_nothing() -> None:
    gone = tombstone_of(record_of(sequence=8))
    assert open_record(sign_record(gone, ALICE)).is_gone
    assert gone.addresses == ()
    assert not offer_of(gone).is_online


@pytest.mark.parametrize(
    ("state", "is_online", "is_joining"),
    [("joining", False, True), ("online", True, False), ("draining", False, False)],
)
def test_an_offer_says_what_the_record_says(state: str, is_online: bool, is_joining: bool) -> None:
    offer = offer_of(record_of(state=state))
    assert (offer.peer, offer.span) == (ALICE.peer, Span(8, 16))
    assert (offer.decode_seconds_per_block, offer.head_seconds) == (0.002, 0.004)
    assert (offer.wait_seconds, offer.free_tokens) == (0.01, 8192)
    assert (offer.is_online, offer.is_joining) == (is_online, is_joining)
