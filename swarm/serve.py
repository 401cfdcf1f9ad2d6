"""`swarm serve`: from a model's name to a serving peer, and out again.

1. What the user reads goes through `Console`; nothing here prints.
2. The first Ctrl-C (or SIGTERM) drains, the second leaves at once. Before the peer serves, Ctrl-C
   ends it without waiting for what is being fetched or loaded.
"""

import logging
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from blocks.thread import ComputeThread
from swarm.console import Console
from swarm.control_server import Answer, serve_control
from swarm.entering import (
    addresses_of,
    check_proven,
    check_same_swarm,
    describe_asked,
    describe_swarms,
    enter_if_any,
    entry_of,
    port_of,
)
from swarm.errors import BadInput, PeerFault
from swarm.host import open_host
from swarm.identity import first_free_identity, identity_from
from swarm.invite import Invite, decode_invite, encode_invite, swarm_id_of
from swarm.loading import Loader
from swarm.model import Description
from swarm.moving import Keeper, open_keeper
from swarm.node import Node, open_node
from swarm.notebook import MOST_ADDRESSES, Notebook, SwarmNote, read_notebook, write_notebook
from swarm.reading import read_tables
from swarm.settings import ServeSettings, home
from swarm.status import status_of
from swarm.tasks import in_thread
from swarm.text import Tokens
from swarm.transport import Host

if TYPE_CHECKING:
    from swarm.gateway.door import Door

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
MOST_INVITED = 8  # addresses in a join token: it should fit on a screen
NOTES_SECONDS = 30.0


async def serve(settings: ServeSettings, console: Console, api: "Door | None" = None) -> None:
    """Serve until told to stop, HTTP too if `api` says where. A SwarmError the user can mend."""
    identity = (
        identity_from(settings.identity) if settings.identity else first_free_identity(home())
    )
    notes_path = identity.path.with_suffix(".notes.json")
    notes = read_notebook(notes_path)
    invite = decode_invite(settings.join) if settings.join else None
    named = await describe_asked(settings) if settings.model or invite is None else None
    entry = entry_of(settings, invite, notes, named)
    async with AsyncExitStack() as stack:
        # First in, last out: the node waits on its executor until it has ended.
        thread = stack.enter_context(ComputeThread(settings.threads))
        host = await stack.enter_async_context(
            open_host(
                identity,
                entry.secret,
                listen=settings.listen,
                port=port_of(settings, notes),
                announce=settings.announce,
                is_only_announced=settings.is_only_announced,
            )
        )
        await enter_if_any(host, entry, is_needed=invite is not None)
        description = await _described(host, named, invite, settings, console)
        node = await stack.enter_async_context(
            open_node(
                host,
                identity,
                entry.secret,
                description,
                seeds=tuple(entry.invite.peers) if entry.invite else (),
                sequence=notes.sequence,
                name=settings.name,
            )
        )
        await read_tables(host, node.gossip.table)
        loader = Loader(settings, description, thread, console)
        keeper = await stack.enter_async_context(
            open_keeper(
                node,
                loader,
                loader.choose(node.offers(), host.peer),
                freedom=loader.freedom(),
                note=console.note,
            )
        )
        await _run(node, keeper, entry.secret, console, notes_path, api)


async def _described(
    host: Host,
    named: Description | None,
    invite: Invite | None,
    settings: ServeSettings,
    console: Console,
) -> Description:
    """The model to serve, the swarm's if none is named. BadInput unless it may be served there."""
    description = named or await describe_swarms(host, invite)
    check_same_swarm(description, invite)
    for note in description.notes:
        console.note(note)
    await in_thread(partial(_check_tokenizer, description))
    await check_proven(description, settings, console)
    return description


def _check_tokenizer(description: Description) -> None:
    """BadInput for one that no client could read."""
    try:
        Tokens(description.files)
    except PeerFault as fault:  # here the files are the user's own
        raise BadInput(
            f"{description.checkpoint.folder}: {fault.message}",
            next_step="save the model's fast tokenizer there (save_pretrained)",
        ) from fault


