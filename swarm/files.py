"""The model's small files: told from peer to peer, proved by one digest, kept on disk.

A signed record announces `files_digest`, the digest of a manifest; the manifest names each file's
sha256. So whoever trusts the record can take the files from anyone.

On a stream of FILES_PROTOCOL the client asks {"k": "manifest"} and gets {"k": "manifest",
"files": {name: sha256}}; then {"k": "file", "name": ...} and gets {"k": "chunk", "last": bool}
with the tensor "data" (uint8) until `last`. Each stream gives each file once.

1. Files that leave this module agree with the digest they were asked for by.
2. Names come from SMALL_FILES; nothing a peer says becomes a path.
3. A peer can cost us TOTAL_BYTES of memory and the caller's `within`, not more.
4. A cache entry appears whole or not at all, and a damaged one counts as absent.
"""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import trio

from swarm.errors import PeerFault, Unreachable
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import Frame, Limits, Tensor

FILES_PROTOCOL = "/swarm/files/1"
SMALL_FILES = frozenset(
    {
        "model.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
)
TOTAL_BYTES = 64 << 20  # the largest tokenizer.json in use has some 35 MB
CHUNK_BYTES = 1 << 20  # small beside a window, so that decode steps pass in between
SILENCE_SECONDS = 30.0  # how long a server waits for the next request

_FRAME_LIMITS = Limits(frame_bytes=CHUNK_BYTES + (64 << 10), header_bytes=64 << 10, tensors=1)
_HEX = re.compile(r"[0-9a-f]{64}")

Manifest = Mapping[str, str]


class SmallFiles(Mapping[str, bytes]):
    """Names and bytes of the small files, with their manifest. Never changes."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """ValueError for a name outside SMALL_FILES, or more than TOTAL_BYTES."""
        strange = sorted(files.keys() - SMALL_FILES)
        if strange:
            raise ValueError(f"{strange[0]} is not one of the small files")
        if sum(map(len, files.values())) > TOTAL_BYTES:
            raise ValueError(f"the small files have more than {TOTAL_BYTES} bytes")
        self._files = {name: bytes(files[name]) for name in sorted(files)}
        self.manifest = {name: _sha256(data) for name, data in self._files.items()}
        self.digest = digest_of(self.manifest)

    def __getitem__(self, name: str) -> bytes:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def digest_of(manifest: Manifest) -> str:
    """Return the hex digest that stands for these files: `files_digest` of a record."""
    lines = [f"{name} {manifest[name]}\n" for name in sorted(manifest)]
    return _sha256(("swarm files 1\n" + "".join(lines)).encode())


def fingerprint_of(checkpoint_digest: str, files_digest: str) -> str:
    """Return a model's fingerprint: the digest of its checkpoint's and its small files' digests.

    So whoever knows the fingerprint can tell the right files from others.
    """
    return _sha256(f"swarm model 1\n{checkpoint_digest}\n{files_digest}\n".encode())


def serve_files(host: Host, files: SmallFiles) -> None:
    """Give `files` to every peer that asks, from now on."""

    async def answer(stream: Stream) -> None:
        await _answer(MessageStream(stream, _FRAME_LIMITS), files)

    host.serve(FILES_PROTOCOL, answer)


async def fetch_files(host: Host, peer: str, wanted: str, *, within: float) -> SmallFiles:
    """Return the files of digest `wanted` (hex) from `peer`.

    Unreachable when they are not here `within` seconds, PeerFault when they are others.
    """
    with trio.move_on_after(within):
        stream = MessageStream(await host.open(peer, FILES_PROTOCOL, within=within), _FRAME_LIMITS)
        try:
            manifest = await _fetch_manifest(stream, wanted)
            room = TOTAL_BYTES
            files: dict[str, bytes] = {}
            for name in sorted(manifest):
                files[name] = await _fetch_file(stream, name, manifest[name], room)
                room -= len(files[name])
            return SmallFiles(files)
        finally:
            await stream.close()
    raise Unreachable(f"{peer} did not send the model's files within {within:g} seconds")


class FileCache:
    """Small files on disk, one folder for each digest. Several processes may share it.

    Reads and writes block: call it from a thread where a trio task would wait for a slow disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, digest: str) -> SmallFiles | None:
        """Return the files of this digest; None when they are absent or damaged."""
        folder = self.path(digest)
        try:
            paths = [folder / name for name in SMALL_FILES if (folder / name).is_file()]
            if sum(path.stat().st_size for path in paths) > TOTAL_BYTES:
                return None
            files = SmallFiles({path.name: path.read_bytes() for path in paths})
        except OSError:
            return None
        return files if files.digest == digest else None

    def store(self, files: SmallFiles) -> None:
        """Keep the files. OSError when the disk does not take them."""
        if self.load(files.digest) is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="new-") as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            for name, data in files.items():
                (whole / name).write_bytes(data)
            with contextlib.suppress(FileNotFoundError):  # a damaged entry makes room
                self.path(files.digest).rename(Path(temporary) / "damaged")
            try:
                whole.rename(self.path(files.digest))
            except OSError:  # another process was faster
                if self.load(files.digest) is None:
                    raise

    def path(self, digest: str) -> Path:
        """The folder of an entry, whether it is there or not. PeerFault if `digest` is none."""
        return self._folder / checked_digest(digest)


