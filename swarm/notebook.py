"""What a serving peer remembers between runs: its port, its swarms' secrets, whom it met.

One small file beside each key, written whole or not at all. A damaged one counts as empty: all
that is lost is comfort.
"""

import os
from pathlib import Path
from typing import Annotated

import msgspec

from swarm.invite import LEAST_SECRET_BYTES, MOST_SECRET_BYTES
from swarm.messages import Count

MOST_ADDRESSES = 32

_Secret = Annotated[
    bytes, msgspec.Meta(min_length=LEAST_SECRET_BYTES, max_length=MOST_SECRET_BYTES)
]
_Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class SwarmNote(msgspec.Struct, frozen=True):
    """One swarm this key served in."""

    secret: _Secret
    addresses: tuple[str, ...] = ()


class Notebook(msgspec.Struct, frozen=True):
    """All that is remembered. Swarms are known by their model's swarm id."""

    port: _Port = 0
    sequence: Count = 0
    swarms: dict[str, SwarmNote] = {}


def read_notebook(path: Path) -> Notebook:
    """Return what was written there, or an empty notebook."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Notebook)
    except (OSError, ValueError, RecursionError):  # msgspec's are ValueErrors
        return Notebook()


def write_notebook(path: Path, notebook: Notebook) -> None:
    """Replace the file. OSError when the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(notebook))
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
