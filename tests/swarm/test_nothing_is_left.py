"""Two hundred sessions that ended in every way leave nothing behind."""

import gc
from pathlib import Path
from random import Random

import trio
from repair_worlds import mended, watched
from session_worlds import FINGERPRINT, NOW, Served, World, run, said_after

from swarm.client_session import ClientSession, open_session
from swarm.errors import SwarmError
from swarm.generate import GenerateSettings, generate
from swarm.pulse import Pulse
from swarm.server import GRACE_SECONDS

SESSIONS = 200
TOKENS = 12
PROMPT = [5, 6, 7]
ENDS = ("done", "stopped", "cancelled", "client lost", "link broken", "step too long")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def held(served: Served) -> list[object]:
    """Everything a server could still hold of a session."""
    server = served.server
    legs = server._legs
    return [
        *served.executor.caches,
        *legs._legs,
        *legs._by_link,
        *legs._by_number,
        *legs._highest,
        *legs._ended,
        *legs._parked,
        *server._graces,
        *server._sharing._kept,
        *server._sharing._legs,
        *server._sharing._index._held,
        *server._links._links,
    ]


async def one_session(world: World, pulse: Pulse, end: str, rng: Random) -> None:
    """Hold a session that ends in this way at a random token."""
    moment = rng.randrange(1, TOKENS)
    heard = 0
    with trio.CancelScope() as scope:
        async with open_session(
            world.host,
            world.identity,
            world.find,
            repair_route=lambda broken, needed: mended(world, broken, needed),
            pulse=pulse,
            fingerprint=FINGERPRINT,
            max_tokens=len(PROMPT) + TOKENS - (5 if end == "step too long" else 0),
            wall_clock=lambda: NOW,
        ) as session:

            def on_token(_token: int) -> bool:
                nonlocal heard
                heard += 1
                if heard == moment:
                    hurt(world, session, end, scope, rng)
                return end == "stopped" and heard == moment

            settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
            try:
                made = await generate(session, PROMPT, settings, on_token)
            except (SwarmError, ValueError):
                assert end in ("client lost", "step too long")
            else:
                assert made.token_ids == said_after(PROMPT, len(made.token_ids))


def hurt(
    world: World, session: ClientSession, end: str, scope: trio.CancelScope, rng: Random
) -> None:
    hops = [peer for peer, _ in session.route]
    match end:
        case "cancelled":
            scope.cancel()
        case "client lost":  # all its links at once, and it never comes back
            for peer in hops:
                world.network.break_link(world.host.peer, peer)
            scope.cancel()
        case "link broken":
            place = rng.randrange(len(hops) - 1)
            world.network.break_link(hops[place], hops[place + 1])


def test_after_two_hundred_sessions_no_task_file_stream_cache_or_leg_is_left() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:1", "1:3", "3:4", "1:3")
        pulse = watched(world, servers)
        rng = Random(4)
        await one_session(world, pulse, "done", rng)  # whatever is made once is made now
        await trio.sleep(2 * GRACE_SECONDS + 60)
        gc.collect()
        before = tasks(), open_files()
        for number in range(SESSIONS):
            await one_session(world, pulse, ENDS[number % len(ENDS)], rng)
        await trio.sleep(2 * GRACE_SECONDS + 60)
        gc.collect()
        assert [held(served) for served in servers] == [[], [], [], []]
        assert all(served.is_clean for served in servers)
        assert all(served.server.free_tokens == 4096 for served in servers)
        assert (tasks(), open_files()) == before
        assert not pulse.watched

    run(body)
