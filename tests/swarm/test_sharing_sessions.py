"""Sessions that begin alike: what was computed once is not computed, nor sent, again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
import trio
from repair_worlds import CountingHost, mended, watched
from session_worlds import FINGERPRINT, NOW, VOCABULARY, Served, World, run, said_after

from routing.repair import Repair
from swarm.client_session import Broken, ClientSession, open_session
from swarm.generate import GenerateSettings, Generation, generate
from swarm.leg import Leg
from swarm.prefix import PAGE_POSITIONS, digests_of
from swarm.server import GRACE_SECONDS
from swarm.session import Session
from swarm.sharing import KEEP_SECONDS, MOST_KEPT

PAGE = PAGE_POSITIONS
TOKENS = 5


def text(length: int, seed: int = 1) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]


PROMPT = text(3 * PAGE + 10)


@dataclass
class Asked:
    """What came of a prompt, and what each server computed for it."""

    made: Generation
    session: ClientSession
    positions: list[int]


async def ask(
    world: World,
    prompt: Sequence[int],
    *,
    tokens: int = TOKENS,
    is_shared: bool = True,
    hurt_at: int = 0,
    hurt: object = None,
    host: CountingHost | None = None,
) -> Asked:
    """Generate and check the text."""
    before = [served.positions for served in world.servers]

    async def mend(broken: Broken, needed: int) -> Repair:
        return await mended(world, broken, needed)

    async with open_session(
        host or world.host,
        world.identity,
        world.find,
        repair_route=mend,
        fingerprint=FINGERPRINT,
        max_tokens=len(prompt) + tokens,
        prompt=prompt if is_shared else (),
        wall_clock=lambda: NOW,
    ) as session:
        heard = 0

        def on_token(_token: int) -> bool:
            nonlocal heard
            heard += 1
            if heard == hurt_at and callable(hurt):
                hurt(session)
            return False

        settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
        made = await generate(session, prompt, settings, on_token)
    await trio.sleep(1)
    assert made.token_ids == said_after(prompt, tokens)
    after = [served.positions for served in world.servers]
    return Asked(made, session, [late - early for late, early in zip(after, before, strict=True)])


def whole(prompt: Sequence[int], tokens: int = TOKENS) -> int:
    """What a hop computes that begins with nothing."""
    return len(prompt) + tokens - 1


def test_a_second_session_computes_no_page_that_the_first_has_left() -> None:
    async def body(world: World) -> None:
        await world.add("0:1", "1:3", "3:4")
        first = await ask(world, PROMPT)
        assert first.positions == [whole(PROMPT)] * 3
        assert first.made.reused_tokens == 0
        second = await ask(world, PROMPT)
        assert second.positions == [whole(PROMPT) - 3 * PAGE] * 3
        assert second.made.reused_tokens == 3 * PAGE
        other = await ask(world, [*PROMPT[: 2 * PAGE + 1], *text(PAGE, seed=2)])
        assert other.positions == [PAGE + 1 + TOKENS - 1] * 3
        assert all(not served.server._legs._legs for served in world.servers)

    run(body)


def test_the_next_question_of_a_chat_begins_with_the_last_answer() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        said = (await ask(world, PROMPT, tokens=2 * PAGE)).made.token_ids
        following = [*PROMPT, *said, *text(7, seed=3)]
        asked = await ask(world, following)
        pages = (len(PROMPT) + len(said) - 1) // PAGE
        assert asked.made.reused_tokens == pages * PAGE > len(PROMPT)
        assert asked.positions == [whole(following) - pages * PAGE] * 2
        # of the two of a chat the longer is kept, which gives all that the shorter could
        assert [len(served.executor.caches) for served in world.servers] == [1, 1]

    run(body)


def test_a_session_that_goes_on_gives_its_pages_too() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        others: list[Asked] = []
        told = trio.Event()

        def hurt(_session: ClientSession) -> None:
            async def other() -> None:
                others.append(await ask(world, [*PROMPT[: 2 * PAGE], *text(20, seed=4)]))
                told.set()

            world.nursery.start_soon(other)

        await ask(world, PROMPT, tokens=200, hurt_at=3, hurt=hurt)
        await told.wait()
        assert others[0].made.reused_tokens == 2 * PAGE

    run(body)


def test_pages_that_are_held_do_not_travel_again() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        sizes: list[int] = []
        servers = world.servers
        for _ in range(2):
            host = CountingHost(servers[0].host)
            servers[0].server._links._host = host  # type: ignore[assignment]
            await ask(world, PROMPT)
            sizes.append(host.payload_bytes)
        assert sizes == [4 * whole(PROMPT), 4 * (whole(PROMPT) - 3 * PAGE)]

    run(body)


def test_a_prompt_shorter_than_a_page_says_nothing_of_it() -> None:
    async def body(world: World) -> None:
        await world.add("0:4")
        for _ in range(2):
            asked = await ask(world, PROMPT[:PAGE])  # its last position is to be computed
            assert asked.session.pages == 0
            assert asked.positions == [whole(PROMPT[:PAGE])]
        assert not world.servers[0].executor.forks

    run(body)


def test_who_asks_alone_waits_no_longer_for_the_first_token() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        alone = await ask(world, PROMPT, is_shared=False)
        offering = await ask(world, text(len(PROMPT), seed=8))
        assert offering.made.reused_tokens == 0
        assert offering.made.first_token_seconds <= alone.made.first_token_seconds + 1e-9

    run(body, delay_seconds=0.1)


def test_a_hop_that_dies_in_a_session_that_began_with_pages_is_replaced() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:1", "1:3", "3:4", "1:3")
        watched(world, servers)
        await ask(world, PROMPT)

        def kill(session: ClientSession) -> None:
            world.network.kill(servers[1].peer)

        asked = await ask(world, PROMPT, tokens=12, hurt_at=6, hurt=kill)
        assert asked.made.reused_tokens == 3 * PAGE
        # the newcomer is sent all from the first position, the others nothing again
        assert asked.positions[3] > len(PROMPT)
        few = whole(PROMPT, 12) - 3 * PAGE
        assert [asked.positions[place] for place in (0, 2)] == [few, few]

    run(body)


def test_a_first_hop_that_dies_is_replaced_by_one_that_holds_the_pages() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        await ask(world, PROMPT)
        (spare,) = await world.add("0:2")
        world.servers.insert(0, world.servers.pop())  # now it is the first that is found
        await ask(world, PROMPT)
        world.servers.append(world.servers.pop(0))

        def kill(session: ClientSession) -> None:
            world.network.kill(servers[0].peer)

        asked = await ask(world, PROMPT, tokens=12, hurt_at=6, hurt=kill)
        assert [peer for peer, _ in asked.session.route] == [spare.peer, servers[1].peer]
        assert asked.positions[2] < len(PROMPT) - PAGE

    run(body)


def test_who_claims_pages_that_he_does_not_send_gets_what_he_claimed_and_harms_nobody() -> None:
    async def body(world: World) -> None:
        await world.add("0:2", "2:4")
        await ask(world, PROMPT)
        false = [*text(3 * PAGE, seed=5), *PROMPT[3 * PAGE :]]

        class Liar(Session):
            def _check_page(self, *_: object) -> None:
                pass

        async with open_session(
            world.host,
            world.identity,
            world.find,
            fingerprint=FINGERPRINT,
            max_tokens=600,
            prompt=PROMPT,
            wall_clock=lambda: NOW,
        ) as session:
            session._session.__class__ = Liar
            settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
            made = await generate(session, false, settings)
        assert made.token_ids == said_after(PROMPT, TOKENS)
        await trio.sleep(1)
        honest = await ask(world, PROMPT)
        assert honest.made.reused_tokens == 3 * PAGE
        cheated = await ask(world, false)
        assert cheated.made.reused_tokens == 0

    run(body)


def test_a_hop_that_claims_pages_it_does_not_send_on_spoils_its_own_sessions_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(world: World) -> None:
        honest, second, liar = await world.add("0:2", "2:4", "0:2")
        await ask(world, PROMPT)
        (kept,) = honest.server._sharing._kept.values()
        vouched = digests_of([e.payload for e in kept.history.entries[:3]], FINGERPRINT)

        def offered(leg: Leg) -> bytes:
            return vouched if leg.opened.hops[leg.opened.at].peer == liar.peer else b""

        monkeypatch.setattr(Leg, "_offered", offered)
        false = [*text(3 * PAGE, seed=6), *PROMPT[3 * PAGE :]]
        world.servers.remove(honest)
        async with open_session(
            world.host,
            world.identity,
            world.find,
            fingerprint=FINGERPRINT,
            max_tokens=600,
            prompt=false,
            wall_clock=lambda: NOW,
        ) as session:
            settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
            made = await generate(session, false, settings)
        assert second.executor.forks
        assert made.token_ids != said_after(false, TOKENS)  # its own client is told something else
        await trio.sleep(1)
        monkeypatch.undo()
        world.servers.remove(liar)
        world.servers.insert(0, honest)
        for prompt in (PROMPT, false, [*PROMPT, *text(2 * PAGE, seed=7)]):
            await ask(world, prompt)  # which checks the text
        assert second.server.sessions == 0

    run(body)


def test_a_family_that_cannot_share_its_cache_computes_all_again() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        servers[1].executor.can_roll_back = False
        await ask(world, PROMPT)
        again = await ask(world, PROMPT)
        assert again.positions == [whole(PROMPT) - 3 * PAGE, whole(PROMPT)]

    run(body)


def test_a_fork_that_fails_costs_a_repair_and_nobody_is_blamed() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        await ask(world, PROMPT)
        servers[1].executor.caches.clear()  # as if a step of it had failed just now
        asked = await ask(world, PROMPT)
        troubles = asked.session.journal.troubles
        assert [trouble.failure for trouble in troubles] == ["evicted"]
        assert not asked.session._suspects.at(trio.current_time())

    run(body)


def held(served: Served) -> list[object]:
    server = served.server
    legs = server._legs
    return [*served.executor.caches, *server._graces, *server._sharing._kept, *legs._ended]


def test_what_is_kept_is_all_that_is_left_and_not_for_ever() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        for seed in range(3):
            await ask(world, text(2 * PAGE + 1, seed=seed))
        await trio.sleep(2 * GRACE_SECONDS)
        for served in servers:
            kept = list(served.server._sharing._kept)
            assert len(kept) == 3
            assert sorted(map(int, held(served))) == sorted(kept * 3)  # type: ignore[call-overload]
            assert served.server.is_idle
            assert served.server.free_tokens == 4096
        await trio.sleep(KEEP_SECONDS)
        for served in servers:
            assert held(served) == []
            assert len(served.server._sharing._index) == 0
            assert served.server.history_bytes == 0

    run(body)


def test_a_server_that_leaves_keeps_nothing() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        await ask(world, PROMPT)

        def drain(_session: ClientSession) -> None:
            for served in servers:
                served.server.drain()

        await ask(world, text(2 * PAGE), hurt_at=TOKENS - 1, hurt=drain)
        await trio.sleep(2 * GRACE_SECONDS)
        assert [held(served) for served in servers] == [[], []]
        assert [served.server.history_bytes for served in servers] == [0, 0]

    run(body)


def test_kept_sessions_are_bounded_in_number() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4", tokens=1 << 20)
        for seed in range(MOST_KEPT + 5):
            await ask(world, text(PAGE + 1, seed=seed), tokens=1)
        assert len(served.executor.caches) == MOST_KEPT
        newest = await ask(world, text(PAGE + 1, seed=MOST_KEPT + 4), tokens=1)
        assert newest.made.reused_tokens == PAGE
        oldest = await ask(world, text(PAGE + 1, seed=0), tokens=1)
        assert oldest.made.reused_tokens == 0

    run(body)


def test_a_kept_session_gives_way_to_one_that_needs_its_memory() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4", tokens=6 * PAGE)
        await ask(world, PROMPT)
        assert len(served.executor.caches) == 1
        asked = await ask(world, text(5 * PAGE, seed=9))
        assert asked.session.journal.failovers == 0
        assert len(served.server._sharing) == 1  # the newer one

    run(body)


def test_histories_of_kept_sessions_are_the_first_to_go() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:2", "2:4")
        await ask(world, PROMPT)
        first = servers[0].server
        size = first.history_bytes
        assert size == 4 * whole(PROMPT)
        first.room = replace(first.room, history_bytes=size + 40)
        asked = await ask(world, text(PAGE + 1, seed=11), tokens=4)
        assert asked.session.journal.failovers == 0
        assert len(first._sharing) == 1
        assert first.history_bytes <= size + 40

    run(body)
