"""Servers on two releases of transformers make one swarm, and say what one of them would say."""

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import processes
import pytest
import transformers

from swarm.settings import DEMO_FOLDER

PROMPTS = ("Once upon a time", "The dog was", "Lily wanted to")
OTHER = "SWARM_TEST_TRANSFORMERS"


@pytest.fixture(scope="module")
def other() -> Path:
    """A folder with another release, as `pip install --no-deps --target FOLDER transformers==…`."""
    folder = Path(os.environ.get(OTHER, ""))
    found = sorted(folder.glob("transformers-*.dist-info")) if folder.parts else []
    if not found:
        pytest.skip(f"no other release of transformers at hand: name its folder in {OTHER}")
    assert transformers.__version__ not in found[0].name
    return folder


def start(release: Iterator[Path | None], home: Path, *words: str) -> "subprocess.Popen[str]":
    """A server on the next of these releases, None for the installed one."""
    folder = next(release)
    environment = processes.environment(home)
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path.cwd())])
    with (home / f"serve-{len(list(home.glob('*.log')))}.log").open("w") as log:
        return subprocess.Popen(
            [*processes.SWARM, *processes.serve_words(*words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def ids_of(home: Path, spans: list[str], releases: tuple[Path | None, ...]) -> list[Any]:
    """What a swarm of servers on these releases, in turn, says to the prompts."""
    home.mkdir()
    with processes.serving(home, DEMO_FOLDER, spans, partial(start, cycle(releases))) as servers:
        join = servers[0].join
        said = [processes.swarm(home, "generate", one, "--json", "--join", join) for one in PROMPTS]
    return [json.loads(one.stdout)["token_ids"] for one in said]


def test_servers_on_two_releases_say_what_one_says(other: Path, tmp_path: Path) -> None:
    alone = ids_of(tmp_path / "alone", ["0:8"], (None,))
    assert all(alone)
    assert ids_of(tmp_path / "mixed", ["0:3", "3:6", "6:8"], (None, other)) == alone
    assert ids_of(tmp_path / "older", ["0:4", "4:8"], (other,)) == alone
