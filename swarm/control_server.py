"""The daemon's side of its local socket: see `swarm.control`.

1. The socket is there while the daemon runs, for its owner only, and removed when it ends.
2. Whoever asks nonsense, or stays silent, is left without an answer.
"""

import json
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from swarm.control import socket_folder

Answer = Callable[[str], Awaitable[Mapping[str, Any]]]

_MOST_QUESTION_BYTES = 4096
_QUESTION_SECONDS = 5.0


async def serve_control(state: Path, answer: Answer) -> None:
    """Answer questions until cancelled. `answer` gets the word asked, and must not raise."""
    folder = socket_folder(state)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{os.getpid()}.sock"
    path.unlink(missing_ok=True)
    listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        await listening.bind(str(path))
    finally:
        os.umask(before)
    listening.listen()
    try:
        listener = trio.SocketListener(listening)
        await trio.serve_listeners(lambda stream: _answer_one(stream, answer), [listener])
    finally:
        path.unlink(missing_ok=True)


async def _answer_one(stream: trio.SocketStream, answer: Answer) -> None:
    question = bytearray()
    with suppress(trio.BrokenResourceError, ValueError, KeyError, TypeError):
        async with stream:
            with trio.move_on_after(_QUESTION_SECONDS):
                while not question.endswith(b"\n") and len(question) < _MOST_QUESTION_BYTES:
                    part = await stream.receive_some()
                    if not part:
                        return
                    question += part
                asked = json.loads(question)["ask"]
                reply = await answer(str(asked))
                await stream.send_all(json.dumps(reply).encode() + b"\n")
