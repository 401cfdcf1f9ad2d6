"""Keys: kept, locked, and known by libp2p's id."""

import os
import stat
from pathlib import Path

import pytest

from swarm.errors import BadInput
from swarm.identity import Identity, first_free_identity, identity_from, new_identity, verify

KNOWN = Identity(bytes(range(32)))


def test_a_signature_is_known_by_the_peer_id_alone() -> None:
    identity = new_identity()
    signature = identity.sign(b"hello")
    assert verify(identity.peer, b"hello", signature)
    assert not verify(identity.peer, b"hallo", signature)
    assert not verify(new_identity().peer, b"hello", signature)


def test_the_id_is_the_one_that_libp2p_gives_the_same_key() -> None:
    assert KNOWN.peer == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"


@pytest.mark.parametrize(
    "peer", ["", "nobody", "0OIl", "é", KNOWN.peer[:-1], KNOWN.peer + "1", "Qm" + KNOWN.peer[2:]]
)
def test_a_malformed_peer_id_verifies_nothing_and_raises_nothing(peer: str) -> None:
    assert not verify(peer, b"hello", KNOWN.sign(b"hello"))


@pytest.mark.parametrize("signature", [b"", b"x", b"x" * 64, b"x" * 65])
def test_a_malformed_signature_is_no_signature(signature: bytes) -> None:
    assert not verify(KNOWN.peer, b"hello", signature)


def test_a_key_survives_its_process_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "own.key"
    first = identity_from(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _give_up(first)
    again = identity_from(path)
    assert again.peer == first.peer
    _give_up(again)


def test_a_key_in_use_is_refused_with_the_next_step(tmp_path: Path) -> None:
    held = identity_from(tmp_path / "own.key")
    with pytest.raises(BadInput, match="another process") as caught:
        identity_from(tmp_path / "own.key")
    assert "--identity" in caught.value.next_step
    _give_up(held)


def test_a_second_server_of_one_user_gets_a_key_of_its_own(tmp_path: Path) -> None:
    first, second = first_free_identity(tmp_path), first_free_identity(tmp_path)
    assert first.peer != second.peer
    _give_up(first)
    again = first_free_identity(tmp_path)
    assert again.peer == first.peer
    _give_up(second)
    _give_up(again)


@pytest.mark.parametrize("content", [b"short", b"x" * 33])
def test_a_file_that_is_no_key_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.key"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not an identity"):
        identity_from(path)
    assert path.read_bytes() == content


def _give_up(identity: Identity) -> None:
    os.close(identity.lock)
