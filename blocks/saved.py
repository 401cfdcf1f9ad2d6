"""Quantized spans on disk, ready to run: a second start maps pages instead of quantizing.

1. A copy is used only if every byte is as it was written: their checksum is part of its name. A
   damaged one is removed. This guards against broken disks, not against a hostile owner.
2. A copy is written under another name and then renamed: nobody ever sees half of one.
3. All copies together stay within a budget of bytes; the least recently used go first.
4. Whatever fails here costs the time of quantizing again, and no more.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from blocks.checkpoint import Checkpoint, fingerprint

# raised whenever the bytes of a form or the names of its parts change
_FORMAT = 3  # 1 had wrong scales in some NF4 matrices, 2 a crc32

# room for one large model: 70 billion values take 37 GB in NF4
BUDGET_BYTES = 50_000_000_000

# kernels read whole cache lines; also the width of AVX-512
_ALIGNMENT = 64

_CHUNK_BYTES = 2**20  # stays in the cache of a core between reading and summing
_ABANDONED_SECONDS = 86_400.0
_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_LIBRARIES = ("torch", "transformers", "bitsandbytes")
SAFETENSORS_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}

logger = logging.getLogger(__name__)


def copy_key(checkpoint: Checkpoint, start: int, stop: int, form: Mapping[str, str]) -> str:
    """Hex name of what a copy is of: the checkpoint, the span, the format, the versions.

    Shards are known by size and time of change: their bytes are not read. A shard that was copied
    or touched makes a new copy, which is never wrong.
    """
    shards: dict[str, list[str | int]] = {}
    for name in checkpoint.shards:
        path = (checkpoint.folder / name).resolve()
        with suppress(FileNotFoundError):  # the loader knows how to say that
            facts = path.stat()
            shards[name] = [path.name, facts.st_size, facts.st_mtime_ns]
    facts_of_all = {
        "format": _FORMAT,
        "fingerprint": fingerprint(checkpoint),
        "shards": shards,
        "span": [start, stop],
        "form": dict(form),
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(facts_of_all, sort_keys=True).encode()).hexdigest()[:32]


class SavedCopies:
    """The copies in one folder, which may be shared by several processes."""

    def __init__(self, folder: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes

    def find(self, key: str) -> Path | None:
        """The whole copy of this key, marked as just used; None if there is none."""
        for path in sorted(self.folder.glob(f"{key}-*{_SUFFIX}")):
            with suppress(OSError):  # another process may just have evicted it
                if checksum(path) == path.stem.rpartition("-")[2]:
                    os.utime(path)
                    return path
                logger.warning("the saved copy %s is damaged; it will be made anew", path)
                path.unlink()
        return None

    def drop(self, path: Path) -> None:
        """Forget a copy that turned out to be of no use."""
        with suppress(OSError):
            path.unlink()

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> Path | None:
        """Write a copy and return where it is; None, with a logged sentence, if it cannot be."""
        try:
            header = _header(tensors)
            size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
            if size > self.budget_bytes:
                logger.warning(
                    "a copy of this span takes %d bytes and all copies may take %d; none is kept",
                    *(size, self.budget_bytes),
                )
                return None
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(size)
            return self._written(key, header, tensors)
        except (OSError, ValueError) as error:
            logger.warning("no copy of this span is kept in %s (%s)", self.folder, error)
            return None

    def _written(self, key: str, header: bytes, tensors: Mapping[str, torch.Tensor]) -> Path:
        partial = self.folder / f"{key}.{uuid4().hex}{_PARTIAL}"
        try:
            with partial.open("xb") as file:
                found = _write(file, header, tensors)
                file.flush()
                os.fsync(file.fileno())  # or the name could outlive the bytes when power fails
            return partial.replace(self.folder / f"{key}-{found}{_SUFFIX}")
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used until `size` more bytes fit, and what was abandoned."""
        copies: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                facts = path.stat()
                if path.suffix == _PARTIAL and time.time() - facts.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
                elif path.suffix == _SUFFIX:
                    copies.append((facts.st_mtime, facts.st_size, path))
        total = sum(held for _, held, _ in copies) + size
        for _, held, path in sorted(copies):
            if total <= self.budget_bytes:
                break
            self.drop(path)
            total -= held


def _header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The header of a safetensors file, padded so that tensors begin where kernels like it."""
    entries: dict[str, Any] = {}
    begin = 0
    for name, tensor in _in_order(tensors):
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"tensor {name} has the unknown dtype {tensor.dtype}")
        entries[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
    raw = json.dumps(entries).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _in_order(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Those that keep their successors aligned first; the format allows no holes between."""
    return sorted(
        tensors.items(),
        key=lambda item: (item[1].nbytes % _ALIGNMENT != 0, -item[1].dtype.itemsize, item[0]),
    )


def _write(file: IO[bytes], header: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write header and tensors without a copy of any, and return the checksum of it all."""
    found = _Checksum()
    found.take(header)
    file.write(header)
    for _, tensor in _in_order(tensors):
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for begin in range(0, len(raw), _CHUNK_BYTES):
            chunk = raw[begin : begin + _CHUNK_BYTES]
            found.take(chunk)
            file.write(chunk)
    return found.hex()


class _Checksum:
    """AES-GCM's of data that is not encrypted, under a key that everybody knows: 128 bits, and on
    today's processors faster than memory. No secret is kept, so no one is kept from forging it.
    """

    def __init__(self) -> None:
        self._summed = Cipher(AES(bytes(16)), GCM(bytes(12))).encryptor()

    def take(self, chunk: bytes | memoryview) -> None:
        """Go on with these bytes."""
        self._summed.authenticate_additional_data(chunk)

    def hex(self) -> str:
        """The sum of all that was taken; nothing can follow."""
        self._summed.finalize()
        return self._summed.tag.hex()


def checksum(path: Path) -> str:
    """Hex checksum of a file: fast enough to do at every start, good enough for broken disks.

    The file is read, not mapped: of a bad sector reading tells, and a mapping kills the process.
    """
    found = _Checksum()
    for chunk in _chunks(path):
        found.take(chunk)
    return found.hex()


def _chunks(path: Path) -> Iterator[memoryview]:
    """The file's bytes; each chunk is overwritten by the next."""
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield view[:count]
