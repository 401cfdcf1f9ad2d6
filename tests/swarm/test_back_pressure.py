"""Thirty-two clients send long prompts as fast as they can, and a hop behind is slow.

Nobody stops reading (the muxer, and the network in memory too, would end its streams), what waits
stays within its bound at every hop, nobody is refused for it, and all texts come.
"""

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio
from session_worlds import (
    BLOCKS,
    FINGERPRINT,
    IDENTITIES,
    NOW,
    VOCABULARY,
    candidates,
    next_token,
    said_after,
)
from trio.testing import MockClock

from blocks.executor import Done, FreeJob, StepJob
from routing.route import Hop, Route
from routing.span import Span
from swarm.chain import EARLY_CREDIT
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, generate
from swarm.host import open_host
from swarm.memory import MemoryNetwork
from swarm.pipes import STALL_SECONDS
from swarm.server import Room, Server
from swarm.transport import Host
from swarm.wire import Tensor

CLIENTS = 32
PROMPT_TOKENS = 1024  # four chunks
WIDTH = 1024  # so a chunk's hidden states are 1 MiB, and all prompts' 128
CHUNK_BYTES = 256 * WIDTH * 4
ROOM_BYTES = 48 << 20
SETTINGS = GenerateSettings(most_tokens=2, end_ids=frozenset())


@dataclass
class SlowExecutor:
    """Takes its time for each position; hidden states are as wide as a model's."""

    seconds_per_position: float
    caches: dict[object, list[int]] = field(default_factory=dict)
    _jobs: deque[StepJob] = field(default_factory=deque)
    _done: list[Done] = field(default_factory=list)
    _bell: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK))
    _news: trio.Event = field(default_factory=trio.Event)

    def submit(self, job: object) -> None:
        if isinstance(job, FreeJob):
            self.caches.pop(job.key, None)
        elif isinstance(job, StepJob):
            self._jobs.append(job)
            self._news.set()

    def collect(self) -> list[Done]:
        os.eventfd_read(self._bell)
        done, self._done = self._done, []
        return done

    def fileno(self) -> int:
        return self._bell

    async def run(self) -> None:
        while True:
            while self._jobs:
                job = self._jobs.popleft()
                (payload,) = job.payload.values()
                await trio.sleep(self.seconds_per_position * payload[1][1])
                self._done.append(self._computed(job))
                os.eventfd_write(self._bell, 1)
            self._news = trio.Event()
            await self._news.wait()

    def _computed(self, job: StepJob) -> Done:
        ((name, (_, shape, data)),) = job.payload.items()
        values = np.frombuffer(data, "<i4" if name == "ids" else "<f4").reshape(shape[1], -1)
        ids = values[:, 0].astype(int).tolist()
        cache = self.caches.setdefault(job.key, [])
        del cache[job.start :]
        cache += ids
        output: dict[str, Tensor] = {}
        if job.stop < BLOCKS:
            hidden = np.repeat(np.asarray(ids, "<f4")[:, None], WIDTH, axis=1)
            output = {"hidden": Tensor("float32", (1, *hidden.shape), hidden.tobytes())}
        elif job.outputs != "none":
            output = candidates([next_token(cache)])
        return Done(
            key=job.key,
            serial=job.serial,
            output=output,
            seconds=0.0,
            waited=0.0,
            length=len(cache),
            cache_bytes=0,
        )


@dataclass
class Watched:
    """The most that was ever held for sessions at a hop, beside caches and what was sent on."""

    server: Server
    most_waiting: int = 0
    most_unsent: int = 0

    def look(self) -> None:
        legs = self.server._legs
        self.most_waiting = max(self.most_waiting, legs.waiting_bytes)
        unsent = sum(leg.unsent_bytes for leg in legs.legs())
        self.most_unsent = max(self.most_unsent, unsent)


