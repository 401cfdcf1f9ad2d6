"""The daemon's side of its local socket: see `swarm.control`.

1. The socket is there while the daemon runs, for its owner only, and removed when it ends.
2. Whoever asks nonsense, or stays silent, is left without an answer.
3. A daemon that can have no socket serves all the same.
"""

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from swarm.control import socket_folder

log = logging.getLogger(__name__)

Answer = Callable[[str], Awaitable[Mapping[str, Any]]]

_MOST_QUESTION_BYTES = 4096
_QUESTION_SECONDS = 5.0


async def serve_control(state: Path, answer: Answer) -> None:
    """Answer questions until cancelled. `answer` gets the word asked, and must not raise."""
    path = socket_folder(state) / f"{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        try:
            _bind(bound, path)
        except OSError as error:  # a path of more than some 100 characters, for one
            log.warning("`swarm status` cannot ask this daemon: %s: %s", path, error)
            await trio.sleep_forever()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        try:
            await trio.serve_listeners(lambda stream: _answer_one(stream, answer), [listener])
        finally:
            path.unlink(missing_ok=True)


def _bind(bound: socket.socket, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        bound.bind(str(path))
    finally:
        os.umask(before)
    bound.listen()


async def _answer_one(stream: trio.SocketStream, answer: Answer) -> None:
    with suppress(trio.BrokenResourceError), trio.move_on_after(_QUESTION_SECONDS):
        async with stream:
            asked = await _question(stream)
            if asked is not None:
                reply = await answer(asked)
                await stream.send_all(json.dumps(reply).encode() + b"\n")


async def _question(stream: trio.SocketStream) -> str | None:
    """The word that is asked; None if it is nonsense."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < _MOST_QUESTION_BYTES:
        part = await stream.receive_some()
        if not part:
            return None
        line += part
    try:
        return str(json.loads(line)["ask"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
