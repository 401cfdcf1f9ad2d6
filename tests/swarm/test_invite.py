"""Join tokens: short, whole or refused with the right sentence."""

import hashlib
import random

import base58
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadInput
from swarm.identity import Identity
from swarm.invite import (
    PUBLIC_SECRET,
    Invite,
    decode_invite,
    encode_invite,
    new_secret,
    swarm_id_of,
)

PEERS = [Identity(bytes([seed]) * 32).peer for seed in range(1, 4)]
SECRET = b"0123456789abcdef"
SWARM_ID = swarm_id_of("0123456789abcdef" * 4)


def invite(*addresses: str, secret: bytes = SECRET) -> Invite:
    return Invite(
        addresses=addresses or (f"/ip4/192.0.2.1/tcp/4001/p2p/{PEERS[0]}",),
        secret=secret,
        swarm_id=SWARM_ID,
    )


def token_of(body: bytes, version: int = 1) -> str:
    check = hashlib.sha256(b"swarm%d" % version + body).digest()[:4]
    return f"swarm{version}{base58.b58encode(body + check).decode()}"


@pytest.mark.parametrize(
    "way",
    [
        "/ip4/192.0.2.1/tcp/4001",
        "/ip4/47.47.47.47/tcp/12079",  # packed, all its bytes read "/"
        "/ip4/255.255.255.255/tcp/65535",
        "/ip6/2001:db8::1/tcp/4001",
        "/ip6/2001:DB8:0::1/tcp/4001",  # not canonical: kept as it was written
        "/ip4/010.0.0.1/tcp/4001",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/2001:db8::1/tcp/4001",
        "/dns4/swarm.example/tcp/443",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{PEERS[1]}/p2p-circuit",
    ],
)
def test_every_kind_of_address_comes_back(way: str) -> None:
    given_invite = invite(f"{way}/p2p/{PEERS[0]}")
    assert decode_invite(encode_invite(given_invite)) == given_invite


_WAYS = st.one_of(
    st.builds("/ip4/{}/tcp/{}".format, st.ip_addresses(v=4), st.integers(1, 65535)),
    st.builds("/ip6/{}/tcp/{}".format, st.ip_addresses(v=6), st.integers(1, 65535)),
    st.builds("/dns/{}/tcp/1".format, st.text("abc.", min_size=1, max_size=40)),
)


@given(
    st.lists(st.tuples(_WAYS, st.sampled_from(PEERS)), min_size=1, max_size=12),
    st.binary(min_size=16, max_size=32),
)
@settings(max_examples=150, deadline=None)
def test_a_token_names_the_secret_the_swarm_and_the_addresses_of_each_peer(
    addresses: list[tuple[str, str]], secret: bytes
) -> None:
    before = invite(*(f"{way}/p2p/{peer}" for way, peer in addresses), secret=secret)
    after = decode_invite(encode_invite(before))
    assert (after.secret, after.swarm_id) == (secret, SWARM_ID)
    assert {p: sorted(a) for p, a in after.peers.items()} == {
        p: sorted(a) for p, a in before.peers.items()
    }


def test_a_token_is_one_short_word() -> None:
    token = encode_invite(invite())
    assert token.isalnum()
    assert len(token) < 120
    assert len(encode_invite(invite(secret=PUBLIC_SECRET))) < 100


def test_a_token_that_a_terminal_wrapped_is_read() -> None:
    token = encode_invite(invite())
    assert decode_invite(f"  {token[:40]}\n   {token[40:]}\r\n") == invite()


def test_any_single_wrong_or_missing_character_is_called_damage() -> None:
    token = encode_invite(invite())
    rng = random.Random(0)
    for at in range(len("swarm1"), len(token)):
        other = rng.choice([c for c in "123456789ABCabc" if c != token[at]])
        for wrong in (token[:at] + other + token[at + 1 :], token[:at] + token[at + 1 :]):
            with pytest.raises(BadInput, match="damaged") as caught:
                decode_invite(wrong)
            assert caught.value.next_step == "copy it again whole"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("hello", "not a join token"),
        ("/ip4/192.0.2.1/tcp/4001", "not a join token"),
        ("swarm1", "damaged"),
        ("swarm10OIl", "damaged"),
        ("swarm1é", "damaged"),
        ("swarm1" + "z" * 100_000, "damaged"),
        (token_of(b"of the future", version=2), "version 2"),
        (token_of(b"nonsense"), "nothing that can be used"),
        (token_of(msgspec.msgpack.encode((SECRET, b"\1" * 8, ()))), "nothing that can be used"),
        (token_of(msgspec.msgpack.encode((b"weak", b"\1" * 8, ()))), "nothing that can be used"),
        (
            token_of(msgspec.msgpack.encode((SECRET, b"\1" * 8, ((b"k" * 32, (b"x",), ()),)))),
            "nothing that can be used",
        ),
    ],
)
def test_what_is_wrong_with_a_token_is_said_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        decode_invite(text)
    assert caught.value.next_step


def test_a_mistyped_version_is_damage_and_not_another_version() -> None:
    token = encode_invite(invite())
    with pytest.raises(BadInput, match="damaged"):
        decode_invite("swarm2" + token.removeprefix("swarm1"))


@given(st.text(max_size=80), st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_decoding_raises_nothing_but_bad_input(text: str, body: bytes) -> None:
    for token in (text, "swarm1" + text, token_of(body)):
        with pytest.raises(BadInput):
            decode_invite(token)


@pytest.mark.parametrize(
    ("addresses", "secret", "swarm_id"),
    [
        ((), SECRET, SWARM_ID),
        (("/ip4/192.0.2.1/tcp/4001",), SECRET, SWARM_ID),
        (("/ip4/192.0.2.1/tcp/4001/p2p/nobody",), SECRET, SWARM_ID),
        (("/ip4/\x1b/p2p/" + PEERS[0],), SECRET, SWARM_ID),
        (("/ip4/192.0.2.1/tcp/1/p2p/" + PEERS[0],), b"short", SWARM_ID),
        (("/ip4/192.0.2.1/tcp/1/p2p/" + PEERS[0],), b"x" * 33, SWARM_ID),
        (("/ip4/192.0.2.1/tcp/1/p2p/" + PEERS[0],), SECRET, "Zz"),
    ],
)
def test_an_impossible_invite_cannot_be_built(
    addresses: tuple[str, ...], secret: bytes, swarm_id: str
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Invite(addresses=addresses, secret=secret, swarm_id=swarm_id)


def test_the_public_secret_is_told_from_private_ones() -> None:
    assert decode_invite(encode_invite(invite(secret=PUBLIC_SECRET))).is_public
    assert not decode_invite(encode_invite(invite(secret=new_secret()))).is_public
    assert new_secret() != new_secret()


def test_an_invite_does_not_show_its_secret() -> None:
    assert repr(SECRET) not in repr(invite())
