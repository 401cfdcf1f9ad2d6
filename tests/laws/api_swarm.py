"""Real `swarm serve --api` processes, and what the clients of the API need to reach them."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded import start
from processes import ServerProcess, end, wait_ready

from swarm.settings import DEMO_FOLDER

COMMON = (str(DEMO_FOLDER), "--dtype", "float32", "--blocks")
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class ApiSwarm:
    """A swarm whose founder answers HTTP at `url`."""

    home: Path
    url: str
    founder: "subprocess.Popen[str]"
    join: str
    others: tuple[ServerProcess, ...]


@contextmanager
def api_swarm(
    home: Path, span: str, others: Sequence[str] = (), *options: str
) -> Iterator[ApiSwarm]:
    """The founder serves `span` and the API; then come servers with the other spans."""
    begun = [start(home, *COMMON, span, "--api", "127.0.0.1:0", *options)]
    try:
        facts = ready(begun[0])
        begun += [start(home, *COMMON, other, "--join", facts["join"]) for other in others]
        joined = tuple(wait_ready(process) for process in begun[1:])
        yield ApiSwarm(home, facts["api"], begun[0], facts["join"], joined)
    finally:
        end(begun)


def ready(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the founder says of itself once it serves."""
    line = process.stdout.readline() if process.stdout is not None else ""
    facts: dict[str, Any] = json.loads(line or "{}")
    if not facts.get("ready"):
        raise RuntimeError(f"the server ended with {process.wait(10)}: {facts}")
    return facts


def logs(home: Path) -> str:
    """All that the servers of a home said on stderr."""
    return "".join(path.read_text() for path in sorted(home.glob("serve-*.log")))
