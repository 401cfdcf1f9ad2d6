"""What all tests share: markers that skip with their reason, and one torch thread."""

import os
from pathlib import Path
from random import Random

import pytest
from trio._core import _run  # what trio offers its testing libraries for this, and no more public

# Several servers share two cores in these tests; more threads than cores only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes: scripts/test runs it")
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that could go on at the same moment take turns in the same order in every run."""
    monkeypatch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr(_run, "_r", Random(0))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that does not ship with the project: SWARM_TEST_DATA, or ../shared/data beside it."""
    named = os.environ.get("SWARM_TEST_DATA")
    folder = Path(named) if named else _REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set SWARM_TEST_DATA")
    return folder
