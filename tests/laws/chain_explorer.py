"""Schedulers for a world of the chain: one at random, and one that tries every interleaving.

1. The same seed gives the same run.
2. Worlds whose parts differ only in the numbers of links and legs are one state.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from random import Random
from types import MethodType
from typing import Any

from chain_client import Broken, Client, Scenario
from chain_links import Link
from chain_peer import Peer
from chain_stack import Stack
from chain_world import Event, World

from swarm import sharing
from swarm.chain import History, Inlet, Outlet
from swarm.leg import Leg
from swarm.legs import Legs
from swarm.prefix import Digests, Index, Pages
from swarm.session import Session
from swarm.sharing import Sharing


@dataclass(frozen=True, slots=True)
class Found:
    """What an exploration saw. `breach` is empty when all laws held."""

    breach: str
    trace: tuple[Event, ...]
    steps: int  # transitions taken
    states: int = 0


def run_at_random(scenario: Scenario, seed: int) -> Found:
    """One run with a seeded scheduler; faults come early or late, by the seed."""
    rng = Random(seed)
    rate = rng.choice((0.02, 0.05, 0.1, 0.3))
    trace: list[Event] = []
    try:
        world = World(scenario, rng)
        while True:
            events = world.events()
            faults = world.faults() if not events or rng.random() < rate else []
            if not events and not faults:
                break
            trace.append(rng.choice(faults or events))
            world.do(trace[-1])
            if len(trace) > 4000:
                raise Broken("the session goes on without end")
        world.check_end()
    except (Broken, AssertionError, LookupError, ValueError) as breach:
        return Found(repr(breach), tuple(trace), len(trace))
    return Found("", tuple(trace), len(trace))


def run_many(scenario: Scenario, seeds: Iterable[int]) -> Found:
    """Random runs until a breach; of that run, the whole trace."""
    steps = 0
    for seed in seeds:
        found = run_at_random(scenario, seed)
        steps += found.steps
        if found.breach:
            return Found(f"seed {seed}: {found.breach}", found.trace, steps)
    return Found("", (), steps)


def explore(scenario: Scenario, most_states: int = 10**9) -> Found:
    """Every interleaving, breadth first: the first breach comes with its shortest trace."""
    first = World(scenario)
    seen = {state_of(first)}
    waiting: deque[tuple[World, tuple[Any, ...]]] = deque([(first, ())])
    steps = 0
    while waiting and len(seen) < most_states:
        world, trace = waiting.popleft()
        events = world.events()
        try:
            if not events:
                clone(world).check_end()
            for event in (*events, *world.faults()):
                last, trace_there = event, (trace, event)
                after = clone(world)
                after.do(event)
                steps += 1
                state = state_of(after)
                if state not in seen:
                    seen.add(state)
                    waiting.append((after, trace_there))
        except (Broken, AssertionError, LookupError, ValueError) as breach:
            ending = (last,) if events else ()
            return Found(repr(breach), (*_unfold(trace), *ending), steps, len(seen))
    return Found("", (), steps, len(seen))


def _unfold(trace: tuple[Any, ...]) -> list[Event]:
    events: list[Event] = []
    while trace:
        trace, event = trace
        events.append(event)
    return events[::-1]


_SHARING = (Sharing, Index, Pages, Digests, sharing._Kept)
_MACHINES = (Legs, Leg, Session, History, Inlet, Outlet, *_SHARING)
_MUTABLE = {World, Peer, Client, Link, Stack, *_MACHINES, dict, list, deque, set, MethodType, count}


def clone(world: World) -> World:
    """A copy that shares what cannot change. Quick, because the search lives on it."""
    copied: World = _clone(world, {})
    return copied


def _clone(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind not in _MUTABLE:
        return value
    if kind is dict:
        return {key: _clone(v, memo) if type(v) in _MUTABLE else v for key, v in value.items()}
    if kind is deque or kind is list or kind is set:
        return kind([_clone(v, memo) if type(v) in _MUTABLE else v for v in value])
    if kind is MethodType:
        return MethodType(value.__func__, _clone(value.__self__, memo))
    if kind is count:
        return count(int(repr(value)[len("count(") : -1]))  # it can be read, not asked
    if id(value) in memo:
        return memo[id(value)]
    copied = memo[id(value)] = object.__new__(kind)
    for name in getattr(kind, "__slots__", ()) or value.__dict__:
        attribute = getattr(value, name)
        setattr(copied, name, _clone(attribute, memo) if type(attribute) in _MUTABLE else attribute)
    return copied


def state_of(world: World) -> int:
    """A number for the world's state, whatever its links and legs happen to be called."""
    names: dict[int, int] = {}

    def name(link: int | None) -> int:
        return -1 if link is None else names.setdefault(abs(link), len(names))

    def outlet(end: Outlet | None) -> tuple[object, ...]:
        if end is None:
            return ()
        return (name(end.link), end.epoch, end.sent, end.is_known, end.window, end.outstanding)

    client, session = world.client, world.client.session
    parts: list[object] = [
        (world.budget, client.state, len(client.ids), client.serials, session.epoch, session.got),
        (session.route, tuple(client.troubles), tuple(client.suspects), client.repairs),
        (frozenset(client.failed), frozenset(client.retried), world.has_expired),
        (world.may_be_forgotten, world.has_dropped, world.has_evicted),
        (outlet(session._uplink), name(session._downlink), tuple(session._unanswered)),
        (tuple(entry.serial for entry in session.log.entries), session._inlet.waiting),
    ]
    for peer in world.peers:
        parts.append((peer.is_alive, peer.is_draining, peer.refusals))
        parts.append(tuple(peer.legs._highest.values()))
        held = peer.sharing._kept.values()
        parts.append(tuple((kept.span, *kept.pages.digests) for kept in held))
        for leg in sorted(peer.legs.legs(), key=lambda leg: leg.span):
            serials = tuple(entry.serial for entry in leg.history.entries)
            steps = tuple(step.serial for step in peer.steps.get(leg.number, ()))
            parts.append((leg.span, leg.opened, name(leg.up), outlet(leg.down), leg.next, serials))
            parts.append((outlet(leg.downlink), leg.downlink_epoch, leg.admitted, leg.length))
            parts.append((leg.sent_on, leg.history.dropped, leg.history.dropped_wanted))
            parts.append(
                (
                    steps,
                    leg.has_failed,
                    leg.number in peer.broken,
                    leg._inlet.waiting,
                    leg._inlet.window,
                    leg._inlet._owed,
                )
            )
            parts.append((leg.is_evicted, leg._eviction, leg._given, leg._position_bytes))
            parts.append(tuple(size for _, _, size in leg._waiting))
            if leg.pages is not None:
                parts.append((leg.pages.length, *leg.pages.received.pages, *leg.vouched))
        parked = sorted(peer.legs._parked.values(), key=lambda parked: parked.attach.epoch)
        parts += [(name(waiting.link), waiting.attach) for waiting in parked]
        parts.append(len(peer.timers))
    known = sorted(names, key=names.__getitem__)
    rest = [link for link in world.links if link not in names]
    parts += [_link_state(world.links.get(link)) for link in known]
    parts.append(frozenset(_link_state(world.links[link]) for link in rest))
    return hash(tuple(parts))


def _link_state(link: Link | None) -> object:
    if link is None:
        return None
    queues = tuple(tuple(_message_state(message) for message in queue) for queue in link.queues)
    return (link.ends, queues, tuple(link.listens), link.is_broken, link.is_new)


def _message_state(message: Any) -> object:
    payload = getattr(message, "payload", None)
    if payload is None:
        return message
    return (type(message), message.serial, getattr(message, "after", 0), message.start)


def assert_lawful(found: Found) -> None:
    print(f"{found.steps} transitions, {found.states} states")  # pytest -rP shows it
    assert not found.breach, "\n".join([found.breach, *map(str, found.trace)])
