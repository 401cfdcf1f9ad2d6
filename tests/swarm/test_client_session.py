"""The client's driver: repairs, suspicion, deadlines, and what is left behind."""

from random import Random

import pytest
import trio
from session_worlds import World, run, said_after

from routing.route import Route
from swarm.client_session import ANSWER_SECONDS, MOST_REPAIRS
from swarm.errors import NoRoute, Refusal, Unreachable
from swarm.generate import GenerateSettings, generate
from swarm.server import GRACE_SECONDS
from swarm.suspects import SUSPICION_SECONDS

PROMPT = [3, 1, 4, 1, 5]
SETTINGS = GenerateSettings(most_tokens=12, end_ids=frozenset())


def test_a_session_over_two_servers_says_what_the_model_says() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        async with world.session() as session:
            made = await generate(session, PROMPT, SETTINGS)
        assert made.token_ids == said_after(PROMPT, 12)
        assert session.journal.failovers == 0

    run(body)


def test_no_route_in_time_is_a_no_route_that_names_the_blocks() -> None:
    async def body(world: World) -> None:
        await world.add("0:2")
        with pytest.raises(NoRoute, match="block 2"):
            async with world.session(route_seconds=3.0):
                pass
        assert 3.0 <= trio.current_time() < 4.0

    run(body)


def test_what_the_block_raises_leaves_a_session_as_it_is() -> None:
    async def body(world: World) -> None:
        await world.add("0:4")
        with pytest.raises(KeyError):
            async with world.session():
                raise KeyError("mine")

    run(body)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.01, 0.1])
def test_a_session_whose_user_is_cancelled_is_closed_on_its_hops(seconds: float) -> None:
    """Or they would hold it for a grace time, in case it comes back."""

    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        with trio.move_on_after(seconds):
            async with world.session() as session:
                await generate(session, PROMPT, SETTINGS)
                await trio.sleep_forever()
        await trio.sleep(0.5)
        assert [served.server.sessions for served in servers] == [0, 0]
        assert all(served.server.is_idle for served in servers)

    run(body)


def test_a_killed_server_is_replaced_and_the_text_goes_on() -> None:
    async def body(world: World) -> None:
        victim, *_ = await world.add("2:4", "0:2", "2:4")

        def on_token(_token: int) -> bool:
            if not victim.host.is_killed:
                world.network.kill(victim.peer)
            return False

        async with world.session() as session:
            made = await generate(session, PROMPT, SETTINGS, on_token)
        assert made.token_ids == said_after(PROMPT, 12)
        assert session.journal.failovers == 1

    run(body)


def test_a_route_that_lives_and_does_not_answer_is_waited_for_so_long_and_no_longer() -> None:
    """A long prompt takes its time, and whoever answers pings accuses nobody."""

    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        world.servers[1].executor.is_stuck = True
        async with world.session() as session:
            began = trio.current_time()
            with pytest.raises(Unreachable, match="no answer"):
                await generate(session, PROMPT, SETTINGS)
            assert trio.current_time() - began == ANSWER_SECONDS
        assert not session.journal.troubles

    run(body)


def test_the_only_server_of_a_block_is_waited_for_while_it_restarts() -> None:
    """Sixteen tries within a moment would all fail."""

    async def body(world: World) -> None:
        (only,) = await world.add("0:4")

        async def restart() -> None:
            world.network.kill(only.peer)
            await trio.sleep(5.0)
            world.servers.clear()
            await world.add("0:4")

        killed = False

        def on_token(_token: int) -> bool:
            nonlocal killed
            if not killed:
                killed = True
                world.nursery.start_soon(restart)
            return False

        async with world.session() as session:
            made = await generate(session, PROMPT, SETTINGS, on_token)
        assert made.token_ids == said_after(PROMPT, 12)

    run(body)


