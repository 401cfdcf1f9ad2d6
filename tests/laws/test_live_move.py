"""The law of moving, on real processes: a server goes where it is needed, and nobody notices."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import end, environment, serving, start, swarm, wait_ready

from swarm.settings import DEMO_FOLDER

# The very program, but one that looks every few seconds and rests for a few only.
HASTY = """
import routing.moves as moves
moves.REST_SECONDS, moves.CHECK_SECONDS = 5.0, 2.0
import cli
cli.main()
"""
PROMPT = "Once upon a time"


def generated(home: Path, join: str, tokens: int) -> dict[str, Any]:
    ended = swarm(home, "generate", PROMPT, "--join", join, "-n", str(tokens), "--json")
    assert ended.returncode == 0, ended.stderr
    facts: dict[str, Any] = json.loads(ended.stdout)
    return facts


def span_of(home: Path, join: str, peer: str) -> str:
    """Where a server is, by the peer map; empty while it loads."""
    ended = swarm(home, "status", "--join", join, "--json")
    found = [each for each in json.loads(ended.stdout)["peers"] if each["peer"] == peer]
    return str(found[0]["span"]) if found and found[0]["state"] == "online" else ""


@pytest.mark.slow
def test_a_server_goes_where_one_serves_alone_and_every_text_stays_the_same(
    tmp_path: Path,
) -> None:
    others: list[subprocess.Popen[str]] = []
    with serving(tmp_path, DEMO_FOLDER, ["0:4"]) as (founder,), (tmp_path / "log").open("w") as log:
        options = ["--join", founder.join, "--dtype", "float32", "--blocks"]
        command = [sys.executable, "-c", HASTY, "serve", str(DEMO_FOLDER), *options, "4"]
        mover = subprocess.Popen(
            [*command, "--threads", "1", "--json", "--host", "127.0.0.1"],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        others.append(mover)
        try:
            ready = wait_ready(mover)
            assert ready.span == "4:8"  # nobody served them
            undisturbed = generated(tmp_path, founder.join, 64)["text"]
            others += [start(tmp_path, str(DEMO_FOLDER), *options, "4:8") for _ in range(2)]
            for process in others[1:]:
                wait_ready(process)
            deadline = time.monotonic() + 120
            while span_of(tmp_path, founder.join, ready.peer) != "0:4":
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                assert generated(tmp_path, founder.join, 64)["text"] == undisturbed
            assert generated(tmp_path, founder.join, 64)["text"] == undisturbed
        finally:
            end(others)
