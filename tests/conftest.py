"""What all tests share: markers that skip with their reason, one torch thread, long files first."""

import os
import signal
from pathlib import Path
from random import Random

import pytest
from trio._core import _run  # what trio offers its testing libraries for this, and no more public

# Several servers share two cores in these tests; more threads than cores only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background ignores Ctrl-C; what the tests start and interrupt must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_REPOSITORY = Path(__file__).parent.parent

# The files that take longest, by far or as much as those beside them: with several workers a long
# file at the end would leave all but one of them idle. `pytest --durations=100` tells them.
_LONG_FILES = (
    "laws/test_text_is_the_models_own.py",
    "laws/test_chaos.py",
    "laws/test_chain_explored.py",
    "swarm/test_moving.py",
    "blocks/test_families.py",
    "laws/test_soak.py",
    "laws/test_api.py",
    "blocks/test_executor_joint.py",
    "swarm/test_prompt.py",
    "blocks/test_sides.py",
    "laws/test_chain_shared.py",
    "swarm/gateway/test_gateway_any_request.py",
    "swarm/commands/test_bench.py",
    "scripts/test_netlab_root.py",
    "blocks/test_measure.py",
    "blocks/test_stack.py",
    "laws/test_shared_text.py",
    "laws/test_twenty_hosts.py",
    "blocks/test_quantize.py",
    "laws/test_bad_input.py",
    "scripts/test_train_demo.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # not the files of most tests first, but ours


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {_REPOSITORY / "tests" / name: rank for rank, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
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
