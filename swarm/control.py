"""A daemon's local socket: its owner asks for status, for a join token, or to drain.

One line of JSON each way. The socket lies in the state folder, named after the process, and only
its owner may open it. The asking side imports neither trio nor libp2p: `swarm status` is quick.

1. A socket is removed when its daemon ends; one that nobody listens on is removed by who finds it.
2. Asking takes `within` seconds at most.
"""

import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from swarm.errors import BadInput, Unreachable
from swarm.settings import home

Answer = Callable[[str], Awaitable[Mapping[str, Any]]]

_MOST_QUESTION_BYTES = 4096
_MOST_ANSWER_BYTES = 64 << 20
_QUESTION_SECONDS = 5.0


def socket_folder(state: Path) -> Path:
    """Where the sockets of this user's daemons lie."""
    return state / "daemons"


def ask(state: Path, question: str, *, within: float = 10.0) -> dict[str, Any] | None:
    """Ask the newest daemon of this user; None if none runs.

    Raises TimeoutError if it does not answer in time, ValueError if it answers nonsense.
    """
    paths = sorted(
        socket_folder(state).glob("*.sock"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for path in paths:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(within)
            try:
                client.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)
                continue
            client.sendall(json.dumps({"ask": question}).encode() + b"\n")
            return _read_answer(client)
    return None


def _read_answer(client: socket.socket) -> dict[str, Any] | None:
    data = bytearray()
    while not data.endswith(b"\n"):
        part = client.recv(1 << 16)
        if not part or len(data) > _MOST_ANSWER_BYTES:
            raise ValueError("the daemon broke off its answer")
        data += part
    answer = json.loads(data)
    if not isinstance(answer, dict):
        raise ValueError("the daemon answered nonsense")
    return answer


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


def ask_daemon(question: str) -> dict[str, Any]:
    """Ask this user's daemon. BadInput if none runs, Unreachable if it does not answer."""
    try:
        found = ask(home(), question)
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"the daemon does not answer ({error})", next_step="restart `swarm serve`"
        ) from error
    if found is None:
        raise BadInput(
            "no swarm daemon of yours runs here",
            next_step="start one with `swarm serve`, or pass --join TOKEN",
        )
    return found
