"""A swarm of one's own: three peers on loopback in this process, for a first try without setup.

1. Nobody else can enter: the secret is random, and the hosts listen on loopback only.
2. The three share one compute thread, as one machine has one processor.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path

from blocks.executor import Executor
from blocks.thread import ComputeThread
from routing.span import Span, even_spans
from swarm.client import Client, open_client
from swarm.files import FileCache
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.invite import Invite, new_secret, swarm_id_of
from swarm.loading import cache_tokens, holding_of, load_off_thread, measured, run_in
from swarm.model import Description, describe
from swarm.node import open_node
from swarm.settings import DEMO_FOLDER, cache_home
from swarm.tasks import in_thread

PEERS = 3
MEASURE_SECONDS = 0.05
LOOPBACK = "127.0.0.1"
CACHE_BYTES = 1 << 30


@asynccontextmanager
async def open_private_swarm(folder: Path = DEMO_FOLDER) -> AsyncIterator[Client]:
    """Serve the model in this folder by three peers, and give a client of theirs."""
    description = await in_thread(partial(describe, folder))
    secret = new_secret()
    async with AsyncExitStack() as stack:
        thread = stack.enter_context(ComputeThread(None))
        addresses: tuple[str, ...] = ()
        for number, span in enumerate(even_spans(description.card.blocks, PEERS)):
            addresses = await _add_peer(
                stack, description, span, secret, thread, addresses, f"private-{number + 1}"
            )
        identity = new_identity()
        host = await stack.enter_async_context(open_host(identity, secret, listen=None))
        invite = Invite(
            addresses=addresses, secret=secret, swarm_id=swarm_id_of(description.fingerprint)
        )
        cache = FileCache(cache_home() / "files")
        yield await stack.enter_async_context(open_client(host, identity, invite, cache))


async def _add_peer(
    stack: AsyncExitStack,
    description: Description,
    span: Span,
    secret: bytes,
    thread: ComputeThread,
    known: tuple[str, ...],
    name: str,
) -> tuple[str, ...]:
    """Start one more peer; return the addresses of all so far."""
    loaded = await load_off_thread(description, span, "float32", "cpu")
    speeds = await run_in(thread, lambda: measured(loaded, MEASURE_SECONDS))
    executor = stack.enter_context(closing(Executor(loaded, thread)))
    identity = new_identity()
    host = await stack.enter_async_context(open_host(identity, secret, listen=LOOPBACK))
    for address in known:
        peer = address.rpartition("/")[2]
        host.learn(peer, (address,))
        await host.dial(peer, within=5.0)
    node = await stack.enter_async_context(
        open_node(host, identity, secret, description, name=name)
    )
    room = cache_tokens(description, 1, CACHE_BYTES, description.card.context_length)
    await node.hold(holding_of(loaded, speeds, executor, room))
    return (*known, host.addresses[0])
