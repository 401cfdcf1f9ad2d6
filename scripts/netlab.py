#!/usr/bin/env python3
"""Run programs on hosts that are namespaces of this machine, over cables that can be broken.

    sudo scripts/netlab.py --hosts 3 --rtt 100 --mbit 100 -- COMMAND...
    sudo scripts/netlab.py --scenario scripts/scenarios/generate.toml
    sudo scripts/netlab.py --check

The first runs COMMAND on every host, with NETLAB_HOST (h1, h2, ...), NETLAB_ADDRESS (its own),
NETLAB_PEERS ("h2=10.77.0.2 h3=10.77.0.3") and NETLAB_FOLDER (shared by all hosts, removed at the
end) set; it is over when all have ended. The second plays a scenario: see netlab_scenario. The
third measures how true the lab is. Lines that programs print come with their host's name before
them. Exit codes: that of the first host whose command failed (of the host the scenario awaits, if
it names one, 124 if that had not ended in time); 2 bad input, or no lab to be had here;
130 interrupted.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from netlab_check import check
from netlab_lab import Cable, Lab
from netlab_scenario import Event, Scenario, make_cable, parse_nat, parse_scenario

POLL_SECONDS = 0.01
TOO_LATE = 124
"""The exit code when the host that a scenario awaits had not ended in time: that of `timeout`."""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks and return the exit code."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.check:
            for line in check():
                print(line, flush=True)
            return 0
        return play(_asked_scenario(asked), show_tallies=asked.tallies)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, metavar="N")
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS", help="of every pair")
    parser.add_argument("--mbit", type=float, metavar="RATE", help="of every pair and direction")
    parser.add_argument("--loss", type=float, default=0.0, metavar="CHANCE", help="0 to 1")
    parser.add_argument("--queue", type=float, default=100.0, metavar="MS", help="then tail drop")
    parser.add_argument(
        "--nat", action="append", default=[], metavar="HOST=KIND", help="preserving or random"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which packets are lost")
    parser.add_argument("--tallies", action="store_true", help="say at the end what was dropped")
    parser.add_argument("--scenario", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="measure how true the lab is")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    return parser


def _asked_scenario(asked: argparse.Namespace) -> Scenario:
    if asked.scenario is not None:
        return parse_scenario(asked.scenario.read_text())
    if not asked.command:
        raise ValueError("say what to run, after --, or name a --scenario")
    names = [f"h{number + 1}" for number in range(asked.hosts)]
    facts = {"rtt_ms": asked.rtt, "mbit": asked.mbit, "loss": asked.loss, "queue_ms": asked.queue}
    pairs = [word.partition("=") for word in asked.nat]
    return Scenario(
        commands={name: tuple(asked.command) for name in names},
        cable=make_cable(Cable(), facts),
        nats={name: parse_nat(kind) for name, _, kind in pairs},
        events=tuple(Event(0.0, "start", (name,)) for name in names),
        seed=asked.seed,
    )


def play(scenario: Scenario, *, show_tallies: bool = False) -> int:
    """Run a scenario to its end and return the exit code of the first host that failed."""
    names = list(scenario.commands)
    with (
        tempfile.TemporaryDirectory(prefix="netlab-") as folder,
        Lab(names, cable=scenario.cable, nats=scenario.nats, seed=scenario.seed) as lab,
    ):
        for (a, b), cable in scenario.cables.items():
            lab.change(a, b, cable)
        stage = Stage(lab, scenario, Path(folder))
        try:
            code = stage.run()
        finally:
            lab.end_hosts()
            stage.finish()
        if show_tallies:
            for (a, b), tally in lab.tallies().items():
                print(f"netlab: {a} to {b}: {tally}", file=sys.stderr)
        return code


@dataclass
class Stage:
    """A scenario while it is played."""

    lab: Lab
    scenario: Scenario
    folder: Path
    processes: "dict[str, subprocess.Popen[Any]]" = field(default_factory=dict)
    _killed: set[str] = field(default_factory=set)
    _pumps: list[threading.Thread] = field(default_factory=list)
    _printing: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> int:
        """Let everything happen in its time. Programs that still run then are left running."""
        events, began = deque(self.scenario.events), time.monotonic()
        while True:
            now = time.monotonic() - began
            while events and events[0].at_seconds <= now:
                self.happen(events.popleft())
            is_late = self.scenario.seconds is not None and now >= self.scenario.seconds
            if is_late or self._is_over(events):
                return self._exit_code()
            time.sleep(POLL_SECONDS)

    def _is_over(self, to_come: deque[Event]) -> bool:
        awaited = self._awaited()
        is_starting = any(event.verb == "start" and event.hosts[0] in awaited for event in to_come)
        return not is_starting and all(self.processes[name].poll() is not None for name in awaited)

    def _exit_code(self) -> int:
        """The first failure of a host that is awaited. Being killed by the play is none."""
        begun = [name for name in self._awaited() if name in self.processes]
        codes = [self.processes[name].poll() for name in begun if name not in self._killed]
        if self.scenario.until is not None and None in codes:
            return TOO_LATE
        return next((code if code > 0 else 128 - code for code in codes if code), 0)

    def _awaited(self) -> list[str]:
        until, commands = self.scenario.until, self.scenario.commands
        return [until] if until is not None else [name for name in commands if commands[name]]

    def happen(self, event: Event) -> None:
        """Carry out one event."""
        match event.verb:
            case "start":
                self._start(*event.hosts)
            case "kill":
                self._killed.update(event.hosts)
                self.lab.host(*event.hosts).kill()
            case "cut":
                self.lab.cut(*event.hosts)
            case "mend":
                self.lab.mend(*event.hosts)
            case "set":
                self.lab.link(*event.hosts).set(**event.changes)
        if event.verb != "start":
            words = " ".join((event.verb, *event.hosts))
            print(f"netlab: {words} at {event.at_seconds:g} s", file=sys.stderr, flush=True)

    def _start(self, name: str) -> None:
        process = self.lab.host(name).popen(
            self.scenario.commands[name],
            env={**os.environ, "NETLAB_FOLDER": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.processes[name] = process
        self._killed.discard(name)
        for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            pump = threading.Thread(target=self._pump, args=(name, source, sink), daemon=True)
            pump.start()
            self._pumps.append(pump)

    def finish(self) -> None:
        """Wait until all that was said is printed. The programs have ended before."""
        for pump in self._pumps:
            pump.join()

    def _pump(self, name: str, source: IO[str], sink: IO[str]) -> None:
        with source:
            for line in source:
                with self._printing:  # or the lines of two hosts run into each other
                    print(f"{name}| {line.rstrip()}", file=sink, flush=True)


if __name__ == "__main__":
    # ended as politely as by Ctrl-C: everything is removed on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
