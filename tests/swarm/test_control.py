"""The daemon's local socket: its owner asks, nonsense is left alone, nothing stays behind."""

import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from swarm import control_server
from swarm.control import ask, ask_daemon, find_daemon, socket_folder
from swarm.control_server import serve_control
from swarm.errors import BadInput, Unreachable


async def answer(question: str) -> Mapping[str, Any]:
    return {"error": "unheard of"} if question == "what" else {"asked": question}


def serving(state: Path, body: Callable[[Path], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, state, answer)
            path = socket_folder(state) / f"{os.getpid()}.sock"
            with trio.fail_after(5):
                while not await trio.Path(path).exists():  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await body(path)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_socket_is_its_owners_only_and_removed_at_the_end(tmp_path: Path) -> None:
    async def body(path: Path) -> None:
        modes = [(await trio.Path(one).stat()).st_mode & 0o777 for one in (path, path.parent)]
        assert modes == [0o600, 0o700]
        found = await trio.to_thread.run_sync(partial(ask, tmp_path, "status"))
        assert found == {"asked": "status"}

    serving(tmp_path, body)
    assert list(socket_folder(tmp_path).iterdir()) == []
    assert ask(tmp_path, "status") is None


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"\xff\n", b"[" * 4096, b'"x"\n', b""])
def test_nonsense_is_left_without_an_answer_and_the_daemon_goes_on(
    tmp_path: Path, line: bytes
) -> None:
    async def body(path: Path) -> None:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(line)
        await stream.send_eof()
        assert await stream.receive_some() == b""
        found = await trio.to_thread.run_sync(partial(ask, tmp_path, "invite"))
        assert found == {"asked": "invite"}

    serving(tmp_path, body)


def test_a_socket_that_nobody_listens_on_is_removed_by_who_finds_it(tmp_path: Path) -> None:
    folder = socket_folder(tmp_path)
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "1.sock"))
    assert ask(tmp_path, "status") is None
    assert list(folder.iterdir()) == []


def test_a_daemon_whose_folder_takes_no_socket_serves_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with trio.move_on_after(0.1) as scope:
            await control_server.serve_control(tmp_path / ("x" * 120), answer)
        assert scope.cancelled_caught

    trio.run(main)
    assert "cannot ask this daemon" in caplog.text


def test_no_daemon_is_bad_input_and_a_silent_one_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    assert find_daemon("status") is None
    with pytest.raises(BadInput, match="no swarm daemon"):
        ask_daemon("status")

    async def body(_path: Path) -> None:
        with pytest.raises(Unreachable, match="unheard of"):
            await trio.to_thread.run_sync(ask_daemon, "what")

    serving(tmp_path, body)
    folder = socket_folder(tmp_path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "2.sock"))
        silent.listen()
        with pytest.raises(TimeoutError):
            ask(tmp_path, "status", within=0.05)
