"""Sessions that say nothing for minutes, in virtual time: they go on, or leave nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import trio
from repair_worlds import cut_off, mended, watched
from session_worlds import FINGERPRINT, NOW, Served, World, run, said_after

from swarm.client_session import OPEN_VALID_SECONDS, ClientSession, open_session
from swarm.server import CLOCK_SLACK_SECONDS, GRACE_SECONDS
from swarm.wire import Tensor

PROMPT = [3, 14, 15, 92]
IDLE_SECONDS = 120.0
LONG_SECONDS = OPEN_VALID_SECONDS + CLOCK_SLACK_SECONDS + 10.0  # the session's Opens are too old
UNDISTURBED = len(PROMPT) + 9
NOTICED_SECONDS = 5.0


@asynccontextmanager
async def session_of(world: World, *, has_pulse: bool) -> AsyncIterator[ClientSession]:
    """A session whose peers' clocks go on as the world's does; a pulse notices the silent."""
    pulse = watched(world, world.servers) if has_pulse else None
    for served in world.servers:
        served.server._wall_clock = now
    async with open_session(
        world.host,
        world.identity,
        world.find,
        repair_route=lambda broken, needed: mended(world, broken, needed),
        pulse=pulse,
        fingerprint=FINGERPRINT,
        max_tokens=64,
        wall_clock=now,
    ) as session:
        yield session


def now() -> float:
    return NOW + trio.current_time()


async def tell(session: ClientSession, ids: list[int], count: int) -> None:
    """Let the session add so many tokens to the ids."""
    start = 0 if len(ids) == len(PROMPT) else len(ids) - 1
    for _ in range(count):
        told = np.asarray(ids[start:], "<i4")
        session.step(start, {"ids": Tensor("int32", (1, len(told)), told.tobytes())}, "last")
        output = await session.next_output()
        start = len(ids)
        ids.append(int(np.frombuffer(output.payload["tokens"].data, "<i4")[0]))


def histories(servers: list[Served]) -> list[bool]:
    return [served.server.history_bytes > 0 for served in servers]


def test_a_session_that_was_idle_for_minutes_goes_on() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:1", "1:3", "3:4")
        async with session_of(world, has_pulse=True) as session:
            ids = list(PROMPT)
            await tell(session, ids, 5)
            await trio.sleep(LONG_SECONDS)
            await tell(session, ids, 5)
            assert ids[len(PROMPT) :] == said_after(PROMPT, 10)
            assert session.journal.failovers == 0
            assert [served.positions for served in servers] == [UNDISTURBED] * 3

    run(body)


@pytest.mark.parametrize("history_bytes", [1 << 20, 0], ids=["kept", "dropped"])
@pytest.mark.parametrize("way", ["killed", "cut off"])
def test_a_session_whose_middle_server_died_while_it_was_idle_goes_on(
    way: str, history_bytes: int
) -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        (spare,) = await world.add("1:3")
        for served in world.servers:
            served.server.room = replace(served.server.room, history_bytes=history_bytes)
        async with session_of(world, has_pulse=way == "cut off") as session:
            ids = list(PROMPT)
            await tell(session, ids, 5)
            await trio.sleep(IDLE_SECONDS)
            if way == "killed":
                world.network.kill(first[1].peer)
            else:
                cut_off(world, first[1].peer)
            await trio.sleep(NOTICED_SECONDS)
            await tell(session, ids, 5)
            assert ids[len(PROMPT) :] == said_after(PROMPT, 10)
            route = [peer for peer, _ in session.route]
            assert route == [first[0].peer, spare.peer, first[2].peer]
            failures = {trouble.failure for trouble in session.journal.troubles}
            assert ("dropped" in failures) == (history_bytes == 0)
            is_replayed = [s.positions > UNDISTURBED for s in (first[0], first[2])]
            assert is_replayed == [history_bytes == 0] * 2, "healthy hops keep what they have"

    run(body)


def test_a_middle_server_that_died_long_before_the_next_step_costs_the_hops_below_too() -> None:
    """They gave their caches back after the grace time: nobody had dialled them."""

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        (spare,) = await world.add("1:3")
        async with session_of(world, has_pulse=False) as session:
            ids = list(PROMPT)
            await tell(session, ids, 5)
            world.network.kill(first[1].peer)
            await trio.sleep(GRACE_SECONDS + 1)
            assert histories([first[0], first[2]]) == [True, False]
            await tell(session, ids, 5)
            assert ids[len(PROMPT) :] == said_after(PROMPT, 10)
            route = [peer for peer, _ in session.route]
            assert route == [first[0].peer, spare.peer, first[2].peer]
            assert first[0].positions == spare.positions == UNDISTURBED
            assert first[2].positions == UNDISTURBED + len(PROMPT) + 4

    run(body)


@pytest.mark.parametrize("way", ["killed", "cut off"])
def test_of_a_client_that_left_while_it_was_idle_nothing_is_held_after_the_grace_time(
    way: str,
) -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:1", "1:3", "3:4")
        with trio.CancelScope() as scope:
            async with session_of(world, has_pulse=way == "cut off") as session:
                await tell(session, list(PROMPT), 5)
                await trio.sleep(IDLE_SECONDS)
                assert histories(servers) == [True, True, True], "idle is not abandoned"
                assert [len(served.executor.caches) for served in servers] == [1, 1, 1]
                if way == "killed":
                    world.network.kill(world.host.peer)
                else:
                    cut_off(world, world.host.peer)
                await trio.sleep(GRACE_SECONDS - 1)
                assert histories(servers) == [True, True, True], "it may come back"
                await trio.sleep(NOTICED_SECONDS + 1)
                assert histories(servers) == [False, False, False]
                assert [len(served.executor.caches) for served in servers] == [0, 0, 0]
                assert [served.server.free_tokens for served in servers] == [4096] * 3
                scope.cancel()
        await trio.sleep(GRACE_SECONDS + NOTICED_SECONDS)
        assert all(served.is_clean for served in servers)

    run(body)
