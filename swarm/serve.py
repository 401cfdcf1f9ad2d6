"""`swarm serve`: from a model's name to a serving peer, and out again.

1. What the user reads goes through `Console`; nothing here prints.
2. The first Ctrl-C (or SIGTERM) drains, the second leaves at once.
"""

import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import outcome
import trio

from blocks.executor import ComputeThread
from blocks.executor import Executor as BlockExecutor
from blocks.load import Dtype
from blocks.measure import Speed, cache_bytes_per_token, free_memory_bytes, measure
from blocks.stack import Stack
from routing.placement import HEADROOM
from routing.span import Span
from swarm.client import enter, read_tables
from swarm.control_server import serve_control
from swarm.errors import BadInput, SwarmError
from swarm.host import open_host
from swarm.identity import Identity, first_free_identity, identity_from
from swarm.invite import (
    PUBLIC_SECRET,
    Invite,
    decode_invite,
    encode_invite,
    new_secret,
    swarm_id_of,
)
from swarm.model import (
    VALUE_BYTES,
    Description,
    choose_span,
    describe,
    download,
    load,
    weight_bytes,
)
from swarm.node import Holding, Node, open_node
from swarm.notebook import MOST_ADDRESSES, Notebook, SwarmNote, read_notebook, write_notebook
from swarm.peers import PeerTable
from swarm.record import offer_of
from swarm.settings import DEMO_FOLDER, ServeSettings, home
from swarm.status import status_of
from swarm.transport import Host

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DRAIN_SECONDS = 10.0
MEASURE_SECONDS = 1.5
# No server keeps caches for more: beyond this its memory is better left to the machine.
MOST_CACHE_TOKENS = 1 << 20
MOST_INVITED = 8  # addresses in a join token: it should fit on a screen
NOTES_SECONDS = 30.0


class Console(Protocol):
    """How a command talks to its user while it works."""

    def note(self, text: str) -> None:
        """Say something on the side."""

    def progress(self, label: str) -> Callable[[int, int], None]:
        """Begin a progress bar; call the result with (done, total)."""

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Say that the peer serves: `peer`, `span`, `join`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How a peer enters its swarm: with which secret, and whom it knows there."""

    secret: bytes
    invite: Invite | None  # None: it founds the swarm


async def serve(settings: ServeSettings, console: Console) -> None:
    """Serve until told to stop. Raises a SwarmError for whatever the user can mend."""
    identity = (
        identity_from(settings.identity) if settings.identity else first_free_identity(home())
    )
    notes_path = identity.path.with_suffix(".notes.json")
    notes = read_notebook(notes_path)
    invite = decode_invite(settings.join) if settings.join else None
    description = await _described(settings) if settings.model or invite is None else None
    entry = _entry(settings, invite, notes, description)
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(_open_host(identity, entry.secret, settings, notes))
        if entry.invite is not None:
            await _enter(host, entry.invite, is_needed=invite is not None)
        if description is None:
            description = await _swarm_model(host, invite)
        _check_same_swarm(description, invite)
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
        thread = stack.enter_context(ComputeThread(settings.threads))
        holding = await _prepared(node, settings, description, thread, console)
        await _run(node, holding, entry.secret, console, notes_path)


async def _described(settings: ServeSettings) -> Description:
    model = DEMO_FOLDER if settings.model is None else settings.model
    return await trio.to_thread.run_sync(_describe_any, model)


def _describe_any(model: Path | str) -> Description:
    """Describe a folder, or a hub name once its files are here."""
    return describe(model) if isinstance(model, Path) else describe(download(model), model)


def _entry(
    settings: ServeSettings,
    invite: Invite | None,
    notes: Notebook,
    description: Description | None,
) -> Entry:
    """Decide the secret: the token's, the well-known one, the remembered one, or a fresh one."""
    if invite is not None:
        return Entry(secret=invite.secret, invite=invite)
    swarm_id = swarm_id_of(description.fingerprint) if description else ""
    note = notes.swarms.get(swarm_id)
    secret = PUBLIC_SECRET if settings.is_public else note.secret if note else new_secret()
    known = None
    if note is not None and note.addresses and note.secret == secret:
        known = Invite(addresses=note.addresses, secret=secret, swarm_id=swarm_id)
    return Entry(secret=secret, invite=known)