async def _run(
    node: Node,
    keeper: Keeper,
    secret: bytes,
    console: Console,
    notes_path: Path,
    api: "Door | None",
) -> None:
    """Serve until told to stop, then drain."""
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, home(), _answers(node, secret, stop))
            nursery.start_soon(_wait_signal, signals, stop)
            nursery.start_soon(_keep_notes, node, secret, notes_path)
            nursery.start_soon(keeper.move_when_needed)
            async with _api_of(node, secret, api, console) as url:
                facts = {"ready": True, "peer": node.host.peer, "span": node.record().span}
                console.ready({**facts, "join": encode_invite(invite_of(node, secret)), "api": url})
                await stop.wait()
                console.note("draining: no new sessions; Ctrl-C again leaves at once")
                nursery.start_soon(_leave_at_second, signals, nursery.cancel_scope)
            await node.drain(DRAIN_SECONDS)
            nursery.cancel_scope.cancel()
    _write_notes(node, secret, notes_path)


@asynccontextmanager
async def _api_of(
    node: Node, secret: bytes, api: "Door | None", console: Console
) -> AsyncIterator[str | None]:
    """The URL of the API, while it is up; None if none is wanted."""
    if api is None:
        yield None
        return
    from swarm.gateway.entry import open_api
    from swarm.prompt import open_joined

    async with (
        open_joined(invite_of(node, secret)) as client,
        open_api(client, api, console) as url,
    ):
        yield url


def _answers(node: Node, secret: bytes, stop: trio.Event) -> Answer:
    """What the daemon says to its owner."""

    async def answer(question: str) -> Mapping[str, Any]:
        match question:
            case "status":
                return status_of(node.records(), node.whereabouts.round_trips, node.host.peer)
            case "invite":
                return {"join": encode_invite(invite_of(node, secret))}
            case "drain":
                stop.set()
                return {"draining": True}
        return {"error": f"this daemon does not know {question!r}"}

    return answer


async def _wait_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for _ in signals:
        stop.set()
        return


async def _leave_at_second(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


def invite_of(node: Node, secret: bytes) -> Invite:
    """An invite to this node's swarm by way of this node and, should it be gone, of some others."""
    others = [record for record in node.records() if record.peer != node.host.peer]
    ways = [addresses_of([record])[:1] for record in others]
    addresses = (*node.host.addresses, *chain.from_iterable(ways))[:MOST_INVITED]
    return Invite(addresses=addresses, secret=secret, swarm_id=swarm_id_of(node.fingerprint))


async def _keep_notes(node: Node, secret: bytes, path: Path) -> None:
    """Write down now and then what a later run of this key needs."""
    while True:
        _write_notes(node, secret, path)
        await trio.sleep(NOTES_SECONDS)


def _write_notes(node: Node, secret: bytes, path: Path) -> None:
    try:
        write_notebook(path, noted(node, secret, read_notebook(path)))
    except OSError as error:
        log.warning("what this peer should remember cannot be written: %s", error)


def noted(node: Node, secret: bytes, old: Notebook) -> Notebook:
    """What to remember now. Who has met nobody goes on remembering whom it met before."""
    swarm_id = swarm_id_of(node.fingerprint)
    met = addresses_of(record for record in node.records() if record.peer != node.host.peer)
    before = old.swarms.get(swarm_id)
    if not met and before is not None and before.secret == secret:
        met = list(before.addresses)
    note = SwarmNote(secret=secret, addresses=tuple(met[:MOST_ADDRESSES]))
    return Notebook(
        port=listening_port(node.host),
        sequence=node.gossip.sequence,
        swarms={**old.swarms, swarm_id: note},
    )


def listening_port(host: Host) -> int:
    """The port of the host's own addresses, which come after those it announces; 0 if none."""
    for address in reversed(host.addresses):
        found = re.search(r"/tcp/([0-9]+)/", address)
        if found:
            return int(found[1])
    return 0
