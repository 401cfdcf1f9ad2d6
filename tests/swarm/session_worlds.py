"""Servers whose model is arithmetic, and a client, on a network in memory and in virtual time."""

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

import numpy as np
import trio
from trio.testing import MockClock

from blocks.executor import Done, ForkJob, FreeJob, StepJob
from blocks.jobs import failed_fork
from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import ClientSession, FindRoute, open_session
from swarm.errors import NoRoute
from swarm.identity import Identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.server import Room, Server
from swarm.wire import Tensor

FINGERPRINT = "ab" * 32
BLOCKS = 4
VOCABULARY = 97
NOW = 1_000_000.0
IDENTITIES = [Identity(bytes([seed]) * 32) for seed in range(1, 12)]


def next_token(ids: Sequence[int]) -> int:
    """What the model says after these ids."""
    return sum((place + 1) * token for place, token in enumerate(ids)) % VOCABULARY


def said_after(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class ArithmeticExecutor:
    """Answers at once: a leg's cache is the ids it was given, passed on as hidden states."""

    def __init__(self) -> None:
        self.caches: dict[object, list[int]] = {}
        self.jobs: list[StepJob] = []
        self.forks: list[ForkJob] = []
        self.is_asked = trio.Event()
        self.is_stuck = False
        self.most_jobs: int | None = None  # then it is stuck
        self.can_roll_back = True
        self.rollbacks = 0
        self.error: str | None = None
        self._done: list[Done] = []
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)

    def submit(self, job: object) -> None:
        if isinstance(job, FreeJob):
            self.caches.pop(job.key, None)
        elif isinstance(job, ForkJob):
            held = self.caches.get(job.of, [])
            if len(held) < job.length or not self.can_roll_back:
                self._done.append(failed_fork(job.key, "no such fork"))
                os.eventfd_write(self._bell, 1)
                return
            self.forks.append(job)
            self.caches[job.key] = held[: job.length]
        elif isinstance(job, StepJob):
            self.jobs.append(job)
            self.is_asked.set()
            is_rollback = job.start < len(self.caches.get(job.key, ()))
            self.rollbacks += is_rollback
            if is_rollback and not self.can_roll_back:
                self.error = "this family cannot roll back"
            output = self._computed(job)
            done = Done(
                key=job.key,
                serial=job.serial,
                output=output,
                seconds=0.5,
                waited=0.0,
                length=len(self.caches[job.key]),
                cache_bytes=0,
                shortest_fork=1 if self.can_roll_back else None,
                error=self.error,
            )
            if not self.is_stuck and (self.most_jobs is None or len(self.jobs) <= self.most_jobs):
                self._done.append(done)
                os.eventfd_write(self._bell, 1)

    def collect(self) -> list[Done]:
        os.eventfd_read(self._bell)
        done, self._done = self._done, []
        return done

    def fileno(self) -> int:
        return self._bell

    def _computed(self, job: StepJob) -> dict[str, Tensor]:
        kind = "<i4" if "ids" in job.payload else "<f4"
        raw = next(iter(job.payload.values()))
        ids = np.frombuffer(raw[2], kind).astype(int).tolist()
        cache = self.caches.setdefault(job.key, [])
        del cache[job.start :]
        cache += ids
        if job.stop < BLOCKS:
            hidden = np.asarray(ids, "<f4")
            return {"hidden": Tensor("float32", (1, len(ids), 1), hidden.tobytes())}
        if job.outputs == "none":
            return {}
        first = len(cache) - 1 if job.outputs == "last" else job.start
        tokens = [next_token(cache[: place + 1]) for place in range(first, len(cache))]
        return candidates(tokens)


def candidates(tokens: Sequence[int]) -> dict[str, Tensor]:
    """Each position's likeliest token, and its neighbour not much behind."""
    rows = np.asarray([[token, (token + 1) % VOCABULARY] for token in tokens], "<i4")
    rows = rows.reshape(len(tokens), 2)
    logits = np.asarray([[1.0, 0.5]] * len(tokens), "<f4").reshape(len(tokens), 2)
    left = np.full(len(tokens), -50.0, "<f4")
    return {
        "tokens": Tensor("int32", rows.shape, rows.tobytes()),
        "logits": Tensor("float32", logits.shape, logits.tobytes()),
        "named": Tensor("float32", (len(tokens), 0), b""),
        "left": Tensor("float32", left.shape, left.tobytes()),
    }


class Served:
    """One server of the world."""

    def __init__(self, identity: Identity, host: MemoryHost, span: str, tokens: int) -> None:
        self.identity = identity
        self.host = host
        self.peer = host.peer
        self.span = Span.parse(span)
        self.executor = ArithmeticExecutor()
        room = Room(span=self.span, fingerprint=FINGERPRINT, cache_tokens=tokens)
        self.server = Server(host, self.executor, room, wall_clock=lambda: NOW)

    @property
    def positions(self) -> int:
        """How many positions it computed in all."""
        return sum(next(iter(job.payload.values()))[1][1] for job in self.executor.jobs)

    @property
    def is_clean(self) -> bool:
        """True when nothing of any session is left."""
        return self.server.is_idle and not self.executor.caches


class World:
    """A network with a client; servers are added."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.identity = IDENTITIES[-1]
        self.host = network.attach(self.identity, is_listening=False)
        self.servers: list[Served] = []
        self.asked: list[tuple[float, frozenset[str]]] = []

    async def add(self, *spans: str, tokens: int = 4096) -> list[Served]:
        added = []
        for span in spans:
            identity = IDENTITIES[len(self.servers)]
            served = Served(identity, self.network.attach(identity), span, tokens)
            is_serving = trio.Event()
            self.nursery.start_soon(served.server.run, is_serving)
            await is_serving.wait()
            self.servers.append(served)
            added.append(served)
        self.network.introduce()
        return added

    async def find(self, avoid: frozenset[str], _needed: int) -> Route:
        """The first servers that join, none of them in `avoid`."""
        self.asked.append((trio.current_time(), avoid))
        hops: list[Hop] = []
        while not hops or hops[-1].span.stop < BLOCKS:
            start = hops[-1].span.stop if hops else 0
            found = [s for s in self.servers if s.span.start == start and s.peer not in avoid]
            if not found:
                raise NoRoute(f"block {start} is served by nobody", uncovered=(f"{start}",))
            hops.append(Hop(found[0].peer, found[0].span))
        return Route(tuple(hops), 0.1)

    def session(
        self, find: FindRoute | None = None, *, max_tokens: int = 600, route_seconds: float = 30.0
    ) -> AbstractAsyncContextManager[ClientSession]:
        return open_session(
            self.host,
            self.identity,
            find or self.find,
            fingerprint=FINGERPRINT,
            max_tokens=max_tokens,
            wall_clock=lambda: NOW,
            route_seconds=route_seconds,
        )


Body = Callable[[World], Awaitable[None]]


def run(body: Body, *, delay_seconds: float = 0.01) -> None:
    """Run the body in a world, in virtual time."""

    async def main() -> None:
        async with (
            MemoryNetwork(delay_seconds=delay_seconds) as network,
            trio.open_nursery() as nursery,
        ):
            await body(World(network, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
