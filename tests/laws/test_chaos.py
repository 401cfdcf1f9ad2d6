"""The law of recovery: whatever is done to the hops of a route, the text goes on unchanged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from swarm import chaos
from swarm.chaos import available, blocks_of, rendered, run_chaos
from swarm.chaos_plan import KINDS, ChaosSettings
from swarm.console import Console
from swarm.errors import BadInput
from swarm.settings import DEMO_FOLDER

RUN = """
import signal, trio
from swarm.chaos import run_chaos
from swarm.chaos_plan import ChaosSettings
from swarm.console import Console, readable_errors
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
with readable_errors(is_json=False):
    trio.run(run_chaos, ChaosSettings(kills=6, tokens=150, hops=2, kinds=("stop",)), Console())
"""


def _check(report: dict[str, Any], settings: ChaosSettings) -> None:
    kinds = set(settings.kinds) - set(report["unavailable"])
    assert report["errors"] == []
    assert (report["lost"], report["different"]) == (0, 0)
    assert report["kills"] == settings.kills
    assert report["tokens"] >= settings.tokens
    assert set(report["kinds"]) == kinds
    assert report["repairs"] > 0


def test_no_token_is_lost_or_changed_by_a_few_blows_of_every_kind() -> None:
    settings = ChaosSettings(kills=6, tokens=150, hops=2, seed=3)
    report = trio.run(run_chaos, settings, Console())
    _check(report, settings)


@pytest.mark.slow
def test_no_token_is_lost_or_changed_by_a_hundred_blows_of_every_kind() -> None:
    settings = ChaosSettings(kills=100, tokens=2000)
    report = trio.run(run_chaos, settings, Console())
    _check(report, settings)


def _processes_of(folder: Path) -> list[int]:
    """The processes whose home lies in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            home = f"SWARM_HOME={folder}".encode() if entry.name.isdigit() else None
            if home and home in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or belongs to another user
    return found


def _until(claim: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _interrupt(folder: Path, number: int, when: str) -> None:
    """Start a run, end it by a signal once it says so, and look whether anything is left."""
    log = folder / "log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            [sys.executable, "-c", RUN], env={**os.environ, "TMPDIR": str(folder)}, stderr=out
        )
    try:
        _until(lambda: when in log.read_text() and _processes_of(folder), 120)
        run.send_signal(number)
        assert run.wait(30) == 130
    finally:
        run.kill()
        run.wait()
    assert _processes_of(folder) == []
    assert list(folder.glob("swarm-chaos-*")) == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_a_run_that_is_interrupted_as_it_starts(
    tmp_path: Path, number: int
) -> None:
    _interrupt(tmp_path, number, "starting")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_no_process_outlives_a_run_that_is_interrupted_while_one_is_stopped(
    tmp_path: Path,
) -> None:
    _interrupt(tmp_path, signal.SIGINT, "blow 1")


def test_blocks_are_counted_from_the_configuration(tmp_path: Path) -> None:
    assert blocks_of(DEMO_FOLDER) == 8
    with pytest.raises(BadInput):
        blocks_of(tmp_path)
    nested = {"text_config": {"num_hidden_layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert blocks_of(tmp_path) == 3


def test_a_kind_that_cannot_be_had_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "why_no_cut", lambda: "no knife")
    settings, unavailable = available(ChaosSettings())
    assert settings.kinds == tuple(kind for kind in KINDS if kind != "cut")
    assert unavailable == {"cut": "no knife"}
    with pytest.raises(BadInput, match="no knife"):
        available(ChaosSettings(kinds=("cut",)))


def test_the_report_for_people_says_what_was_lost() -> None:
    from rich.console import Console as Terminal

    row = {"kills": 2, "lost": 7, "different": 0, "near_ties": 0}
    row |= {f"gap_{name}_seconds": 0.5 for name in ("p50", "p99", "most")}
    told = {"planned": 2, "tokens": 50, "repairs": 1, "replayed_tokens": 9, "usual_seconds": 0.02}
    told |= {"tokens_short_handed": 20}
    report = {**row, **told, "holds": False, "waited_seconds": 1.0, "seconds": 9.0}
    report |= {"kinds": {"stop": row}, "unavailable": {"cut": "no knife"}, "errors": ["no route"]}
    terminal = Terminal(width=100)
    with terminal.capture() as captured:
        terminal.print(rendered(report))
    text = captured.get()
    for words in ("stop", "7", "DID NOT SURVIVE", "no cut: no knife", "error: no route"):
        assert words in text
