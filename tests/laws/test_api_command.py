"""`swarm api` as a process: where it is, whom it asks, how it ends."""

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from preloaded import swarm
from processes import SWARM, environment


@pytest.mark.slow
def test_without_a_swarm_a_private_one_is_asked_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    command = [*SWARM, "api", "--json", "--port", "0"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        try:
            facts = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            body = {"model": "demo", "prompt": "Once", "max_tokens": 3}
            asked = urllib.request.Request(
                f"{facts['api']}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                made = json.loads(answer.read())
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    log.close()
    names = [hop["name"] for hop in made["x_swarm"]["route"]]
    assert names == ["private-1", "private-2", "private-3"]
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve", "--api", "nonsense"], "--api nonsense"),
        (["serve", "--api", ":0", "--api-key-file", "/no/such/file"], "/no/such/file"),
        (["api", "--api-key", "a b"], "API key"),
        (["api", "--allow-origin", "chat.example.org"], "--allow-origin chat.example.org"),
        (["serve", "--api", ":0", "--allow-origin", "nonsense"], "--allow-origin nonsense"),
        (["api", "--join", "swarm1thisisnotatoken"], "token"),
    ],
)
def test_what_cannot_be_is_one_sentence_at_once(
    tmp_path: Path, words: list[str], told: str
) -> None:
    made = swarm(tmp_path, *words)
    assert made.returncode == 2
    assert told in made.stderr.strip().splitlines()[-1]
    assert "Traceback" not in made.stderr


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        made = swarm(tmp_path, "api", "--port", port)
    assert made.returncode == 2
    assert port in made.stderr.strip().splitlines()[-1]
