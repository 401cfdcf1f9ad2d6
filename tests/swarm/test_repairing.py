"""A lost hop costs its own blocks: what stays keeps what it has, and the text goes on."""

from collections.abc import Callable, Sequence

import pytest
import trio
from session_worlds import (
    BLOCKS,
    FINGERPRINT,
    NOW,
    Served,
    World,
    run,
    said_after,
)

from routing.cost import CostModel, MeasuredLinks, Work
from routing.offer import Offer
from routing.repair import Repair, repair
from routing.route import NoRoute as Gap
from swarm.client import no_route
from swarm.client_session import Broken, ClientSession, open_session
from swarm.generate import GenerateSettings, generate
from swarm.pulse import Pulse
from swarm.server import GRACE_SECONDS

PROMPT = [3, 14, 15, 92]
TOKENS = 30
HURT_AT = 12
COST = CostModel(
    MeasuredLinks({}, 0.02), Work(blocks=BLOCKS, tokens=1, bytes_per_token=4, is_prefill=False)
)

Hurt = Callable[[World, ClientSession], None]


def positions(served: Served) -> int:
    """How many positions a server computed in all."""
    return sum(next(iter(job.payload.values())).shape[1] for job in served.executor.jobs)


async def mended(world: World, broken: Broken, needed_tokens: int) -> Repair:
    offers = [
        Offer(
            peer=served.peer,
            span=served.span,
            decode_seconds_per_block=0.001,
            prefill_seconds_per_block_token=0.001,
            free_tokens=4096,
        )
        for served in world.servers
    ]
    try:
        return repair(
            broken.hops,
            broken.troubles,
            offers,
            BLOCKS,
            COST,
            retried=broken.retried,
            suspects=broken.suspects,
            needed_tokens=needed_tokens,
        )
    except Gap as gap:
        raise no_route(gap) from gap


async def told(
    world: World, hurt: Hurt, *, pulse: Pulse | None = None
) -> tuple[list[int], ClientSession, list[float]]:
    """Generate, and hurt something after some tokens; when each token came."""
    times: list[float] = []
    async with open_session(
        world.host,
        world.identity,
        world.find,
        repair_route=lambda broken, needed: mended(world, broken, needed),
        pulse=pulse,
        fingerprint=FINGERPRINT,
        max_tokens=200,
        wall_clock=lambda: NOW,
    ) as session:

        def on_token(_token: int) -> bool:
            times.append(trio.current_time())
            if len(times) == HURT_AT:
                hurt(world, session)
            return False

        settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
        made = await generate(session, PROMPT, settings, on_token)
        return made.token_ids, session, times


def kill(place: int) -> Hurt:
    return lambda world, session: world.network.kill(session.route[place][0])


UNDISTURBED = len(PROMPT) + TOKENS - 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_killed_hop_is_replaced_and_only_its_replacement_replays(place: int) -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        ids, session, _ = await told(world, kill(place))
        assert ids == said_after(PROMPT, TOKENS)
        assert session.route[place][0] == spares[place].peer
        for number, served in enumerate(first):
            if number != place:
                assert positions(served) == UNDISTURBED
        assert positions(spares[place]) == UNDISTURBED
        assert sum(positions(spare) for spare in spares) == UNDISTURBED

    run(body)


def test_two_neighbours_lost_at_once_are_replaced_at_once() -> None:
    def both(world: World, session: ClientSession) -> None:
        kill(1)(world, session)
        kill(2)(world, session)

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:3", "3:4")
        ids, _, _ = await told(world, both)
        assert ids == said_after(PROMPT, TOKENS)
        assert positions(first[0]) == UNDISTURBED

    run(body)


def test_one_hop_may_be_replaced_by_two() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:2", "2:3")
        ids, session, _ = await told(world, kill(1))
        assert ids == said_after(PROMPT, TOKENS)
        assert [span for _, span in session.route] == ["0:1", "1:2", "2:3", "3:4"]
        assert positions(first[0]) == positions(first[2]) == UNDISTURBED

    run(body)


def test_a_broken_link_between_healthy_hops_replaces_nobody_and_replays_nothing() -> None:
    def snap(world: World, session: ClientSession) -> None:
        world.network.break_link(session.route[0][0], session.route[1][0])

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:3")
        ids, session, _ = await told(world, snap)
        assert ids == said_after(PROMPT, TOKENS)
        assert [peer for peer, _ in session.route] == [served.peer for served in first]
        assert [positions(served) for served in first] == [UNDISTURBED] * 3

    run(body)


@pytest.mark.parametrize("place", [0, -1])
def test_a_broken_link_to_the_client_replaces_nobody_and_replays_nothing(place: int) -> None:
    def snap(world: World, session: ClientSession) -> None:
        world.network.break_link(world.host.peer, session.route[place][0])

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("0:1", "3:4")
        ids, session, _ = await told(world, snap)
        assert ids == said_after(PROMPT, TOKENS)
        assert [peer for peer, _ in session.route] == [served.peer for served in first]
        assert [positions(served) for served in first] == [UNDISTURBED] * 3

    run(body)


def test_a_draining_hop_hands_over_and_has_no_streams_left() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spare = (await world.add("1:3"))[0]
        ids, session, _ = await told(world, lambda _world, _session: first[1].server.drain())
        assert ids == said_after(PROMPT, TOKENS)
        assert session.route[1][0] == spare.peer
        with trio.fail_after(1):
            await first[1].server.wait_idle()

    run(body)


def watched(world: World, servers: Sequence[Served]) -> Pulse:
    """Give everybody a pulse; return the client's."""
    pulse = Pulse(world.host)
    world.nursery.start_soon(pulse.run)
    for served in servers:
        theirs = Pulse(served.host)
        world.nursery.start_soon(theirs.run)
        served.server._links._pulse = theirs
    return pulse


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hop_whose_cables_are_cut_is_noticed_within_seconds_and_replaced(place: int) -> None:
    def cut(world: World, session: ClientSession) -> None:
        victim = session.route[place][0]
        for other in [world.host.peer, *(served.peer for served in world.servers)]:
            if other != victim:
                world.network.cut(victim, other)

    async def body(world: World) -> None:
        await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        pulse = watched(world, world.servers)
        ids, session, times = await told(world, cut, pulse=pulse)
        assert ids == said_after(PROMPT, TOKENS)
        assert session.route[place][0] == spares[place].peer
        # virtual seconds: a cut is noticed within 1.15, dialling round trips take 0.02
        assert times[HURT_AT] - times[HURT_AT - 1] < 1.5

    run(body)


def test_after_the_grace_time_nothing_is_left_on_any_living_server() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        for place in (0, 1, 2):
            hurt = kill(place) if place == 1 else (lambda _world, _session: None)
            await told(world, hurt)
        await trio.sleep(2 * GRACE_SECONDS + 5)
        killed = first[1]
        assert all(served.is_clean for served in [*first, *spares] if served is not killed)

    run(body)


def test_without_a_server_for_the_lost_blocks_the_error_names_them() -> None:
    async def body(world: World) -> None:
        from swarm.errors import NoRoute

        await world.add("0:1", "1:3", "3:4")

        def lose(world: World, session: ClientSession) -> None:
            kill(1)(world, session)
            del world.servers[1]

        with pytest.raises(NoRoute):
            await told(world, lose)

    run(body)
