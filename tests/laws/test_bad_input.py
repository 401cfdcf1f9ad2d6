"""What goes wrong is told in one sentence, with the contract's exit code, and nothing runs on."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from preloaded import serving, swarm
from processes import ServerProcess

from swarm.invite import Invite, decode_invite, encode_invite
from swarm.settings import DEMO_FOLDER

HERE = ("--host", "127.0.0.1")


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, ServerProcess]]:
    """A swarm in which nobody serves the last blocks."""
    home = tmp_path_factory.mktemp("home")
    with serving(home, DEMO_FOLDER, ["0:5"]) as (server,):
        yield home, server


def told(made: "CompletedProcess[str]", code: int, *words: str) -> None:
    """One sentence on stderr that names these words, this exit code, no traceback."""
    assert made.returncode == code, made.stderr
    last = made.stderr.strip().splitlines()[-1]
    assert last.startswith("swarm: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in made.stderr
    assert made.stdout == ""


def copied_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO_FOLDER, folder / "model"))


def test_an_unknown_folder(tmp_path: Path) -> None:
    told(swarm(tmp_path, "serve", "/no/such/folder"), 2, "/no/such/folder", "hub name")


def test_a_truncated_shard(tmp_path: Path) -> None:
    model = copied_demo(tmp_path)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    told(swarm(tmp_path, "serve", str(model), *HERE), 2, shard.name)


def test_a_missing_shard(tmp_path: Path) -> None:
    model = copied_demo(tmp_path)
    shard = model / "model-00001-of-00002.safetensors"
    shard.unlink()
    told(swarm(tmp_path, "serve", str(model), *HERE), 2, shard.name)


def test_blocks_that_the_model_does_not_have(tmp_path: Path) -> None:
    made = swarm(tmp_path, "serve", str(DEMO_FOLDER), "--blocks", "4:99", *HERE)
    told(made, 2, "4:99", "0:8")


@pytest.mark.parametrize("command", ["serve", "generate", "status"])
def test_a_malformed_token(tmp_path: Path, command: str) -> None:
    words = ["generate", "Hello"] if command == "generate" else [command]
    told(swarm(tmp_path, *words, "--join", "swarm1thisisnotatoken"), 2, "token")


def test_a_wrong_secret(partial: tuple[Path, ServerProcess], tmp_path: Path) -> None:
    invite = decode_invite(partial[1].join)
    wrong = Invite(addresses=invite.addresses, secret=b"x" * 16, swarm_id=invite.swarm_id)
    made = swarm(tmp_path, "generate", "Hello", "--join", encode_invite(wrong))
    told(made, 5, "secret", "token")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = swarm(tmp_path, "serve", str(DEMO_FOLDER), *HERE, "--port", str(port))
    told(made, 2, str(port), "--port")


def test_a_prompt_longer_than_the_context(
    partial: tuple[Path, ServerProcess], tmp_path: Path
) -> None:
    made = swarm(tmp_path, "generate", "word " * 600, "--join", partial[1].join)
    told(made, 2, "512", "prompt")


def test_no_route(partial: tuple[Path, ServerProcess], tmp_path: Path) -> None:
    made = swarm(tmp_path, "generate", "Hello", "--join", partial[1].join, "--patience", "0.5")
    told(made, 3, "5:8", "served by nobody", "swarm status")


def test_no_route_as_json(partial: tuple[Path, ServerProcess], tmp_path: Path) -> None:
    join = ("--join", partial[1].join)
    made = swarm(tmp_path, "generate", "Hello", *join, "--patience", "0.5", "--json")
    error = json.loads(made.stdout)["error"]
    assert made.returncode == 3
    assert error["kind"] == "uncovered"
    assert "5:8" in error["message"]
    assert error["next"]


def test_nobody_at_the_tokens_address(partial: tuple[Path, ServerProcess], tmp_path: Path) -> None:
    invite = decode_invite(partial[1].join)
    peer = next(iter(invite.peers))
    dead = Invite(
        addresses=(f"/ip4/127.0.0.1/tcp/1/p2p/{peer}",),
        secret=invite.secret,
        swarm_id=invite.swarm_id,
    )
    made = swarm(tmp_path, "generate", "Hello", "--join", encode_invite(dead))
    told(made, 4, "answers", "token")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["serve", ""], "MODEL"),
        (["serve", "--join", ""], "token"),
        (["generate", "Hello", "--join", ""], "token"),
        (["api", "--join", ""], "token"),
        (["serve", "--device", "meta"], "--device"),
        (["serve", "--only-announced"], "--announce"),
        (["serve", "--threads", "100000"], "--threads"),
        (["serve", "--blocks", "5:3"], "--blocks"),
        (["serve", "--memory", "0"], "--memory"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, words: list[str], named: str) -> None:
    """As of a variable in a script that was never set: nothing else is done in its place."""
    told(swarm(tmp_path, *words, within=20.0), 2, named)


@pytest.mark.parametrize("written", [b"", b"{", b"{}", b"\xff"])
def test_a_tokenizer_that_no_client_could_read(tmp_path: Path, written: bytes) -> None:
    model = copied_demo(tmp_path)
    (model / "tokenizer.json").write_bytes(written)
    told(swarm(tmp_path, "serve", str(model), *HERE, within=20.0), 2, str(model), "tokenizer")


def test_more_memory_than_there_may_be(tmp_path: Path) -> None:
    told(swarm(tmp_path, "serve", "--memory", "1", *HERE), 2, "does not fit", "--memory")


def test_a_key_that_another_server_uses(
    partial: tuple[Path, ServerProcess], tmp_path: Path
) -> None:
    key = str(next(partial[0].glob("identity-*.key")))
    told(swarm(tmp_path, "serve", "--identity", key, *HERE), 2, key, "another process")


def test_status_without_a_daemon(tmp_path: Path) -> None:
    told(swarm(tmp_path, "status"), 2, "no swarm daemon", "--join")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    told(swarm(tmp_path, "serve", str(file)), 2, str(file), "config.json")
