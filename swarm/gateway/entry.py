"""`swarm api`, and the API of `swarm serve`: which swarm is asked, and what the user is told.

1. The first Ctrl-C (or SIGTERM) lets answers end, for a while; the second leaves at once.
"""

import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from swarm.client import Client
from swarm.console import Console
from swarm.gateway.door import Door
from swarm.gateway.serving import open_gateway
from swarm.gateway.sessions import Swarm
from swarm.invite import decode_invite
from swarm.prompt import daemon_token, open_joined


async def run_api(door: Door, join: str | None, console: Console) -> None:
    """Answer for the swarm of the token, of the own daemon, or a private one, until told to stop.

    Raises what `open_client` raises.
    """
    async with _asking(join, console) as client, open_api(client, door, console) as url:
        console.answering(url)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                break
        console.note("ending: no new requests; Ctrl-C again leaves at once")


@asynccontextmanager
async def open_api(swarm: Swarm, door: Door, console: Console) -> AsyncIterator[str]:
    """Answer HTTP until the block ends; give the URL."""
    if door.settings.is_open:
        console.note(
            f"Whoever reaches {door.settings.host} may use the API: --api-key asks for a key."
        )
    async with open_gateway(swarm, door) as url:
        console.note(f"answering OpenAI's API at {url}/v1")
        yield url


def _asking(join: str | None, console: Console) -> AbstractAsyncContextManager[Client]:
    token = join or daemon_token()
    if token is not None:
        return open_joined(decode_invite(token))
    from swarm.private import open_private_swarm

    console.note(
        "No swarm of yours runs, so this is a private one: three peers on loopback with the demo "
        "model.\nStart a real one with `swarm serve MODEL`, or join one with --join TOKEN."
    )
    return open_private_swarm()
