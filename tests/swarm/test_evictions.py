"""Sessions on servers with little memory, in virtual time: caches give way, and texts go on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import trio
from repair_worlds import mended
from session_worlds import FINGERPRINT, NOW, Served, World, run, said_after

from routing.route import Route
from swarm.budget import IDLE_SECONDS, MOST_RETRY_SECONDS, PAGE_TOKENS, PATIENCE_SECONDS
from swarm.client_session import ClientSession, open_session
from swarm.errors import Refusal
from swarm.generate import GenerateSettings, generate
from swarm.messages import Open
from swarm.suspects import Suspects
from swarm.wire import Tensor

PROMPT = [3, 14, 15, 92]
LONG = [n % 97 for n in range(200)]
TOKENS = 60
SETTINGS = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())


@asynccontextmanager
async def session_of(
    world: World,
    *,
    max_tokens: int = 300,
    suspects: Suspects | None = None,
    route_seconds: float = 30.0,
) -> AsyncIterator[ClientSession]:
    async def find(avoid: frozenset[str], needed: int) -> Route:
        return await world.find(avoid, needed)

    async with open_session(
        world.host,
        world.identity,
        find,
        repair_route=lambda broken, needed: mended(world, broken, needed),
        suspects=suspects,
        fingerprint=FINGERPRINT,
        max_tokens=max_tokens,
        wall_clock=lambda: NOW,
        route_seconds=route_seconds,
    ) as session:
        yield session


async def tell(session: ClientSession, ids: list[int], count: int, start: int = 0) -> None:
    """Let the session add so many tokens to the ids; `start`: how many of them it has been told."""
    for _ in range(count):
        told = np.asarray(ids[start:], "<i4")
        session.step(start, {"ids": Tensor("int32", (1, len(told)), told.tobytes())}, "last")
        output = await session.next_output()
        start = len(ids)
        ids.append(int(np.frombuffer(output.payload["tokens"].data, "<i4")[0]))


def opens_at(served: Served) -> list[float]:
    """When this server was asked to admit a session, from now on."""
    times: list[float] = []
    admit = served.server._legs._admission

    def noting(opened: Open) -> object:
        times.append(trio.current_time())
        return admit(opened)

    served.server._legs._admission = noting  # type: ignore[assignment]
    return times


def failures(session: ClientSession) -> list[str]:
    return [trouble.failure for trouble in session.journal.troubles]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_idle_session_gives_way_and_goes_on_by_a_replay_at_that_hop_only(place: int) -> None:
    async def body(world: World) -> None:
        rooms = [4096, 4096, 4096]
        rooms[place] = 5 * PAGE_TOKENS
        servers = [
            (await world.add(span, tokens=tokens))[0]
            for span, tokens in zip(("0:1", "1:3", "3:4"), rooms, strict=True)
        ]
        suspects = Suspects()
        ids = list(PROMPT)
        async with session_of(world, suspects=suspects) as one:
            await tell(one, ids, 5)
            await trio.sleep(IDLE_SECONDS)
            async with session_of(world) as other:
                await generate(other, LONG, SETTINGS)
                assert [len(served.executor.caches) for served in servers] == [
                    1 if at == place else 2 for at in range(3)
                ]
            assert not failures(one), "nothing is said to who does not ask"
            before = [served.positions for served in servers]
            await tell(one, ids, 5, start=len(ids) - 1)
            assert ids[len(PROMPT) :] == said_after(PROMPT, 10)
            assert failures(one) == ["evicted"]
            more = [served.positions - b for served, b in zip(servers, before, strict=True)]
            replayed = len(PROMPT) + 4
            assert more == [5 + replayed if at == place else 5 for at in range(3)]
            assert [peer for peer, _ in one.route] == [served.peer for served in servers]
            assert suspects.at(trio.current_time()) == ()
        await trio.sleep(0.5)
        assert [served.server.sessions for served in servers] == [0, 0, 0]
        assert [served.server.free_tokens for served in servers] == rooms

    run(body)


def test_a_session_that_computes_or_waits_for_it_is_never_evicted() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4", tokens=5 * PAGE_TOKENS)
        served.executor.is_stuck = True
        async with session_of(world) as one:
            one.step(0, {"ids": Tensor("int32", (1, 4), bytes(16))}, "last")
            await trio.sleep(10 * IDLE_SECONDS)
            with pytest.raises(Refusal):
                async with session_of(world, route_seconds=3.0) as other:
                    await generate(other, LONG, SETTINGS)
            assert len(served.executor.caches) == 1
            assert not failures(one)

    run(body)


def test_an_evicted_session_goes_elsewhere_if_its_server_has_no_room_and_blames_nobody() -> None:
    async def body(world: World) -> None:
        (small,) = await world.add("0:2", tokens=5 * PAGE_TOKENS)
        _, spare = await world.add("2:4", "0:2")
        suspects = Suspects()
        ids = list(PROMPT)
        async with session_of(world, suspects=suspects) as one:
            await tell(one, ids, 5)
            await trio.sleep(IDLE_SECONDS)
            world.servers.remove(spare)
            async with session_of(world, max_tokens=5 * PAGE_TOKENS) as other:
                begun = list(LONG)
                await tell(other, begun, 30)
                world.servers.append(spare)
                await tell(one, ids, 5, start=len(ids) - 1)
                assert ids[len(PROMPT) :] == said_after(PROMPT, 10)
                assert one.route[0][0] == spare.peer
                assert suspects.at(trio.current_time()) == ()
                assert failures(one) == ["evicted", "refused"]
        await trio.sleep(0.5)
        assert small.server.sessions == 0

    run(body)


def test_a_full_server_is_passed_over_and_not_asked_before_the_time_it_named() -> None:
    async def body(world: World) -> None:
        full, other = await world.add("0:4", "0:4", tokens=5 * PAGE_TOKENS)
        suspects = Suspects()
        full.executor.is_stuck = True
        async with session_of(world, max_tokens=320) as holder:
            holder.step(0, {"ids": Tensor("int32", (1, 256), bytes(1024))}, "last")
            await trio.sleep(0.5)
            asked = opens_at(full)
            for _ in range(3):
                async with session_of(world, suspects=suspects) as session:
                    made = await generate(session, PROMPT, SETTINGS)
                    assert made.token_ids == said_after(PROMPT, TOKENS)
                    assert session.route[0][0] == other.peer
            assert len(asked) == 1, "one refusal is enough for all sessions of a client"
            assert suspects.at(trio.current_time()) == ()
            (until,) = suspects.full_at(trio.current_time()).values()
            await trio.sleep(until - trio.current_time())
            assert suspects.full_at(trio.current_time()) == {}
            async with session_of(world, suspects=suspects) as session:
                await generate(session, PROMPT, SETTINGS)
            assert len(asked) == 2
            assert asked[1] >= until

    run(body)


def test_with_no_other_server_a_session_waits_until_there_is_room() -> None:
    async def body(world: World) -> None:
        (first, only) = await world.add("0:2", "2:4", tokens=5 * PAGE_TOKENS)
        only.executor.is_stuck = True
        async with session_of(world, max_tokens=320) as holder:
            holder.step(0, {"ids": Tensor("int32", (1, 256), bytes(1024))}, "last")
            await trio.sleep(0.5)
            asked, made = opens_at(only), []

            async def speak() -> None:
                async with session_of(world) as session:
                    made.append((await generate(session, PROMPT, SETTINGS)).token_ids)
                    assert set(failures(session)) == {"refused"}

            async with trio.open_nursery() as nursery:
                nursery.start_soon(speak)
                await trio.sleep(MOST_RETRY_SECONDS / 2)
                assert len(asked) <= 2, "it does not hammer"
                assert not made
                only.executor.is_stuck = False
                holder.close()
            assert made == [said_after(PROMPT, TOKENS)]
            assert first.positions == 256 + len(PROMPT) + TOKENS - 1, "others kept what they had"

    run(body)


def test_who_waited_in_vain_is_told_when_to_come_back() -> None:
    async def body(world: World) -> None:
        (only,) = await world.add("0:4", tokens=5 * PAGE_TOKENS)
        only.executor.is_stuck = True
        async with session_of(world, max_tokens=320) as holder:
            holder.step(0, {"ids": Tensor("int32", (1, 256), bytes(1024))}, "last")
            await trio.sleep(0.5)
            began = trio.current_time()
            with pytest.raises(Refusal, match="room for 0 tokens") as refused:
                async with session_of(world, route_seconds=3.0) as session:
                    await generate(session, PROMPT, SETTINGS)
            seconds = refused.value.retry_seconds
            assert 10 < seconds <= MOST_RETRY_SECONDS, "64 tokens are to come, and it is slow"
            assert f"in {ceil(seconds)} seconds" in refused.value.sentence()
            assert trio.current_time() - began <= 4.0

    run(body)


def test_four_sessions_that_need_twice_the_memory_all_finish_with_few_replays() -> None:
    count, tokens = 4, 300

    async def body(world: World) -> None:
        need = len(LONG) + tokens
        (first, tight) = (await world.add("0:2"))[0], (await world.add("2:4", tokens=2 * need))[0]
        texts: list[list[int]] = []
        evictions: list[int] = []

        async def speak() -> None:
            settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
            async with session_of(world, max_tokens=need, route_seconds=60.0) as session:
                texts.append((await generate(session, LONG, settings)).token_ids)
                evictions.append(failures(session).count("evicted"))
                assert set(failures(session)) <= {"evicted", "refused", "forgotten"}

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(speak)
                await trio.sleep(0.01)
        assert texts == [said_after(LONG, tokens)] * count
        assert 0 < sum(evictions) <= count
        assert tight.positions <= 2 * count * need
        assert first.positions == count * (need - 1), "only the hop without memory computes again"
        await trio.sleep(1.0)
        assert tight.server.sessions == 0
        assert tight.server.free_tokens == 2 * need

    run(body)


def test_a_step_that_finds_no_room_waits_for_who_is_about_to_end() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4", tokens=7 * PAGE_TOKENS)
        async with session_of(world) as one:
            ids, more, has_said = list(LONG), list(LONG), trio.Event()
            troubles = None
            await tell(one, ids, 1)

            async def late() -> None:
                nonlocal troubles
                async with session_of(world) as other:
                    await tell(other, more, 3)
                    troubles = failures(other)
                has_said.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(late)
                await trio.sleep(PATIENCE_SECONDS / 2)
                assert not has_said.is_set()
                one.close()
            assert more[len(LONG) :] == said_after(LONG, 3)
            assert troubles == [], "it only waited"
        assert served.positions == 2 * len(LONG) + 2

    run(body)


def test_what_is_announced_as_free_follows_the_caches_and_not_the_promises() -> None:
    async def body(world: World) -> None:
        tokens = 10 * PAGE_TOKENS
        (served,) = await world.add("0:4", tokens=tokens)
        async with session_of(world, max_tokens=tokens) as one:
            ids = list(LONG)
            await tell(one, ids, 1)
            assert served.server.free_tokens == tokens, "five pages are left, for four times that"
            await tell(one, ids, 400, start=len(ids) - 1)
            assert served.server.free_tokens == 0, "it is nearly full, and busy"
            await trio.sleep(IDLE_SECONDS)
            assert served.server.free_tokens == tokens, "who is idle gives way"

    run(body)


def test_a_hop_that_dies_while_a_session_waits_for_room_is_replaced_meanwhile() -> None:
    async def body(world: World) -> None:
        first, only, spare = await world.add("0:2", "2:4", "0:2", tokens=5 * PAGE_TOKENS)
        only.executor.is_stuck = True
        async with session_of(world, max_tokens=320) as holder:
            holder.step(0, {"ids": Tensor("int32", (1, 256), bytes(1024))}, "last")
            await trio.sleep(IDLE_SECONDS + 0.5)
            made: list[list[int]] = []
            asked = opens_at(only)

            async def speak() -> None:
                async with session_of(world, route_seconds=90.0) as session:
                    made.append((await generate(session, PROMPT, SETTINGS)).token_ids)
                    assert session.route[0][0] == spare.peer

            async with trio.open_nursery() as nursery:
                nursery.start_soon(speak)
                await trio.sleep(1.0)
                world.network.kill(first.peer)
                await trio.sleep(2.0)
                only.executor.is_stuck = False  # the holder's leg is left for a grace time
            assert made == [said_after(PROMPT, TOKENS)]
            gaps = [after - before for before, after in pairwise(asked)]
            assert gaps
            assert min(gaps) > 25.0, "not before the time it named, half a minute each time"

    run(body)
