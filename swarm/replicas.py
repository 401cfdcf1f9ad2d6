"""The servers of a chaos run: real `swarm serve` processes on loopback, hurt and replaced.

1. When `open_replicas` is left, no process of it remains, stopped or not.
2. Each server has a home of its own; nothing of the user's settings reaches it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any, Literal

import trio

from routing.span import Span
from swarm.cable import LOOPBACK, Cable, is_owner_known, owner_of, relay
from swarm.chaos_plan import Blow, Kind
from swarm.errors import SwarmError
from swarm.tasks import open_tasks

READY_SECONDS = 180.0  # a start takes four seconds of a processor, and many start at once
END_SECONDS = 20.0  # a drain takes ten at most

State = Literal["serving", "leaving", "killed", "stopped", "cut"]
_STATES: dict[Kind, State] = {"close": "leaving", "kill": "killed", "stop": "stopped", "cut": "cut"}
_SIGNALS = {"close": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def why_no_cut() -> str | None:
    """Return why cables cannot be cut here, None if they can."""
    if not is_owner_known():
        return "this system does not tell which process holds a socket"
    return None


@dataclass(slots=True)
class Replica:
    """One server: its process and, where cables can be cut, its cable."""

    process: trio.Process
    span: Span
    cable: Cable
    relaying: trio.CancelScope
    peer: str = ""
    join: str = ""
    state: State = "serving"
    returns: bool = False


class Replicas:
    """The servers of a run, `count` for each span. A nursery runs their relays."""

    def __init__(
        self, model: Path, folder: Path, nursery: trio.Nursery, *, has_cables: bool
    ) -> None:
        self.all: list[Replica] = []
        self._model = model
        self._folder = folder
        self._nursery = nursery
        self._has_cables = has_cables
        self._begun = 0

    def serving(self) -> list[Replica]:
        """Those that nobody hurt."""
        return [replica for replica in self.all if replica.state == "serving"]

    async def add(self, span: Span) -> None:
        """Start one more server, and return when it serves. SwarmError with its log if it fails."""
        join = next((replica.join for replica in self.serving() if replica.join), None)
        self._begun += 1
        home = self._folder / f"server-{self._begun}"
        home.mkdir()
        cable, relaying = Cable(), trio.CancelScope()
        command = _command(self._model, span, join)
        if self._has_cables:
            command += await self._lay(cable, relaying)
        process = await _begin(command, home)
        replica = Replica(process, span, cable, relaying)
        self.all.append(replica)  # from here on `end` knows of it
        facts = await _ready_line(process, home / "log")
        replica.peer, replica.join = facts["peer"], facts["join"]

    async def _lay(self, cable: Cable, relaying: trio.CancelScope) -> list[str]:
        """Run a relay for a server to come; return the options that put it behind."""
        port = _free_port()
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)

        async def run() -> None:
            with relaying:
                async with listener:
                    await relay(listener, port, cable, self._cable_of)

        self._nursery.start_soon(run)
        outside = listener.socket.getsockname()[1]
        announced = f"/ip4/{LOOPBACK}/tcp/{outside}"
        return ["--port", str(port), "--announce", announced, "--only-announced"]

    def _cable_of(self, port: int, remote_port: int) -> Cable | None:
        cables = {replica.process.pid: replica.cable for replica in self.all}
        owner = owner_of(port, remote_port, cables)
        return None if owner is None else cables[owner]

    def strike(self, route: Sequence[tuple[str, str]], blow: Blow) -> Replica | None:
        """Hurt the hop of this route that the blow names, or the next one that nobody hurt yet.

        None if all were.
        """
        first = int(blow.hop * len(route))
        healthy = {replica.peer: replica for replica in self.serving()}
        hops = [peer for peer, _ in (*route[first:], *route[:first]) if peer in healthy]
        if not hops:
            return None
        victim = healthy[hops[0]]
        victim.state, victim.returns = _STATES[blow.kind], blow.returns
        if blow.kind == "cut":
            victim.cable.cut()
        else:
            victim.process.send_signal(_SIGNALS[blow.kind])
        return victim

    async def restore(self) -> None:
        """Let those come back that shall, end the others, and start as many afresh."""
        for replica in tuple(self.all):
            if replica.state in ("stopped", "cut") and replica.returns:
                replica.process.send_signal(signal.SIGCONT)
                replica.cable.mend()
                replica.state = "serving"
            elif replica.state != "serving":
                await self._bury(replica)
                await self.add(replica.span)
            elif replica.process.poll() is not None:
                raise SwarmError(f"a server of {replica.span} ended, and nobody had hurt it")

    async def _bury(self, replica: Replica) -> None:
        with trio.move_on_after(END_SECONDS if replica.state == "leaving" else 0):
            await replica.process.wait()
        replica.process.kill()  # a stopped one too
        await replica.process.wait()
        await _close(replica)
        self.all.remove(replica)

    async def end(self) -> None:
        """Kill all: nobody is there whom a drain would serve, and a kill ends the stopped too."""
        for replica in self.all:
            replica.process.kill()
        for replica in self.all:
            await replica.process.wait()
            await _close(replica)


async def _close(replica: Replica) -> None:
    replica.relaying.cancel()
    if replica.process.stdout is not None:
        await replica.process.stdout.aclose()


def _free_port() -> int:
    """Return a port that nobody listens on and that no outgoing connection will be given."""
    while True:
        port = SystemRandom().randrange(20000, 32000)
        with socket.socket() as trial, suppress(OSError):
            trial.bind((LOOPBACK, port))
            return port


def _command(model: Path, span: Span, join: str | None) -> list[str]:
    options = {"--blocks": str(span), "--dtype": "float32", "--threads": "1", "--host": LOOPBACK}
    if join is not None:
        options["--join"] = join
    words = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "cli", "serve", str(model), "--json", *words]


async def _begin(command: Sequence[str], home: Path) -> trio.Process:
    """Start a process of its own group: a Ctrl-C in the terminal is ours to act on."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    environment = {**ours, "SWARM_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (home / "log").open("wb") as log, trio.CancelScope(shield=True):
        return await trio.lowlevel.open_process(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )


async def _ready_line(process: trio.Process, log: Path) -> Mapping[str, Any]:
    """Return what a server says of itself once it serves. SwarmError if it does not."""
    said = b""
    with trio.move_on_after(READY_SECONDS):
        while process.stdout is not None and b"\n" not in said:
            data = await process.stdout.receive_some()
            if not data:
                break
            said += data
    try:
        facts: Any = json.loads(said)
    except ValueError:
        facts = {}
    if not facts.get("ready"):
        raise SwarmError(f"a server did not start: {said!r}, {_last_line(log)}")
    return dict(facts)


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").splitlines() or ["its log is empty"])[-1]


@asynccontextmanager
async def open_replicas(
    model: Path, spans: Sequence[Span], count: int, folder: Path, *, has_cables: bool
) -> AsyncIterator[Replicas]:
    """Start `count` servers for each span; end whatever is left of them on the way out."""
    async with open_tasks() as nursery:
        replicas = Replicas(model, folder, nursery, has_cables=has_cables)
        try:
            await replicas.add(spans[0])  # the others need its token
            async with trio.open_nursery() as starting:
                for span in [*spans[1:], *list(spans) * (count - 1)]:
                    starting.start_soon(replicas.add, span)
            yield replicas
        finally:
            with trio.CancelScope(shield=True):
                await replicas.end()
