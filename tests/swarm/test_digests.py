"""Digests of blocks, compared: who is wrong, and when nobody can say."""

import msgspec
import pytest
from gossiping import IDENTITIES, record

from routing.span import Span
from swarm.digests import contradicted, outvoted
from swarm.record import DIGEST_BYTES, PeerRecord, open_record, sign_record


def said(number: int, span: str, digests: str, **changes: object) -> PeerRecord:
    """A record whose block digests are these letters."""
    told = b"".join(letter.encode() * DIGEST_BYTES for letter in digests)
    return record(IDENTITIES[number], span=span, digests=told, **changes)


def test_who_is_outvoted_by_two_is_wrong_about_the_blocks_concerned() -> None:
    swarm = [said(1, "0:4", "abcd"), said(2, "0:4", "abcd"), said(3, "2:6", "cXef")]
    assert outvoted(swarm) == {IDENTITIES[3].peer: (Span(3, 4),)}


def test_one_against_one_proves_nothing() -> None:
    assert outvoted([said(1, "0:2", "ab"), said(2, "0:2", "aX")]) == {}


def test_two_against_two_proves_nothing() -> None:
    swarm = [said(n, "0:1", letter) for n, letter in enumerate("aaXX", start=1)]
    assert outvoted(swarm) == {}


def test_who_leaves_has_no_vote() -> None:
    swarm = [said(1, "0:1", "a"), said(2, "0:1", "a", state="draining"), said(3, "0:1", "X")]
    assert outvoted(swarm) == {}


def test_a_peer_that_tells_no_digests_takes_no_part() -> None:
    swarm = [said(1, "0:1", "a"), said(2, "0:1", "a"), said(3, "0:1", "")]
    assert outvoted(swarm) == {}


def test_a_newcomer_whom_nobody_supports_is_the_stranger() -> None:
    own = {3: b"X" * DIGEST_BYTES, 4: b"e" * DIGEST_BYTES, 5: b"Y" * DIGEST_BYTES}
    swarm = [said(1, "2:5", "cde"), said(2, "0:3", "abc")]
    assert contradicted(own, swarm) == (Span(3, 4),)
    assert contradicted(own, [*swarm, said(3, "3:4", "X")]) == ()
    assert contradicted(own, []) == ()


def test_digests_travel_in_records() -> None:
    whole = said(1, "0:8", "abcdefgh")
    assert open_record(sign_record(whole, IDENTITIES[1])) == whole
    assert whole.block_digests[7] == b"h" * DIGEST_BYTES


@pytest.mark.parametrize("digests", [b"short", b"x" * (DIGEST_BYTES * 9)])
def test_digests_of_another_number_of_blocks_are_refused(digests: bytes) -> None:
    with pytest.raises(ValueError, match="digests"):
        msgspec.structs.replace(said(1, "0:8", ""), digests=digests)