@asynccontextmanager
async def _open_host(
    identity: Identity, secret: bytes, settings: ServeSettings, notes: Notebook
) -> AsyncIterator[Host]:
    """Open the host; a remembered port that another program took meanwhile is let go."""
    port = settings.port
    if port is None:
        port = notes.port if _is_free(settings.listen, notes.port) else 0
    async with open_host(
        identity, secret, listen=settings.listen, port=port, announce=settings.announce
    ) as host:
        yield host


def _is_free(listen: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((listen, port))
        except OSError:
            return False
    return True


async def _enter(host: Host, invite: Invite, *, is_needed: bool) -> None:
    try:
        await enter(host, invite)
    except SwarmError:
        if is_needed:
            raise


async def _swarm_model(host: Host, invite: Invite | None) -> Description:
    """Find the model of the swarm that we joined without naming one."""
    if invite is None:
        raise BadInput("no model is named", next_step="name a model's folder")
    table = PeerTable(invite.swarm_id)
    await read_tables(host, table)
    records = table.records(trio.current_time())
    demo = await trio.to_thread.run_sync(describe, DEMO_FOLDER)
    if not records and demo.fingerprint.startswith(invite.swarm_id):
        return demo
    for record in records:
        if record.fingerprint == demo.fingerprint:
            return demo
        if record.hub_name:
            return await trio.to_thread.run_sync(_describe_any, record.hub_name)
    name = records[0].model_name if records else "a model nobody serves yet"
    raise BadInput(
        f"this swarm serves {name}, whose weights have no hub name",
        next_step="name its folder here: swarm serve FOLDER --join TOKEN",
    )


def _check_same_swarm(description: Description, invite: Invite | None) -> None:
    if invite is not None and not description.fingerprint.startswith(invite.swarm_id):
        raise BadInput(
            f"{description.checkpoint.folder} is not the model of this swarm: "
            "its weights, configuration or tokenizer differ",
            next_step="copy the folder from a peer that serves it, file by file",
        )


async def _prepared(
    node: Node,
    settings: ServeSettings,
    description: Description,
    thread: ComputeThread,
    console: Console,
) -> Holding:
    """Choose the blocks, load and measure them."""
    await read_tables(node.host, node.gossip.table)
    free = settings.memory_bytes or free_memory_bytes(settings.device)
    dtype = cast(Dtype, settings.dtype)
    offers = [offer_of(record) for record in node.records()]
    seed = int.from_bytes(node.host.peer.encode()[-4:], "big")
    span = choose_span(settings.blocks, description, offers, free, dtype, seed)
    progress = console.progress(f"loading blocks {span} of {description.card.name}")
    stack = await trio.to_thread.run_sync(load, description, span, dtype, settings.device, progress)
    console.note("measuring its speed")
    speed, token_bytes = await run_in(
        thread, lambda: (measure(stack, MEASURE_SECONDS), cache_bytes_per_token(stack))
    )
    left = free_memory_bytes(settings.device)
    if settings.memory_bytes is not None:
        left = min(left, settings.memory_bytes - weight_bytes(description, span, dtype))
    return holding_of(stack, speed, thread, cache_tokens(description, token_bytes, left))


def holding_of(stack: Stack, speed: Speed, thread: ComputeThread, tokens_of_cache: int) -> Holding:
    """What a node holds once a stack is loaded and measured."""
    return Holding(
        span=Span(stack.start, stack.stop),
        executor=BlockExecutor(stack, thread),
        cache_tokens=tokens_of_cache,
        decode_seconds_per_block=speed.decode_seconds_per_block,
        prefill_seconds_per_block_token=speed.prefill_seconds_per_block_token,
        head_seconds=speed.head_seconds,
        dtype=str(stack.dtype).removeprefix("torch."),
        device=str(stack.device),
    )


def cache_tokens(description: Description, bytes_per_token: int, free_bytes: int) -> int:
    """How many tokens of cache and history fit into what is free, at least one conversation."""
    taken = 2 * bytes_per_token + VALUE_BYTES * description.card.hidden_size  # buffers double
    fitting = int(free_bytes * (1 - HEADROOM)) // taken
    return max(min(fitting, MOST_CACHE_TOKENS), description.card.context_length)


async def run_in(thread: ComputeThread, work: Callable[[], Result]) -> Result:
    """Run `work` in the compute thread and return what it returns."""
    token = trio.lowlevel.current_trio_token()
    is_done = trio.Event()
    outcomes: list[outcome.Outcome[Result]] = []

    def run() -> None:
        outcomes.append(outcome.capture(work))
        token.run_sync_soon(is_done.set)

    thread.submit(run)
    await is_done.wait()
    return outcomes[0].unwrap()


async def _run(
    node: Node, holding: Holding, secret: bytes, console: Console, notes_path: Path
) -> None:
    """Serve until told to stop, then drain."""
    await node.hold(holding)

    def invite() -> str:
        return encode_invite(invite_of(node, secret))

    async def answer(question: str) -> Mapping[str, Any]:
        match question:
            case "status":
                return status_of(node.records(), node.round_trips, node.host.peer)
            case "invite":
                return {"join": invite()}
            case "drain":
                stop.set()
                return {"draining": True}
        return {"error": f"this daemon does not know {question!r}"}

    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, home(), answer)
            nursery.start_soon(_wait_signal, signals, stop)
            nursery.start_soon(_keep_notes, node, secret, notes_path)
            facts = {"ready": True, "peer": node.host.peer, "span": str(holding.span)}
            console.ready({**facts, "join": invite(), "api": None})
            await stop.wait()
            console.note("draining: no new sessions; Ctrl-C again leaves at once")
            nursery.start_soon(_leave_at_second, signals, nursery.cancel_scope)
            await node.drain(DRAIN_SECONDS)
            nursery.cancel_scope.cancel()


