"""A lost hop costs its own blocks: what stays keeps what it has, and the text goes on."""

import pytest
import trio
from repair_worlds import (
    HURT_AT,
    PROMPT,
    TOKENS,
    CountingHost,
    after,
    cut_off,
    kill,
    nothing,
    told,
    watched,
)
from session_worlds import World, run, said_after

from swarm.client_session import ClientSession
from swarm.errors import NoRoute
from swarm.server import GRACE_SECONDS

UNDISTURBED = len(PROMPT) + TOKENS - 1
LONG = 500  # tokens, of a prompt and what follows it, computed before the loss
BYTES_PER_ID = 4


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_five_hundred_tokens_are_replayed_by_the_replacements_only_and_past_the_client(
    lost: tuple[int, ...],
) -> None:
    """The client sends them again only if nobody before the lost hop is left to send them."""
    prompt = [*range(90)] * 3
    tokens = LONG - len(prompt) + 20
    everything = len(prompt) + tokens - 1

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        host = CountingHost(world.host)
        hurts = {LONG - len(prompt): kill(*lost)}
        made = await told(world, hurts, prompt=prompt, tokens=tokens, host=host)
        assert made.ids == said_after(prompt, tokens)
        for place, (served, spare) in enumerate(zip(first, spares, strict=True)):
            at_loss = LONG - 1  # the last token is said, and not yet a step
            assert served.positions == (at_loss if place in lost else everything)
            assert spare.positions == (everything if place in lost else 0)
        replayed = LONG if 0 in lost else 0  # the step under way is written to who is dead too
        assert host.payload_bytes == BYTES_PER_ID * (everything + replayed)

    run(body)


def test_what_the_client_sends_beside_the_steps_does_not_grow_with_the_text() -> None:
    async def sent(world: World, length: int, *, is_hurt: bool) -> int:
        host = CountingHost(world.host)
        prompt = [7] * length
        await told(world, kill(1) if is_hurt else nothing, prompt=prompt, host=host)
        return host.bytes

    extra: list[int] = []

    async def body(world: World) -> None:
        await world.add("0:1", "1:3", "3:4", "1:3", "1:3", "1:3")
        for length in (10, 400):
            plain = await sent(world, length, is_hurt=False)
            extra.append(await sent(world, length, is_hurt=True) - plain)
            world.servers = [served for served in world.servers if not served.host.is_killed]

    run(body)
    short, long = extra
    assert 0 < short < 2000
    assert abs(long - short) < 50  # longer numbers; the ids alone are 1600 bytes


def test_two_neighbours_lost_at_once_are_replaced_at_once() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:3", "3:4")
        made = await told(world, kill(1, 2))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert first[0].positions == UNDISTURBED

    run(body)


def test_one_hop_may_be_replaced_by_two() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:2", "2:3")
        made = await told(world, kill(1))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert [span for _, span in made.session.route] == ["0:1", "1:2", "2:3", "3:4"]
        assert first[0].positions == first[2].positions == UNDISTURBED

    run(body)


def test_a_broken_link_between_healthy_hops_replaces_nobody_and_replays_nothing() -> None:
    def snap(world: World, session: ClientSession) -> None:
        world.network.break_link(session.route[0][0], session.route[1][0])

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("1:3")
        made = await told(world, snap)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers == [served.peer for served in first]
        assert [served.positions for served in first] == [UNDISTURBED] * 3

    run(body)


@pytest.mark.parametrize("place", [0, -1])
def test_a_broken_link_to_the_client_replaces_nobody_and_replays_nothing(place: int) -> None:
    def snap(world: World, session: ClientSession) -> None:
        world.network.break_link(world.host.peer, session.route[place][0])

    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        await world.add("0:1", "3:4")
        host = CountingHost(world.host)
        made = await told(world, snap, host=host)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers == [served.peer for served in first]
        assert [served.positions for served in first] == [UNDISTURBED] * 3
        assert host.payload_bytes <= BYTES_PER_ID * (UNDISTURBED + 1)  # the step under way

    run(body)


@pytest.mark.parametrize("hops", [["0:4"], ["0:2", "2:4"]], ids=len)
@pytest.mark.parametrize("seconds", [0.0, 0.015, 0.025])
def test_a_downlink_that_ends_alone_is_attached_again_and_replays_nothing(
    hops: list[str], seconds: float
) -> None:
    """Also while an output is under way on it."""

    async def body(world: World) -> None:
        first = await world.add(*hops)
        host = CountingHost(world.host)

        def snap(_world: World, _session: ClientSession) -> None:
            assert host.downlink is not None
            host.downlink.end("the downlink broke", at_once=True)

        made = await told(world, after(seconds, snap), host=host)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.failures == {"closed": 1}
        assert not made.blamed
        assert [served.positions for served in first] == [UNDISTURBED] * len(hops)

    run(body)


def test_a_draining_hop_hands_over_and_has_no_streams_left() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spare = (await world.add("1:3"))[0]
        made = await told(world, lambda _world, _session: first[1].server.drain())
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers[1] == spare.peer
        with trio.fail_after(1):
            await first[1].server.wait_idle()

    run(body)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hop_whose_cables_are_cut_is_noticed_within_seconds_and_replaced(place: int) -> None:
    def cut(world: World, session: ClientSession) -> None:
        cut_off(world, session.route[place][0])

    async def body(world: World) -> None:
        await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        pulse = watched(world, world.servers)
        made = await told(world, cut, pulse=pulse)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers[place] == spares[place].peer
        # virtual seconds: a cut is noticed within 1.15, dialling round trips take 0.02
        assert made.times[HURT_AT] - made.times[HURT_AT - 1] < 1.5

    run(body)


def test_after_the_grace_time_nothing_is_left_on_any_living_server() -> None:
    async def body(world: World) -> None:
        first = await world.add("0:1", "1:3", "3:4")
        spares = await world.add("0:1", "1:3", "3:4")
        for place in (0, 1, 2):
            await told(world, kill(place) if place == 1 else nothing)
        await trio.sleep(2 * GRACE_SECONDS + 5)
        killed = first[1]
        assert all(served.is_clean for served in [*first, *spares] if served is not killed)

    run(body)


def test_without_a_server_for_the_lost_blocks_the_error_names_them() -> None:
    async def body(world: World) -> None:
        await world.add("0:1", "1:3", "3:4")

        def lose(world: World, session: ClientSession) -> None:
            kill(1)(world, session)
            del world.servers[1]

        with pytest.raises(NoRoute):
            await told(world, lose)

    run(body)
