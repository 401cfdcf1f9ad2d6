"""A play for the lab: hosts with commands, cables between them, and what befalls them when.

    until = "client"            # over when this host's command ends; without it, when all have
    seconds = 60                # over then at the latest
    events = ["at 2.0 s cut server client", "at 4 s mend server client"]
    [cable]                     # between all pairs; fields of netlab_wire.Cable
    rtt_ms = 100
    [hosts.server]
    command = "my-server --port 7000"             # by sh; NETLAB_FOLDER is shared by all hosts
    [hosts.client]
    command = "my-client $SERVER"
    starts_at = 1.5                               # seconds; 0 if not given
    nat = "random"                                # or "preserving"; none if not given
    [[cables]]                                    # where a pair differs
    between = ["server", "client"]
    mbit = 10

Verbs: `cut A [B]`, `mend A [B]` (without B: all cables of A), `set A B rtt_ms=300 mbit=5 ...`,
`kill A` (all its processes, at once), `start A` (its command once more).

Invariants:
 1. What cannot be played is told before anything starts: unknown words, hosts, fields and values.
 2. Events come in order of time; those of the same time in the order written, starts first.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from netlab_namespace import Nat
from netlab_wire import Cable

HOSTS_OF_VERB = {"cut": (1, 2), "mend": (1, 2), "set": (2, 2), "kill": (1, 1), "start": (1, 1)}
CABLE_FIELDS = {each.name for each in fields(Cable)}
SCENARIO_KEYS = {"until", "seconds", "seed", "cable", "hosts", "cables", "events"}
HOST_KEYS = {"command", "starts_at", "nat"}


@dataclass(frozen=True, slots=True)
class Event:
    """What happens, to whom, and how many seconds after the beginning."""

    at_seconds: float
    verb: str
    hosts: tuple[str, ...]
    changes: Mapping[str, float] = field(default_factory=dict)  # of `set`


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that a run needs, checked."""

    commands: Mapping[str, tuple[str, ...]]  # by host, in order; empty: a host without a command
    cable: Cable = field(default_factory=Cable)
    cables: Mapping[tuple[str, str], Cable] = field(default_factory=dict)  # pairs that differ
    nats: Mapping[str, Nat] = field(default_factory=dict)
    events: tuple[Event, ...]  # in order of time
    until: str | None = None
    seconds: float | None = None
    seed: int = 0


def parse_scenario(text: str) -> Scenario:
    """Return the scenario that a TOML text describes. ValueError says what is wrong with it."""
    facts = tomllib.loads(text)
    _only(facts, SCENARIO_KEYS, "a scenario")
    hosts: dict[str, dict[str, Any]] = facts.get("hosts", {})
    if not hosts:
        raise ValueError("a scenario needs hosts")
    for name, described in hosts.items():
        _only(described, HOST_KEYS, f"host {name}")
    cable = make_cable(Cable(), facts.get("cable", {}))
    starts = [
        Event(float(described.get("starts_at", 0)), "start", (name,))
        for name, described in hosts.items()
        if "command" in described
    ]
    events = [*starts, *(parse_event(words, set(hosts)) for words in facts.get("events", []))]
    commanded = {event.hosts[0] for event in starts}
    if idle := {each.hosts[0] for each in events if each.verb == "start"} - commanded:
        raise ValueError(f"a start needs a command: {', '.join(sorted(idle))} has none")
    until = facts.get("until")
    if until is not None and until not in commanded:
        raise ValueError(f"until names a host with a command, not {until!r}")
    return Scenario(
        commands={
            name: ("sh", "-c", described["command"]) if "command" in described else ()
            for name, described in hosts.items()
        },
        cable=cable,
        cables=dict(_differing(entry, cable, set(hosts)) for entry in facts.get("cables", [])),
        nats={name: parse_nat(host["nat"]) for name, host in hosts.items() if "nat" in host},
        events=tuple(sorted(events, key=lambda event: event.at_seconds)),
        until=until,
        seconds=facts.get("seconds"),
        seed=facts.get("seed", 0),
    )


def parse_event(text: str, hosts: set[str]) -> Event:
    """Return the event that reads like «at 2.0 s cut a b». ValueError says what is wrong."""
    match text.split():
        case ["at", seconds, "s", verb, *rest] if verb in HOSTS_OF_VERB:
            pass
        case _:
            verbs = ", ".join(HOSTS_OF_VERB)
            raise ValueError(f"an event is «at 2.0 s VERB HOST...», VERB of {verbs}: {text!r}")
    named = tuple(word for word in rest if "=" not in word)
    changes = dict(word.split("=", 1) for word in rest if "=" in word)
    least, most = HOSTS_OF_VERB[verb]
    if not least <= len(named) <= most or bool(changes) != (verb == "set"):
        raise ValueError(f"{verb} takes {least} to {most} hosts, set fields too: {text!r}")
    if unknown := set(named) - hosts:
        raise ValueError(f"there is no host {', '.join(sorted(unknown))}: {text!r}")
    if len(set(named)) < len(named):
        raise ValueError(f"no cable joins a host with itself: {text!r}")
    numbers = {key: float(value) for key, value in changes.items()}
    make_cable(Cable(), numbers)  # told now, not when it happens
    return Event(float(seconds), verb, named, numbers)


def parse_nat(text: str) -> Nat:
    """Return the kind of NAT. ValueError names the kinds there are."""
    kinds: dict[str, Nat] = {kind: kind for kind in get_args(Nat)}
    if text not in kinds:
        raise ValueError(f"a NAT is one of {', '.join(kinds)}, not {text!r}")
    return kinds[text]


def make_cable(base: Cable, facts: Mapping[str, Any]) -> Cable:
    """Return the base with some fields changed. ValueError for unknown fields and bad values."""
    _only(facts, CABLE_FIELDS, "a cable")
    try:
        return replace(base, **facts)
    except TypeError as error:
        raise ValueError(f"a cable's fields are numbers: {dict(facts)}") from error


def _differing(
    entry: Mapping[str, Any], base: Cable, hosts: set[str]
) -> tuple[tuple[str, str], Cable]:
    pair = entry.get("between", [])
    if len(set(pair)) != 2 or not set(pair) <= hosts:
        raise ValueError(f"a cable is between two hosts, not {pair}")
    facts = {key: value for key, value in entry.items() if key != "between"}
    return (pair[0], pair[1]), make_cable(base, facts)


def _only(facts: Mapping[str, Any], known: set[str], what: str) -> None:
    if odd := set(facts) - known:
        raise ValueError(f"{what} has {', '.join(sorted(known))}, not {', '.join(sorted(odd))}")
