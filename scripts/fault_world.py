"""A swarm in one process whose servers die by lot: what `fault_table.py` measures.

Real stacks, executors, servers and client sessions on the network in memory. Each stage (a span)
has several servers; they share its weights and one compute thread, and nothing else.

1. The lot is cast when the activations of a new position reach a stage, before anything is done
   with them: once for each try. What a replay sends again rides along and is not drawn for.
2. The lot depends on seed, position, stage and try only: all algorithms meet the same faults, and
   those of a small probability are among those of a greater one.
3. A struck server loses streams, legs and caches at once, as if its process had died, and cannot
   be dialled. It comes back `away_seconds` later, empty. The client is told nothing of either.
"""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio

from blocks.executor import Executor, StepJob
from blocks.stack import Stack
from blocks.thread import ComputeThread
from routing.cost import CostModel, MeasuredLinks, Work
from routing.offer import Offer
from routing.repair import Repair, repair
from routing.route import NoRoute as Gap
from routing.route import Route
from routing.search import fastest_route
from routing.span import Span
from swarm.client import WIRE_BYTES_PER_VALUE, no_route
from swarm.client_session import Broken
from swarm.identity import Identity
from swarm.leg import step_length
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.messages import AnyMessage, FaultKind, Step
from swarm.server import Room, Server

FINGERPRINT = "fa" * 32
ROUND_TRIP_SECONDS = 0.001  # what the router takes every link for; all are alike
SECONDS_PER_BLOCK = 0.0005  # what every server announces: all are alike


class Lots:
    """Which sends are lost. `begin` is called as a text begins, from its first position on."""

    def __init__(self, seed: int, probability: float, stages: int) -> None:
        """`probability`: of each send to a stage."""
        self.struck: list[tuple[int, int]] = []
        """(position, stage) of each loss, in order."""
        self._seed = seed
        self._probability = probability
        self._reached = [-1] * stages
        self._tries: Counter[tuple[int, int]] = Counter()

    def begin(self) -> None:
        """A text begins (again): its positions are new to every stage."""
        self._reached = [-1] * len(self._reached)

    def strikes(self, stage: int, position: int) -> bool:
        """Return whether these activations are lost on their way to the stage, with its server."""
        if position <= self._reached[stage]:
            return False
        place = (position, stage)
        self._tries[place] += 1
        drawn = Random(f"{self._seed}/{position}/{stage}/{self._tries[place]}").random()
        if drawn < self._probability:
            self.struck.append(place)
            return True
        self._reached[stage] = position
        return False


@dataclass(slots=True)
class Tally:
    """What the servers of one stage computed, all lives together."""

    positions: int = 0
    seconds: float = 0.0


class _CountingExecutor:
    """An executor whose work is tallied."""

    def __init__(self, executor: Executor, tally: Tally) -> None:
        self._executor = executor
        self._tally = tally

    def submit(self, job: Any) -> None:
        if isinstance(job, StepJob):
            self._tally.positions += next(iter(job.payload.values()))[1][1]
        self._executor.submit(job)

    def collect(self) -> list[Any]:
        done = self._executor.collect()
        self._tally.seconds += sum(each.seconds for each in done)
        return done

    def fileno(self) -> int:
        return self._executor.fileno()


class _MortalServer(Server):
    """One life of a server: ends where the lots say so."""

    def __init__(self, stage: int, lots: Lots, host: MemoryHost, executor: Any, room: Room) -> None:
        super().__init__(host, executor, room)
        self.death = trio.Event()
        self._stage = stage
        self._lots = lots

    def received(self, link: int, message: AnyMessage) -> None:
        if self.death.is_set():
            return
        if isinstance(message, Step):
            position = message.start + step_length(message) - 1
            if self._lots.strikes(self._stage, position):
                self.death.set()
                return
        super().received(link, message)

    def ended(self, link: int, failure: FaultKind, message: str) -> None:
        if not self.death.is_set():
            super().ended(link, failure, message)


@dataclass(slots=True)
class Replica:
    """One of a stage's servers, over all its lives."""

    identity: Identity
    stage: int
    span: Span
    is_alive: bool = False
    is_ready: trio.Event = field(default_factory=trio.Event)

    @property
    def offer(self) -> Offer:
        """What it announces, in all its lives alike."""
        return Offer(
            peer=self.identity.peer,
            span=self.span,
            decode_seconds_per_block=SECONDS_PER_BLOCK,
            prefill_seconds_per_block_token=SECONDS_PER_BLOCK,
            free_tokens=1 << 30,
        )


