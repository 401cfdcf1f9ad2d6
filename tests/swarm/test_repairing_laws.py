"""Losses at bad moments: whatever a repair runs into, the text is the undisturbed one."""

from collections.abc import Sequence

import pytest
import trio
from repair_worlds import HURT_AT, PROMPT, TOKENS, after, cut_off, kill, told, watched
from session_worlds import VOCABULARY, Served, World, run, said_after

from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import ClientSession
from swarm.generate import CHUNK_TOKENS

UNDISTURBED = len(PROMPT) + TOKENS - 1
SPANS = ("0:1", "1:3", "3:4")


def served_at(world: World, session: ClientSession, place: int) -> Served:
    return next(each for each in world.servers if each.peer == session.route[place][0])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_hop_lost_while_chunks_of_the_prompt_are_under_way(place: int, done: int) -> None:
    """It has computed `done` of six chunks; the others wait there, or at the hops before."""
    prompt = [token % VOCABULARY for token in range(5 * CHUNK_TOKENS + 9)]

    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        spares = await world.add(*SPANS)
        first[place].executor.most_jobs = done
        made = await told(world, {0: after(1.0, kill(place))}, prompt=prompt, tokens=4)
        assert made.ids == said_after(prompt, 4)
        assert made.peers[place] == spares[place].peer
        everything = len(prompt) + 3
        kept = [served for served in first if served is not first[place]]
        assert [served.positions for served in (*kept, spares[place])] == [everything] * 3

    run(body)


class Guesser:
    """Knows the text; each second guess is wrong from its third id on."""

    def __init__(self) -> None:
        self.is_wrong = False

    def guess(self, ids: Sequence[int]) -> list[int]:
        right = said_after(ids, 4)
        self.is_wrong = not self.is_wrong
        return [*right[:2], (right[2] + 1) % VOCABULARY, right[3]] if self.is_wrong else right


# A step crosses four links of 10 ms: lost before it is sent, on each of its ways, and at its end.
MOMENTS = [0.0, 0.005, 0.015, 0.025, 0.035]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", [9, 12], ids=["verify", "rollback"])
def test_a_hop_lost_during_a_verify_step_and_right_after_a_rollback(
    place: int, moment: float, token: int
) -> None:
    """Guesses bring three tokens and five in turn: the step after the 9th takes nothing back, the
    one after the 12th what the wrong half of a guess left behind.
    """

    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        spares = await world.add(*SPANS)
        right = len(PROMPT) + token - 1  # positions; the last token is not yet a step

        def hurt(world: World, session: ClientSession) -> None:
            (cache,) = first[0].executor.caches.values()
            assert len(cache) - right == (2 if token == 12 else 0)
            after(moment, kill(place))(world, session)

        made = await told(world, {token: hurt}, draft=Guesser())
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers[place] == spares[place].peer
        assert all(served.executor.rollbacks for served in first if served is not first[place])

    run(body)


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("moment", MOMENTS)
def test_without_drafts_no_repair_makes_a_hop_roll_back(
    lost: tuple[int, ...], moment: float
) -> None:
    async def body(world: World) -> None:
        await world.add(*SPANS, *SPANS)
        for served in world.servers:
            served.executor.can_roll_back = False
        made = await told(world, after(moment, kill(*lost)))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert sum(served.executor.rollbacks for served in world.servers) == 0
        assert made.failures.keys() <= {"closed", "unreachable"}

    run(body)


def test_a_family_that_cannot_roll_back_fails_a_draft_and_says_so() -> None:
    """What the test above leans on can fail."""

    async def body(world: World) -> None:
        await world.add("0:4")
        world.servers[0].executor.can_roll_back = False
        with pytest.raises(Exception, match="cannot roll back"):
            await told(world, {}, draft=Guesser())

    run(body)


def kill_when_asked(served: Served, world: World) -> None:
    """Kill this server as it gets its first step, before it has answered any."""

    async def wait() -> None:
        await served.executor.is_asked.wait()
        world.network.kill(served.peer)

    served.executor.is_stuck = True
    world.nursery.start_soon(wait)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_replacement_that_dies_before_it_answered_is_replaced(place: int) -> None:
    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        (frail,) = await world.add(SPANS[place])
        (last,) = await world.add(SPANS[place])
        kill_when_asked(frail, world)
        made = await told(world, kill(place))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert frail.executor.jobs
        assert made.peers[place] == last.peer
        kept = [served for served in first if served is not first[place]]
        assert [served.positions for served in (*kept, last)] == [UNDISTURBED] * 3

    run(body)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_replacement_that_is_full_is_passed_over_and_nobody_blamed(place: int) -> None:
    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        (full,) = await world.add(SPANS[place], tokens=5)
        (last,) = await world.add(SPANS[place])
        made = await told(world, kill(place))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.failures["refused"] == 1
        assert not full.executor.jobs
        assert made.peers[place] == last.peer
        assert made.blamed == {first[place].peer}

    run(body)


