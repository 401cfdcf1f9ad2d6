"""The law of many: whatever the others do, each client gets the text it would have alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from soak import SoakSettings, lengthened, soak
from soak_report import ENDINGS, LEAST_FAIRNESS, MOST_GROWTH

from routing.span import Span
from swarm.settings import DEMO_FOLDER

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_thirty_two_clients_for_two_minutes_get_the_texts_they_would_have_alone() -> None:
    report = trio.run(soak, SoakSettings(minutes=2.0, clients=32))
    assert report["error_messages"] == []
    assert (report["errors"], report["different"]) == (0, 0)
    assert all(report["endings"][name] > 0 for name in ENDINGS)  # or nobody was hurt
    assert report["texts"] > 32
    assert report["slowest_over_median"] >= LEAST_FAIRNESS
    assert max(each["growth"] for each in report["memory"]) <= MOST_GROWTH
    assert report["holds"]


def test_a_few_clients_of_one_server_get_the_texts_they_would_have_alone() -> None:
    settings = SoakSettings(
        minutes=0.15, clients=3, spans=(Span(0, 8),), prompts=3, left_seconds=0.0
    )
    report = trio.run(soak, settings)
    assert (report["errors"], report["different"]) == (0, 0)
    assert report["texts"] > 0
    assert [each["process"] for each in report["memory"]] == ["server 0:8", "3 clients"]


def test_the_longer_context_is_all_that_differs_in_the_soaks_model(tmp_path: Path) -> None:
    made = lengthened(DEMO_FOLDER, tmp_path / "model")
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (made, DEMO_FOLDER))
    assert ours.pop("max_position_embeddings") > theirs.pop("max_position_embeddings")
    assert ours == theirs
    others = [file.name for file in DEMO_FOLDER.iterdir() if file.name != "config.json"]
    assert all((made / name).samefile(DEMO_FOLDER / name) for name in others)


def _servers_below(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or belongs to another user
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_server_outlives_a_soak_that_is_interrupted(tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "soak.py"), "--clients", "2", "--spans", "0:8"],
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(SCRIPTS.parent)},
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 120
        while "saying" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(30) == 130
    finally:
        run.kill()
        run.wait()
    assert _servers_below(tmp_path) == []
    assert "Traceback" not in log.read_text()
