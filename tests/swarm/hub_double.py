"""A hub on loopback that answers what the library asks of one, counts what it sends, and fails."""

import hashlib
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from swarm.settings import DEMO_FOLDER
from tests.blocks import tiny_models

NAME = "someone/tiny"
COMMIT = "c0ffee" * 6 + "c0de"

MIXTRAL = {**tiny_models.FAMILIES["llama"], "num_local_experts": 4, "num_experts_per_tok": 2}
_RESOLVE = re.compile(r"/(?P<name>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """What it has (the files of `folder`, as NAME), what it was asked, and how it will fail."""

    folder: Path
    address: str = ""
    sent: Counter[str] = field(default_factory=Counter)  # body bytes of each file
    asked: list[tuple[str, str]] = field(default_factory=list)  # method and file
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of the next answers
    refused: tuple[int, str] | None = None  # status and error code, for everything
    has_ranges: bool = True

    def sizes(self) -> dict[str, int]:
        """The bytes of every shard."""
        return {path.name: path.stat().st_size for path in self.folder.glob("*.safetensors")}

    def forget(self) -> None:
        """Count anew."""
        self.sent.clear()
        self.asked.clear()


class Told:
    """What the user was told, and what the hub had sent of shards when it was."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.notes: list[tuple[str, int]] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append((text, sum(self._hub.sent[name] for name in self._hub.sizes())))

    def progress(self, label: str) -> Any:
        return lambda done, total: self.steps.append((done, total))


def built(family: str, folder: Path) -> Path:
    """Save a tiny model of the family in shards, with a tokenizer, and return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.FAMILIES, "mixtral", MIXTRAL)
        tiny_models.build(family, folder, tied=False)
    shutil.copy(DEMO_FOLDER / "tokenizer.json", folder)
    return folder


@contextmanager
def open_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Serve the model in `folder`; the library asks here and keeps its things in `home`."""
    hub = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1024,  # what the library loses at most when a connection breaks
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()


class _Answer(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # http.server's name for it
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, *_args: Any) -> None:
        """Say nothing."""

    def _answer(self, *, has_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        found = _RESOLVE.fullmatch(path)
        if found is None:
            self._refuse(404, "NoSuchPage")
            return
        hub.asked.append((self.command, found["file"]))
        file = hub.folder / found["file"]
        if hub.refused is not None:
            self._refuse(*hub.refused)
        elif found["name"] != NAME:
            self._refuse(401, "RepoNotFound")
        elif found["revision"] not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif not file.is_file():
            self._refuse(404, "EntryNotFound")
        else:
            self._give(file, has_body=has_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _give(self, file: Path, *, has_body: bool) -> None:
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(data)
        if asked and self.hub.has_ranges:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1, stop) if asked[2] else stop
        self.send_response(206 if asked and self.hub.has_ranges else 200)
        if asked and self.hub.has_ranges:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if has_body:
            self._send(file.name, data[start:stop])

    def _send(self, name: str, body: bytes) -> None:
        cuts = self.hub.cut_after.get(name)
        part = body[: cuts.pop(0)] if cuts else body
        self.hub.sent[name] += len(part)
        self.wfile.write(part)
        self.close_connection = len(part) < len(body)