async def crowd(
    hosts: tuple[Host, Host, Host], nursery: trio.Nursery, seconds_per_position: float
) -> tuple[Watched, Watched]:
    """Let all clients speak at once over two hops, the second slow; return what these held."""
    client, *serving = hosts
    watched = []
    spans = (Span(0, 2), Span(2, 4))
    for host, span, seconds in zip(serving, spans, (0.0, seconds_per_position), strict=True):
        executor = SlowExecutor(seconds)
        room = Room(
            span=span, fingerprint=FINGERPRINT, cache_tokens=1 << 17, waiting_bytes=ROOM_BYTES
        )
        server = Server(host, executor, room, wall_clock=lambda: NOW)
        is_serving = trio.Event()
        nursery.start_soon(executor.run)
        nursery.start_soon(server.run, is_serving)
        await is_serving.wait()
        watched.append(Watched(server))
    route = Route(tuple(Hop(h.peer, s) for h, s in zip(serving, spans, strict=True)), 0.1)

    async def find(_avoid: frozenset[str], _needed: int) -> Route:
        return route

    async def speak(number: int) -> None:
        prompt = [(number + place) % VOCABULARY for place in range(PROMPT_TOKENS)]
        async with open_session(
            client,
            IDENTITIES[-1],
            find,
            fingerprint=FINGERPRINT,
            max_tokens=PROMPT_TOKENS + 2,
            wall_clock=lambda: NOW,
        ) as session:
            made = await generate(session, prompt, SETTINGS)
            assert made.token_ids == said_after(prompt, 2)
            assert session.journal.troubles == []

    async def look() -> None:
        while True:
            for each in watched:
                each.look()
            await trio.sleep(0.01)

    async with trio.open_nursery() as clients:
        looking = trio.CancelScope()

        async def look_on() -> None:
            with looking:
                await look()

        nursery.start_soon(look_on)
        for number in range(CLIENTS):
            clients.start_soon(speak, number)
    looking.cancel()
    return watched[0], watched[1]


@asynccontextmanager
async def in_memory() -> AsyncIterator[tuple[Host, Host, Host]]:
    async with MemoryNetwork(delay_seconds=0.01) as network:
        client = network.attach(IDENTITIES[-1], is_listening=False)
        first, second = network.attach(IDENTITIES[0]), network.attach(IDENTITIES[1])
        network.introduce()
        yield client, first, second


@asynccontextmanager
async def over_sockets() -> AsyncIterator[tuple[Host, Host, Host]]:
    async with AsyncExitStack() as stack:
        chosen = (IDENTITIES[-1], IDENTITIES[0], IDENTITIES[1])
        hosts = [await stack.enter_async_context(open_host(each, b"secret")) for each in chosen]
        for host in hosts:
            for other in hosts:
                if other is not host:
                    host.learn(other.peer, other.addresses)
        yield hosts[0], hosts[1], hosts[2]


def check(first: Watched, second: Watched) -> None:
    assert second.most_waiting <= ROOM_BYTES
    assert second.most_waiting >= CLIENTS * CHUNK_BYTES // 2, "it was hardly pressed"
    # What the first has computed and not sent: a window of each session, and the chunk beyond it.
    assert first.most_unsent <= CLIENTS * (EARLY_CREDIT + CHUNK_BYTES)


def test_a_slow_hop_holds_no_more_than_its_room_and_reads_on() -> None:
    seconds = 0.001

    async def main() -> None:
        async with in_memory() as hosts, trio.open_nursery() as nursery:
            check(*await crowd(hosts, nursery, seconds))
            assert trio.current_time() > 4 * STALL_SECONDS, "who did not read would have been cut"
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
def test_a_slow_hop_reads_on_over_real_sockets() -> None:
    async def main() -> None:
        async with over_sockets() as hosts, trio.open_nursery() as nursery:
            check(*await crowd(hosts, nursery, 0.0005))
            nursery.cancel_scope.cancel()

    trio.run(main)
