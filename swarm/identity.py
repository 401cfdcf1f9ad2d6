"""Who a peer is: an Ed25519 key, kept in a file, and the id that others know it by.

A peer id is libp2p's: the base58 text of an identity multihash around the public key, so that the
id alone verifies a signature. libp2p itself is not imported here.

1. A key file is readable by its owner only, and one process at a time holds it.
2. `verify` never raises: what is not a valid signature by that peer is False.
"""

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.errors import BadInput

_SEED_BYTES = 32
_PUBLIC_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # identity hash, 36 bytes, Ed25519
_MOST_IDENTITIES = 64


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key. `lock` keeps the file at `path` for this process until it ends."""

    seed: bytes = field(repr=False)
    path: Path = Path()
    lock: int = -1  # a file descriptor; -1 without a file

    @property
    def peer(self) -> str:
        """The id that others know this key by."""
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key()
        return base58.b58encode(_PUBLIC_PREFIX + public.public_bytes_raw()).decode()

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes that prove that this peer said `data`."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)


def new_identity() -> Identity:
    """Return a fresh key that is nowhere on disk."""
    return Identity(os.urandom(_SEED_BYTES))


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Tell whether `peer` signed `data`."""
    try:
        decoded = base58.b58decode(peer)
        if len(decoded) != len(_PUBLIC_PREFIX) + _SEED_BYTES:
            return False
        if not decoded.startswith(_PUBLIC_PREFIX):
            return False
        Ed25519PublicKey.from_public_bytes(decoded[len(_PUBLIC_PREFIX) :]).verify(signature, data)
    except (ValueError, InvalidSignature):
        return False
    return True


def identity_from(path: Path) -> Identity:
    """Load the key in this file, or make one there.

    BadInput if another process holds it, it is no key, or it cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadInput(
            f"the identity {path} cannot be opened: {error.strerror}",
            next_step="set SWARM_HOME, or name another file with --identity",
        ) from error
    try:
        return Identity(_locked_seed(handle, path), path, handle)
    except BaseException:
        os.close(handle)
        raise


class _NotUsable(BadInput):
    """Another process holds this key, or the file is no key: the next one may do."""


def _locked_seed(handle: int, path: Path) -> bytes:
    """Take the file for this process; return what it holds, or write a fresh seed there."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _NotUsable(
            f"another process uses the identity {path}",
            next_step="stop it, or name another file with --identity",
        ) from error
    try:
        os.fchmod(handle, 0o600)
        seed = os.pread(handle, _SEED_BYTES + 1, 0)
        if not seed:
            seed = os.urandom(_SEED_BYTES)
            os.pwrite(handle, seed, 0)
            os.fsync(handle)
    except OSError as error:
        raise BadInput(f"the identity {path} cannot be kept: {error.strerror}") from error
    if len(seed) != _SEED_BYTES:
        raise _NotUsable(
            f"{path} is not an identity: it should hold {_SEED_BYTES} bytes",
            next_step="name another file with --identity",
        )
    return seed


def first_free_identity(folder: Path) -> Identity:
    """Load the first key of the folder that no other process holds; make one if all are held.

    BadInput if the folder cannot be used.
    """
    for number in range(_MOST_IDENTITIES):
        try:
            return identity_from(folder / f"identity-{number}.key")
        except _NotUsable:
            continue
    raise BadInput(f"all {_MOST_IDENTITIES} identities in {folder} are in use")
