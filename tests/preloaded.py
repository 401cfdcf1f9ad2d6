"""`swarm` commands as processes that begin quickly: forks of one that has imported torch.

Each is a process of its own with its own environment, and ended by its id. Only what takes a core
for seconds each time, the imports, was done before. How a command begins from nothing is the matter
of the tests that start it in the usual way (`processes`).
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import processes
from processes import ServerProcess, environment

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["swarm.commands.app", "swarm.serve", "swarm.gateway.entry"])


class Preloaded:
    """A command that runs: what is used here of `subprocess.Popen`."""

    def __init__(
        self, words: Sequence[str], given: Mapping[str, str], out: Path | None, err: Path
    ) -> None:
        """Begin it. Its stdout goes to the file `out`, or can be read here; stderr to `err`."""
        reading, writing = _CONTEXT.Pipe(duplex=False)
        arguments = (list(words), dict(given), out or writing, err)
        # no daemon: those may have no children, and a server tries an unlisted type in one
        self._process = _CONTEXT.Process(target=_called, args=arguments)
        self._process.start()
        atexit.register(self.kill)  # before multiprocessing would wait for it
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()

    def poll(self) -> int | None:
        """Its exit code, as `subprocess` tells it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. TimeoutExpired if that takes too long."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("swarm", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)
        atexit.unregister(self.kill)


def _called(words: list[str], given: dict[str, str], out: Path | Connection, err: Path) -> None:
    """What the fork runs: the command, as if the shell had called it."""
    import cli

    os.environ.clear()
    os.environ.update(given)
    flags = os.O_WRONLY | os.O_CREAT
    os.dup2(os.open(out, flags) if isinstance(out, Path) else out.fileno(), 1)
    os.dup2(os.open(err, flags), 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    faulthandler.enable(2)  # or a crash would say nothing
    sys.argv = ["swarm", *words]
    cli.main()


def start(home: Path, *arguments: str) -> Any:
    """As `processes.start`."""
    words = processes.serve_words(*arguments)
    return Preloaded(words, environment(home), None, home / f"serve-{time.monotonic_ns()}.log")


@contextmanager
def serving(
    home: Path, model: Path, spans: list[str], options: Sequence[str] = ("--dtype", "float32")
) -> Iterator[list[ServerProcess]]:
    """As `processes.serving`."""
    with processes.serving(home, model, spans, begin=start, options=options) as servers:
        yield servers


def swarm(home: Path, *arguments: str, within: float = 120.0) -> "subprocess.CompletedProcess[str]":
    """As `processes.swarm`."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        process = Preloaded(arguments, environment(home), out, err)
        try:
            code = process.wait(within)
        finally:
            process.kill()
            process.stdout.close()
        texts = [path.read_text("utf-8") for path in (out, err)]
        return subprocess.CompletedProcess(arguments, code, *texts)
