"""What a peer remembers survives, and damage costs comfort only."""

from pathlib import Path

import pytest

from swarm.notebook import Notebook, SwarmNote, read_notebook, write_notebook

NOTES = Notebook(
    port=4001, sequence=7, swarms={"ab": SwarmNote(secret=b"s" * 16, addresses=("/x",))}
)


def test_what_is_written_is_read_again_and_only_its_owner_may(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.notes.json"
    write_notebook(path, NOTES)
    assert read_notebook(path) == NOTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"port": 70000}',
        b'{"port": -1}',
        b'{"sequence": -1}',
        b'{"swarms": {"ab": {"secret": "c2hvcnQ="}}}',
    ],
)
def test_a_damaged_notebook_counts_as_empty(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "notes.json"
    assert read_notebook(path) == Notebook()
    path.write_bytes(damage)
    assert read_notebook(path) == Notebook()


def test_a_write_that_fails_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.mkdir()
    (path / "in the way").touch()
    with pytest.raises(OSError, match="directory"):
        write_notebook(path, NOTES)
    assert list(tmp_path.iterdir()) == [path]
