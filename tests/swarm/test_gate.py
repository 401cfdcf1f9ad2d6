"""Who may enter, as a table."""

import pytest

from swarm.gate import PROOF_BYTES, Role, holds, keyed_name, proof


def test_a_proof_holds_for_whom_it_was_made() -> None:
    given = proof(b"secret", "A", "B", "dialler")
    assert len(given) == PROOF_BYTES
    assert holds(b"secret", "A", "B", "dialler", given)


@pytest.mark.parametrize(
    ("secret", "prover", "verifier", "role"),
    [
        (b"other", "A", "B", "dialler"),
        (b"secret", "B", "A", "dialler"),
        (b"secret", "A", "C", "dialler"),
        (b"secret", "C", "B", "dialler"),
        (b"secret", "A", "B", "listener"),
    ],
)
def test_a_proof_holds_for_nothing_else(
    secret: bytes, prover: str, verifier: str, role: Role
) -> None:
    assert not holds(secret, prover, verifier, role, proof(b"secret", "A", "B", "dialler"))


def test_moving_a_letter_from_one_id_to_the_next_changes_the_proof() -> None:
    one = proof(b"secret", "AB", "C", "dialler")
    assert one != proof(b"secret", "A", "BC", "dialler")


@pytest.mark.parametrize("given", [b"", b"\x00" * PROOF_BYTES, b"x" * 100])
def test_what_is_no_proof_does_not_hold(given: bytes) -> None:
    assert not holds(b"secret", "A", "B", "dialler", given)


def test_a_keyed_name_tells_neither_the_name_nor_the_secret_and_differs_by_both() -> None:
    name = keyed_name(b"secret", "records")
    assert "records" not in name
    assert name == keyed_name(b"secret", "records")
    assert len({name, keyed_name(b"secret", "other"), keyed_name(b"other", "records")}) == 3