def checked_digest(text: str) -> str:
    """Return `text` if it is a digest in hex. PeerFault if not: it came from a record."""
    if not _HEX.fullmatch(text):
        raise PeerFault("a digest of files that is not 64 digits in lower-case hex")
    return text


async def _answer(stream: MessageStream, files: SmallFiles) -> None:
    left = set(files)
    while True:
        try:
            request = (await stream.receive_frame(within=SILENCE_SECONDS)).header
        except Unreachable:  # the client has what it wanted
            return
        name = request.get("name")
        if request.get("k") == "manifest":
            await stream.send_frame(Frame({"k": "manifest", "files": files.manifest}))
        elif request.get("k") == "file" and isinstance(name, str) and name in left:
            left.remove(name)
            await _send_file(stream, files[name])
        else:
            raise PeerFault(f"{stream.peer} asks for a file that is not here, or twice")


async def _send_file(stream: MessageStream, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, max(len(data), 1), CHUNK_BYTES):
        part = view[start : start + CHUNK_BYTES]
        header = {"k": "chunk", "last": start + CHUNK_BYTES >= len(data)}
        await stream.send_frame(Frame(header, {"data": Tensor("uint8", (len(part),), part)}))


async def _fetch_manifest(stream: MessageStream, wanted: str) -> dict[str, str]:
    await stream.send_frame(Frame({"k": "manifest"}))
    answer = (await stream.receive_frame()).header
    manifest = answer.get("files")
    if answer.get("k") != "manifest" or not _is_manifest(manifest):
        raise PeerFault(f"{stream.peer} sent a manifest of files that is none")
    if digest_of(manifest) != wanted:
        raise PeerFault(f"{stream.peer} has other files than its swarm announces")
    return manifest


def _is_manifest(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(
        name in SMALL_FILES and isinstance(digest, str) and _HEX.fullmatch(digest)
        for name, digest in value.items()
    )


async def _fetch_file(stream: MessageStream, name: str, sha256: str, room: int) -> bytes:
    """Return one file of at most `room` bytes. PeerFault if it is not what the manifest says."""
    await stream.send_frame(Frame({"k": "file", "name": name}))
    parts: list[bytes] = []
    hashed = hashlib.sha256()
    while True:
        frame = await stream.receive_frame()
        part = frame.tensors.get("data")
        if frame.header.get("k") != "chunk" or part is None or part.dtype != "uint8":
            raise PeerFault(f"{stream.peer} sent something else than a part of {name}")
        room -= len(part.data)
        is_last = frame.header.get("last") is True
        if room < 0 or (not is_last and len(part.data) == 0):
            raise PeerFault(f"{stream.peer} sends {name} without end")
        hashed.update(part.data)
        parts.append(bytes(part.data))
        if is_last:
            break
    if hashed.hexdigest() != sha256:
        raise PeerFault(f"{stream.peer} sent a damaged {name}")
    return b"".join(parts)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