class World:
    """The swarm, and what its client knows. Made by `open_world`."""

    def __init__(
        self,
        network: MemoryNetwork,
        stacks: Sequence[Stack],
        thread: ComputeThread,
        lots: Lots,
        *,
        replicas: int,
        away_seconds: float,
    ) -> None:
        self.lots = lots
        self.tallies = [Tally() for _ in stacks]
        self.identity = Identity(bytes([255]) * 32)
        self.host = network.attach(self.identity, is_listening=False)
        self.replicas = [
            Replica(
                Identity(bytes([1 + number]) * 32),
                number % len(stacks),
                Span(stacks[number % len(stacks)].start, stacks[number % len(stacks)].stop),
            )
            for number in range(replicas * len(stacks))
        ]
        self._network = network
        self._stacks = stacks
        self._thread = thread
        self._away_seconds = away_seconds

    async def live(self, replica: Replica) -> None:
        """Serve, die, come back; until cancelled."""
        stack = self._stacks[replica.stage]
        room = Room(span=replica.span, fingerprint=FINGERPRINT, cache_tokens=1 << 30)
        while True:
            host = self._network.attach(replica.identity)
            self._network.introduce()
            with closing(Executor(stack, self._thread)) as executor:
                counting = _CountingExecutor(executor, self.tallies[replica.stage])
                server = _MortalServer(replica.stage, self.lots, host, counting, room)
                async with trio.open_nursery() as life:
                    is_serving = trio.Event()
                    life.start_soon(server.run, is_serving)
                    await is_serving.wait()
                    replica.is_alive = True
                    replica.is_ready.set()
                    await server.death.wait()
                    replica.is_alive = False
                    self._network.kill(host.peer)
                    life.cancel_scope.cancel()
            await trio.sleep(self._away_seconds)

    async def find_route(self, avoid: frozenset[str], needed_tokens: int) -> Route:
        """Search among all servers, dead or not, as one does who cannot know."""
        return self._searched(self.replicas, avoid, needed_tokens)

    async def find_living(self, avoid: frozenset[str], needed_tokens: int) -> Route:
        """Search among those that live: better than any client could."""
        alive = [replica for replica in self.replicas if replica.is_alive]
        return self._searched(alive, avoid, needed_tokens)

    async def repair_route(self, broken: Broken, needed_tokens: int) -> Repair:
        """Replace lost hops, as `swarm.client.Client` does."""
        try:
            return repair(
                broken.hops,
                broken.troubles,
                [replica.offer for replica in self.replicas],
                self._stacks[-1].stop,
                self._cost(),
                retried=broken.retried,
                suspects=broken.suspects,
                needed_tokens=needed_tokens,
            )
        except Gap as gap:
            raise no_route(gap) from gap

    def _searched(
        self, replicas: Sequence[Replica], avoid: frozenset[str], needed_tokens: int
    ) -> Route:
        try:
            return fastest_route(
                [replica.offer for replica in replicas],
                self._stacks[-1].stop,
                self._cost(),
                needed_tokens=needed_tokens,
                avoid=avoid,
            )
        except Gap as gap:
            raise no_route(gap) from gap

    def _cost(self) -> CostModel:
        work = Work(
            blocks=self._stacks[-1].stop,
            tokens=1,
            bytes_per_token=self._stacks[0].hidden_size * WIRE_BYTES_PER_VALUE,
            is_prefill=False,
        )
        return CostModel(MeasuredLinks({}, ROUND_TRIP_SECONDS), work)


@asynccontextmanager
async def open_world(
    stacks: Sequence[Stack],
    thread: ComputeThread,
    lots: Lots,
    *,
    replicas: int,
    away_seconds: float,
) -> AsyncIterator[World]:
    """Start `replicas` servers for each stack; all end with the block."""
    async with MemoryNetwork() as network, trio.open_nursery() as nursery:
        world = World(network, stacks, thread, lots, replicas=replicas, away_seconds=away_seconds)
        for replica in world.replicas:
            nursery.start_soon(world.live, replica)
        for replica in world.replicas:
            await replica.is_ready.wait()
        yield world
        nursery.cancel_scope.cancel()
