"""What the commands say to people: notes and progress on stderr, results on stdout."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console as Terminal
from rich.progress import Progress, TaskID

from blocks.errors import Unsupported
from blocks.hf import release
from swarm.errors import EXIT_INTERRUPTED, BadInput, SwarmError


class Console:
    """Notes and a progress bar on stderr; facts on stdout, as JSON if asked for.

    A context manager: a bar that is still there when it ends is taken off the terminal.
    """

    def __init__(self, *, is_json: bool = False) -> None:
        self._is_json = is_json
        self._terminal = Terminal(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Say something on the side."""
        self._terminal.print(text, markup=False)

    def advise(self, text: str | None) -> None:
        """Say something on the side to a person, if there is something to say."""
        if text and not self._is_json:
            self.note(text)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """Begin a bar; the result takes (done, total), from any thread, and ends it when done."""
        if not self._terminal.is_terminal:
            self.note(label)
            return lambda _done, _total: None
        bar = self._bar = Progress(console=self._terminal, transient=True)
        task: TaskID = bar.add_task(label, total=None)
        bar.start()

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()

        return tell

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Say that the peer serves, and how others join."""
        if self._is_json:
            print(json.dumps(facts), flush=True)
            return
        self.note(f"serving blocks {facts['span']} as {facts['peer']}")
        self.note("others join with:")
        print(f"swarm serve --join {facts['join']}", flush=True)
        self.note('and ask with: swarm generate --join TOKEN "Once upon a time"')

    def answering(self, url: str) -> None:
        """Say where the API is."""
        print(json.dumps({"ready": True, "api": url}) if self._is_json else url, flush=True)


@contextmanager
def readable_errors(*, is_json: bool) -> Iterator[None]:
    """Turn what was raised into one sentence and an exit code. Never a traceback.

    With `is_json` the sentence is an object on stdout. SWARM_DEBUG=1 raises on, for a developer.
    """
    try:
        yield
    except BaseException as raised:
        error = _foremost(raised)
        if isinstance(error, SystemExit | GeneratorExit) or _is_debugging():
            raise
        if isinstance(error, KeyboardInterrupt):
            sys.exit(EXIT_INTERRUPTED)
        if isinstance(error, BrokenPipeError):
            _silence()
            sys.exit(EXIT_INTERRUPTED)
        error = _of_another_release(error) or error
        if not isinstance(error, SwarmError):
            text = " ".join(f"{type(error).__name__}: {error}".split())
            error = SwarmError(
                f"a bug in swarm, {text}",
                next_step="run it again with SWARM_DEBUG=1 and report what it prints",
            )
        _tell(error, is_json=is_json)
        sys.exit(error.exit_code)


def _foremost(error: BaseException) -> BaseException:
    """The error that matters in a group of several: a bug first, then the first of ours."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_foremost(inner) for inner in error.exceptions]
    return min(leaves, key=lambda leaf: isinstance(leaf, SwarmError))


def _of_another_release(error: BaseException) -> SwarmError | None:
    """Ours for an error that says that transformers is not as known, or lacks what is imported."""
    if isinstance(error, ImportError):
        error = release.moved(error) or error
    return BadInput(str(error)) if isinstance(error, Unsupported) else None


def _tell(error: SwarmError, *, is_json: bool) -> None:
    if is_json:
        told = {"kind": error.kind, "message": error.message, "next": error.next_step}
        print(json.dumps({"error": told}), flush=True)
    else:
        print(f"swarm: {error.sentence()}", file=sys.stderr)


def _silence() -> None:
    """Nobody reads what we print: the interpreter's last flush must not complain of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_debugging() -> bool:
    return os.environ.get("SWARM_DEBUG", "") not in ("", "0")


def printer(as_json: bool, stream_json: bool) -> Callable[[int | None, str], None]:
    """Return what prints each token and its text as they come."""

    def show(token: int | None, text: str) -> None:
        if stream_json:
            print(json.dumps({"token": token, "text": text}), flush=True)
        elif not as_json:
            print(text, end="", flush=True)

    return show


def print_answer(made: Mapping[str, Any], is_json: bool) -> None:
    """Print the object of an answer, or end the text's last line."""
    if is_json:
        print(json.dumps(made), flush=True)
    else:
        print(flush=True)