def test_routes_that_fail_again_and_again_end_with_an_error() -> None:
    async def body(world: World) -> None:
        (only,) = await world.add("0:4")
        only.executor.error = "out of order"
        async with world.session(route_seconds=1000.0) as session:
            with pytest.raises(Unreachable, match=f"{MOST_REPAIRS} times.*out of order"):
                await generate(session, PROMPT, SETTINGS)

    run(body)


def test_servers_that_go_on_refusing_are_a_refusal_once_the_patience_is_over() -> None:
    async def body(world: World) -> None:
        await world.add("0:4", tokens=10)
        async with world.session(route_seconds=8.0) as session:
            with pytest.raises(Refusal, match="room for 10 tokens") as refused:
                await generate(session, PROMPT, SETTINGS)
        assert refused.value.exit_code == 5
        assert len(world.asked) < 60  # it does not hammer
        assert trio.current_time() >= 8.0

    run(body)


def test_suspects_are_forgiven_the_oldest_first_and_all_after_a_while() -> None:
    async def body(world: World) -> None:
        one, other = await world.add("0:4", "0:4")
        async with world.session() as session:
            await generate(session, PROMPT, SETTINGS)
            for served in (one, other):  # both fail, one after the other
                served.executor.error = "out of order"
            with pytest.raises(Unreachable):
                await generate(session, PROMPT, SETTINGS)
            avoided = [avoid for _, avoid in world.asked]
            assert avoided[1:4] == [{one.peer}, {one.peer, other.peer}, {other.peer}]
            one.executor.error = other.executor.error = None
            await trio.sleep(SUSPICION_SECONDS)
            world.network.break_link(world.host.peer, session.route[0][0])
            session._repairs = 0
            await generate(session, PROMPT, SETTINGS)
            assert len(world.asked[-1][1]) == 1  # only the one that failed just now

    run(body)


@pytest.mark.parametrize("ways", [50])
def test_sessions_that_end_in_every_way_leave_nothing(ways: int) -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4", "0:2", "2:4")
        chance = Random(7)

        async def one() -> None:
            with trio.move_on_after(chance.uniform(0.0, 0.6)):
                async with world.session(max_tokens=40) as session:
                    ending = chance.randrange(3)
                    seen = 0

                    def on_token(_token: int) -> bool:
                        nonlocal seen
                        seen += 1
                        if ending == 1 and seen == 3:
                            world.network.break_link(world.host.peer, session.route[0][0])
                        return ending == 2 and seen == 4

                    await generate(session, PROMPT, SETTINGS, on_token)

        for _ in range(ways):
            await one()
        await trio.sleep(3 * GRACE_SECONDS)
        assert all(served.is_clean for served in servers)
        assert all(served.server.free_tokens == 4096 for served in servers)

    run(body)


def test_a_first_hop_that_complains_without_end_is_not_remembered_without_end() -> None:
    async def body(world: World) -> None:
        await world.add("0:4")
        async with world.session() as session:
            from swarm.client_session import MOST_TROUBLES
            from swarm.session import Trouble

            session._carry_out([Trouble("failed", "x", "0:4", "no")] * (3 * MOST_TROUBLES))
            assert len(session._troubles) == MOST_TROUBLES

    run(body)


def test_a_step_beyond_the_room_of_the_session_is_an_error_of_the_caller() -> None:
    async def body(world: World) -> None:
        await world.add("0:4")
        async with world.session(max_tokens=4) as session:
            with pytest.raises(ValueError, match="4 positions"):
                await generate(session, PROMPT, SETTINGS)

    run(body)


def test_a_route_that_comes_late_is_taken() -> None:
    async def body(world: World) -> None:
        async def find(avoid: frozenset[str], needed: int) -> Route:
            if trio.current_time() > 2.0 and not world.servers:
                await world.add("0:4")
            return await world.find(avoid, needed)

        async with world.session(find) as session:
            made = await generate(session, PROMPT, SETTINGS)
        assert made.token_ids == said_after(PROMPT, 12)

    run(body)
