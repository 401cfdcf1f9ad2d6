"""Three ways to say a text while servers die, each over a fresh `fault_world`.

1. The ways differ in nothing but what they send for a step and what they do about a failure.
2. Seconds count from opening the (first) session to the last token.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import trio
from fault_world import FINGERPRINT, Lots, World, open_world

from blocks.stack import Stack
from blocks.thread import ComputeThread
from routing.route import Route
from swarm.client_session import ClientSession, FindRoute, open_session
from swarm.sampling import SamplingSettings, candidates_from, choose, wish_for
from swarm.wire import Tensor

Way = Literal["restarts", "cacheless", "ours"]

GREEDY = SamplingSettings()


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table."""

    tokens: int
    way: Way
    probability: float


@dataclass(frozen=True, slots=True)
class Run:
    """One text, said to its end."""

    seed: int
    seconds: float
    struck: tuple[tuple[int, int], ...]  # (position, stage) of each failure
    restarts: int
    replayed: tuple[int, ...]  # positions computed again, by stage
    computed_seconds: float  # by all stages
    cpu_seconds: float  # of this process: what a busy machine does not stretch
    gaps: tuple[tuple[int, float], ...]  # (position, seconds) of each token that a failure held up
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share. `away_seconds` is how long a lost server is away."""

    stacks: Sequence[Stack]
    thread: ComputeThread
    prompt: tuple[int, ...]
    replicas: int
    away_seconds: float


@dataclass(slots=True)
class Said:
    """A text as it grows, and what held it up."""

    ids: list[int]  # the prompt's first
    gaps: list[tuple[int, float]] = field(default_factory=list)
    restarts: int = 0


async def run_once(cell: Cell, seed: int, bench: Bench) -> Run:
    """Say one text in a fresh swarm. Raises what `ClientSession.next_output` raises."""
    stages = range(len(bench.stacks))
    lots = Lots(seed, cell.probability, len(stages))
    async with open_world(
        bench.stacks,
        bench.thread,
        lots,
        replicas=bench.replicas,
        away_seconds=bench.away_seconds,
    ) as world:
        began, cpu_began = trio.current_time(), time.process_time()
        say = _say_with_restarts if cell.way == "restarts" else _say_with_repairs
        said = await say(world, bench.prompt, cell)
        seconds, cpu_seconds = trio.current_time() - began, time.process_time() - cpu_began
    once = len(bench.prompt) + cell.tokens - 1
    needed = sum(range(len(bench.prompt), once + 1)) if cell.way == "cacheless" else once
    return Run(
        seed=seed,
        seconds=seconds,
        struck=tuple(lots.struck),
        restarts=said.restarts,
        replayed=tuple(world.tallies[stage].positions - needed for stage in stages),
        computed_seconds=sum(tally.seconds for tally in world.tallies),
        cpu_seconds=cpu_seconds,
        gaps=tuple(said.gaps),
        token_ids=tuple(said.ids[len(bench.prompt) :]),
    )


async def _say_with_repairs(world: World, prompt: Sequence[int], cell: Cell) -> Said:
    said = Said(list(prompt))
    async with open_session(
        world.host,
        world.identity,
        world.find_route,
        repair_route=world.repair_route,
        fingerprint=FINGERPRINT,
        max_tokens=len(prompt) + cell.tokens,
    ) as session:
        await _say(session, world, said, cell.tokens, is_cached=cell.way == "ours")
    return said


class _Lost(Exception):
    """A way without repair has met a failure."""


async def _say_with_restarts(world: World, prompt: Sequence[int], cell: Cell) -> Said:
    restarts = 0
    while True:
        world.lots.begin()
        said = Said(list(prompt), restarts=restarts)
        try:
            async with open_session(
                world.host,
                world.identity,
                _found_once(world),
                fingerprint=FINGERPRINT,
                max_tokens=len(prompt) + cell.tokens,
            ) as session:
                await _say(session, world, said, cell.tokens, is_cached=True)
                return said
        except _Lost:
            restarts += 1


def _found_once(world: World) -> FindRoute:
    """Return what finds a session its first route, and raises _Lost when it asks for another."""
    has_route = False

    async def find(avoid: frozenset[str], needed_tokens: int) -> Route:
        nonlocal has_route
        if has_route:
            raise _Lost
        route = await world.find_living(avoid, needed_tokens)
        has_route = True
        return route

    return find


async def _say(
    session: ClientSession, world: World, said: Said, tokens: int, *, is_cached: bool
) -> None:
    """Generate greedily. Cached, a step sends what is new, else all from position 0 on."""
    ids, prompted = said.ids, len(said.ids)
    wish = wish_for(GREEDY, ())
    while len(ids) < prompted + tokens:
        start = len(ids) - 1 if is_cached and len(ids) > prompted else 0
        chunk = np.asarray(ids[start:], "<i4")
        payload = {"ids": Tensor("int32", (1, len(chunk)), chunk.tobytes())}
        began, struck = trio.current_time(), len(world.lots.struck)
        session.step(start, payload, "last", wish)
        output = await session.next_output()
        if len(world.lots.struck) > struck:
            said.gaps.append((len(ids) - 1, trio.current_time() - began))
        ids.append(choose(candidates_from(output.payload, wish)[0], GREEDY, len(ids), {}))
