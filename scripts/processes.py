"""Real `swarm serve` processes on loopback, ended by their ids."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SWARM = [sys.executable, "-m", "cli"]


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready, and what it said of itself."""

    process: "subprocess.Popen[str]"
    peer: str
    span: str
    join: str

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self.process.kill()
        self.process.wait(10)


def environment(home: Path) -> dict[str, str]:
    """The environment of a command whose state lies in `home`, on few cores and offline."""
    return {**os.environ, "SWARM_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def serve_words(*arguments: str) -> list[str]:
    """The words that begin a server on loopback with these arguments."""
    return ["serve", *arguments, "--host", "127.0.0.1", "--threads", "1", "--json"]


def start(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Begin `swarm serve` with these arguments; what it says goes to a log in `home`."""
    command = [*SWARM, *serve_words(*arguments)]
    with (home / f"serve-{time.monotonic_ns()}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment(home), stdout=subprocess.PIPE, stderr=log, text=True
        )


def wait_ready(process: "subprocess.Popen[str]") -> ServerProcess:
    """Return what the server says of itself once it serves. RuntimeError if it ends instead."""
    line = process.stdout.readline() if process.stdout is not None else ""
    facts = json.loads(line or "{}")
    if not facts.get("ready"):
        raise RuntimeError(f"the server ended with {process.wait(10)}: {facts}")
    return ServerProcess(process, facts["peer"], facts["span"], facts["join"])


def end(processes: "list[subprocess.Popen[str]]") -> None:
    """Ask all to drain, and kill those that do not end."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def serving(
    home: Path,
    model: Path,
    spans: list[str],
    begin: Callable[..., Any] = start,
    options: Sequence[str] = ("--dtype", "float32"),
) -> Iterator[list[ServerProcess]]:
    """One swarm of servers with these spans; the first founds it, the others start together."""
    common = [str(model), *options, "--blocks"]
    begun = [begin(home, *common, spans[0])]
    try:
        founder = wait_ready(begun[0])
        begun += [begin(home, *common, span, "--join", founder.join) for span in spans[1:]]
        yield [founder, *(wait_ready(process) for process in begun[1:])]
    finally:
        end(begun)


def swarm(home: Path, *arguments: str, within: float = 120.0) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [*SWARM, *arguments],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=within,
        check=False,
    )
