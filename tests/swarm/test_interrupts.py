"""An interruption is never lost, and never raised out of nowhere."""

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from swarm import interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM]

# A package that guards what it imports with a bare `except`, and is interrupted in there.
GUARDED_PACKAGE = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
except BaseException:
    pass
"""


@pytest.fixture(autouse=True)
def _heeded() -> Iterator[None]:
    """As in a terminal: a shell's background ignores Ctrl-C."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted(act: Callable[[], object]) -> list[str]:
    """Run something that is cancelled by `act`; return what it undid."""
    undone = []

    async def main() -> None:
        try:
            with trio.fail_after(5):
                act()
                await trio.sleep_forever()
        finally:
            undone.append("undone")

    with pytest.raises(KeyboardInterrupt):
        interrupts.run(main)
    return undone


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interruption_cancels_what_runs_and_is_raised_once_that_is_undone(number: int) -> None:
    before = signal.getsignal(number)
    assert interrupted(lambda: signal.raise_signal(number)) == ["undone"]
    assert signal.getsignal(number) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_comes_in_a_callback_is_not_lost() -> None:
    class Thing:
        pass

    def forget() -> None:
        thing = Thing()
        weakref.finalize(thing, signal.raise_signal, signal.SIGINT)
        del thing
        gc.collect()

    assert interrupted(forget) == ["undone"]


def test_one_that_somebodys_guard_would_catch_is_not_lost() -> None:
    def guarded() -> None:
        with suppress(BaseException):
            signal.raise_signal(signal.SIGINT)

    assert interrupted(guarded) == ["undone"]


def test_who_said_stop_is_not_told_what_else_failed() -> None:
    async def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        finally:
            raise OSError("no such socket")

    with pytest.raises(KeyboardInterrupt):
        interrupts.run(main)


def test_what_runs_to_its_end_returns_what_it_returns() -> None:
    async def add(one: int, other: int) -> int:
        return one + other

    assert interrupts.run(add, 2, 3) == 5


def test_without_an_interruption_an_error_is_raised_as_it_is() -> None:
    async def main() -> None:
        raise OSError("no such socket")

    with pytest.raises(OSError, match="no such socket"):
        interrupts.run(main)


def test_what_a_shells_background_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def main() -> str:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(0.01)
        return "as if nothing had been"

    assert interrupts.run(main) == "as if nothing had been"


def ended(program: str, *, within: float = 30.0) -> tuple[int, str]:
    """Run a program; return its exit code and what it said."""
    made = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
    return made.returncode, made.stdout + made.stderr


STUBBORN = """
import signal, trio
from swarm import interrupts
async def main():
    signal.raise_signal(signal.SIGINT)
    with trio.CancelScope(shield=True):
        await trio.sleep(0.1)
        print("undoing", flush=True)
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(0.1)
        print("undone", flush=True)
    await trio.sleep_forever()
try:
    interrupts.run(main, is_hasty={is_hasty})
except KeyboardInterrupt:
    print("interrupted")
"""


def test_the_second_ends_the_process_whatever_is_being_undone() -> None:
    assert ended(STUBBORN.format(is_hasty=True)) == (130, "undoing\n")


def test_the_second_changes_nothing_where_something_would_outlive_the_process() -> None:
    assert ended(STUBBORN.format(is_hasty=False)) == (0, "undoing\nundone\ninterrupted\n")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", [["serve"], ["generate", "Hello"]])
@pytest.mark.parametrize("package", ["typer", "trio"])
def test_one_in_the_middle_of_an_import_ends_the_command_without_a_word(
    tmp_path: Path, number: signal.Signals, command: list[str], package: str
) -> None:
    (tmp_path / f"{package}.py").write_text(GUARDED_PACKAGE.format(name=number.name))
    made = subprocess.run(
        [sys.executable, "-m", "cli", *command],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "SWARM_HOME": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (made.returncode, made.stdout, made.stderr) == (130, b"", b"")
