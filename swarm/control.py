"""A daemon's local socket: its owner asks for status, for a join token, or to drain.

One line of JSON each way. The socket lies in the state folder, named after the process, and only
its owner may open it. This is the asking side, which imports neither trio nor libp2p, so that
`swarm status` is quick; the daemon's side is `swarm.control_server`.

1. A socket that nobody listens on is removed by who finds it.
2. Asking takes `within` seconds at most.
"""

import json
import socket
from pathlib import Path
from typing import Any

from swarm.errors import BadInput, Unreachable
from swarm.settings import home

_MOST_ANSWER_BYTES = 64 << 20


def socket_folder(state: Path) -> Path:
    """Where the sockets of this user's daemons lie."""
    return state / "daemons"


def ask(state: Path, question: str, *, within: float = 10.0) -> dict[str, Any] | None:
    """Ask the newest daemon of this user; None if none runs.

    Raises TimeoutError if it does not answer in time, ValueError if it answers nonsense.
    """
    for path in sorted(socket_folder(state).glob("*.sock"), key=_age):
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


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:  # its daemon ended just now
        return 0.0


def _read_answer(client: socket.socket) -> dict[str, Any]:
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


def find_daemon(question: str) -> dict[str, Any] | None:
    """Ask this user's daemon. None if none runs, Unreachable if it does not answer the question."""
    try:
        found = ask(home(), question)
    except (OSError, ValueError) as error:
        raise Unreachable(
            f"your daemon does not answer ({error})", next_step="restart `swarm serve`"
        ) from error
    if found is not None and "error" in found:
        raise Unreachable(f"your daemon says: {found['error']}", next_step="restart `swarm serve`")
    return found


def ask_daemon(question: str) -> dict[str, Any]:
    """Ask this user's daemon. BadInput if none runs, Unreachable if it does not answer."""
    found = find_daemon(question)
    if found is None:
        raise BadInput(
            "no swarm daemon of yours runs here",
            next_step="start one with `swarm serve`, or pass --join TOKEN",
        )
    return found