async def _wait_signal(signals: AsyncIterator[int], stop: trio.Event) -> None:
    async for _ in signals:
        stop.set()
        return


async def _leave_at_second(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


def invite_of(node: Node, secret: bytes) -> Invite:
    """An invite to this node's swarm by way of this node and, should it be gone, of some others."""
    addresses = list(node.host.addresses)
    for record in node.records():
        if record.peer != node.host.peer and len(addresses) < MOST_INVITED:
            addresses += record.addresses[:1]
    swarm_id = swarm_id_of(node.fingerprint)
    return Invite(addresses=tuple(addresses[:MOST_INVITED]), secret=secret, swarm_id=swarm_id)


async def _keep_notes(node: Node, secret: bytes, path: Path) -> None:
    """Write down now and then what a later run of this key needs."""
    while True:
        met = [
            address
            for record in node.records()
            if record.peer != node.host.peer
            for address in record.addresses
        ]
        old = read_notebook(path)
        note = SwarmNote(secret=secret, addresses=tuple(met[:MOST_ADDRESSES]))
        notes = Notebook(
            port=_port_of(node.host),
            sequence=node.gossip.sequence,
            swarms={**old.swarms, swarm_id_of(node.fingerprint): note},
        )
        try:
            write_notebook(path, notes)
        except OSError as error:
            log.warning("what this peer should remember cannot be written: %s", error)
        await trio.sleep(NOTES_SECONDS)


def _port_of(host: Host) -> int:
    for address in host.addresses:
        found = re.search(r"/tcp/([0-9]+)/", address)
        if found:
            return int(found[1])
    return 0