def through(*hops: tuple[Served, str]) -> Route:
    return Route(tuple(Hop(served.peer, Span.parse(span)) for served, span in hops), 0.1)


@pytest.mark.parametrize("how", ["twice", "between", "after", "link"])
def test_a_peer_twice_on_a_route_may_be_lost_or_kept(how: str) -> None:
    async def body(world: World) -> None:
        both, middle, last = await world.add("0:4", "1:2", "3:4")
        spares = await world.add("0:1", "1:2", "2:3", "3:4")
        route = through((both, "0:1"), (middle, "1:2"), (both, "2:3"), (last, "3:4"))

        async def find(_avoid: frozenset[str], _needed: int) -> Route:
            return route

        def hurt(world: World, _session: ClientSession) -> None:
            if how == "link":
                world.network.break_link(both.peer, middle.peer)
            else:
                lost = {"twice": both, "between": middle, "after": last}[how]
                world.network.kill(lost.peer)

        made = await told(world, hurt, find=find)
        assert made.ids == said_after(PROMPT, TOKENS)
        expected = {
            "twice": [spares[0], middle, spares[2], last],
            "between": [both, spares[1], both, last],
            "after": [both, middle, both, spares[3]],
            "link": [both, middle, both, last],
        }[how]
        assert made.peers == [served.peer for served in expected]
        if how != "twice":
            assert both.positions == 2 * UNDISTURBED

    run(body)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hop_that_says_nothing_while_its_streams_live_is_noticed_by_the_one_before(
    place: int,
) -> None:
    """The client asks the first hop only: each hop asks the next."""

    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        spares = await world.add(*SPANS)
        before = world.host.peer if place == 0 else first[place - 1].peer

        def hush(world: World, session: ClientSession) -> None:
            world.network.cut(session.route[place][0], before)

        made = await told(world, hush, pulse=watched(world, world.servers))
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.failures == {"silent": 1}
        assert made.peers[place] == spares[place].peer
        assert made.longest_gap < 1.5

    run(body)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("is_linked", [False, True], ids=["cold", "linked"])
@pytest.mark.parametrize("loss", ["kill", "drain", "cut"])
def test_a_replacement_that_is_cut_off_too_costs_a_bounded_wait(
    place: int, is_linked: bool, loss: str
) -> None:
    """Nobody knows it yet: a cold one is given up when it cannot be dialled, a linked one when it
    has answered no ping.
    """

    async def body(world: World) -> None:
        await world.add(*SPANS)
        (bad,) = await world.add(SPANS[place])
        (last,) = await world.add(SPANS[place])
        pulse = watched(world, world.servers)
        if is_linked:
            for host in (world.host, *(served.host for served in world.servers)):
                if host is not bad.host:
                    await host.dial(bad.peer, within=1.0)

        def hurt(world: World, session: ClientSession) -> None:
            cut_off(world, bad.peer)
            if loss == "kill":
                kill(place)(world, session)
            elif loss == "cut":
                cut_off(world, session.route[place][0])
            else:
                served_at(world, session, place).server.drain()

        made = await told(world, hurt, pulse=pulse)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers[place] == last.peer
        noticed = 1.2 if loss == "cut" else 0.1
        given_up = 1.85 if is_linked else 2.55
        dials = 0.3
        assert made.longest_gap < noticed + given_up + dials

    run(body)


def test_a_replacement_met_before_is_given_up_as_soon_as_a_neighbour() -> None:
    """It was on the route, it was left, and then it was cut off: how it answered is known."""

    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        spares = await world.add("1:3", "1:3")
        pulse = watched(world, world.servers)
        old = first[1]

        def leave(_world: World, _session: ClientSession) -> None:
            old.server.drain()

        def hurt(world: World, session: ClientSession) -> None:
            assert session.route[1][0] == spares[0].peer
            assert session._suspects.forgive_one(trio.current_time())
            cut_off(world, old.peer)
            kill(1)(world, session)

        made = await told(world, {6: leave, HURT_AT + 8: hurt}, pulse=pulse)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.failures["silent"] == 1
        assert made.peers[1] == spares[1].peer
        assert made.longest_gap < 1.3

    run(body)


@pytest.mark.parametrize("spares", [1, 2])
def test_a_hop_that_is_cut_off_from_all_behind_it_is_replaced_itself(spares: int) -> None:
    """It accuses one innocent after the other; only the client can still hear it."""

    async def body(world: World) -> None:
        first = await world.add(*SPANS)
        others = await world.add("0:1", *["1:3"] * spares)
        pulse = watched(world, world.servers)

        def part(world: World, session: ClientSession) -> None:
            cut_off(world, session.route[0][0], but_for=[world.host.peer])

        made = await told(world, part, pulse=pulse)
        assert made.ids == said_after(PROMPT, TOKENS)
        assert made.peers[0] == others[0].peer
        assert first[0].peer in made.blamed
        assert first[0].peer in made.session._suspects.at(trio.current_time())
        # noticed once, then one cold dial for each spare
        assert made.longest_gap < 1.2 + spares * 2.55 + 0.4

    run(body)
