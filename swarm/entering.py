"""What a server must find out before it holds anything: its swarm, its model, its port.

1. A token names a swarm: nothing is served there but that swarm's model.
2. What peers or an earlier run left us is checked before it is used; at worst it is passed over.
"""

import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import trio

from blocks.proven import kept_verdict, proven, verdict_for
from swarm.client import enter
from swarm.console import Console
from swarm.errors import BadInput, SwarmError
from swarm.hub import commit_in, find_model
from swarm.invite import PUBLIC_SECRET, Invite, new_secret, swarm_id_of
from swarm.model import Description, describe
from swarm.notebook import Notebook
from swarm.peers import PeerTable
from swarm.reading import read_tables
from swarm.record import PeerRecord
from swarm.settings import DEMO_FOLDER, ServeSettings, cache_home
from swarm.tasks import in_thread
from swarm.transport import Host

log = logging.getLogger(__name__)

_ANY_SWARM = "0" * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How a peer enters its swarm: with which secret, and whom it knows there."""

    secret: bytes
    invite: Invite | None  # None: it founds the swarm


def entry_of(
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
    if note is not None and note.secret == secret:
        addresses = tuple(address for address in note.addresses if _is_invitable(address))
        if addresses:
            known = Invite(addresses=addresses, secret=secret, swarm_id=swarm_id)
    return Entry(secret=secret, invite=known)


async def enter_if_any(host: Host, entry: Entry, *, is_needed: bool) -> None:
    """Enter the swarm, if there is one. Raises what `enter` raises only if that `is_needed`."""
    if entry.invite is None:
        return
    try:
        await enter(host, entry.invite)
    except SwarmError as error:
        if is_needed:
            raise
        log.info("nobody met before answers: %s", error.message)


def port_of(settings: ServeSettings, notes: Notebook) -> int:
    """The port to listen on: the one asked for, else the remembered one if it is free, else any."""
    if settings.port is not None:
        return settings.port
    return notes.port if _is_free(settings.listen, notes.port) else 0


async def describe_asked(settings: ServeSettings) -> Description:
    """Describe the model that was named, else the demo model. BadInput if it cannot be had."""
    model = DEMO_FOLDER if settings.model is None else settings.model
    return await _described(model)


async def describe_swarms(host: Host, invite: Invite | None) -> Description:
    """Describe the model of the swarm that we joined without naming one. BadInput if we lack it."""
    if invite is None:
        raise BadInput("no model is named", next_step="name a model's folder")
    table = PeerTable(invite.swarm_id)
    await read_tables(host, table)
    records = table.records(trio.current_time())
    demo = await _described(DEMO_FOLDER)
    if swarm_id_of(demo.fingerprint) == invite.swarm_id:
        return demo
    named = next((record for record in records if record.hub_name), None)
    if named is not None:
        return await _described(named.hub_name, commit_in(named.revision))
    name = records[0].model_name if records else "a model nobody serves yet"
    raise BadInput(
        f"this swarm serves {name}, whose weights have no hub name",
        next_step="name its folder here: swarm serve FOLDER --join TOKEN",
    )


async def check_proven(description: Description, settings: ServeSettings, console: Console) -> None:
    """Refuse a model type that is known, or found now, not to compute the same when cut.

    What is in no list is tried once on this machine, for some seconds. BadInput unless it holds or
    the user insists.
    """
    checkpoint = description.checkpoint
    verdict = proven(str(checkpoint.config.model_type), metadata.version("transformers"))
    if verdict.is_tested and verdict.is_proven:
        return
    if not verdict.is_tested:
        folder = cache_home() / "verdicts"
        kept = kept_verdict(checkpoint, folder)
        if kept is None:
            console.note(f"{verdict.sentence}; trying it")
            kept = await in_thread(partial(verdict_for, checkpoint, folder))
        verdict = kept
    if verdict.is_proven or settings.is_unproven:
        console.note(verdict.sentence)
        return
    raise BadInput(verdict.sentence, next_step="serve it all the same with --unproven")


def check_same_swarm(description: Description, invite: Invite | None) -> None:
    """BadInput if the model is not that of the swarm which the token names."""
    if invite is not None and swarm_id_of(description.fingerprint) != invite.swarm_id:
        raise BadInput(
            f"{description.checkpoint.folder} is not the model of this swarm: "
            "its weights, configuration or tokenizer differ",
            next_step="copy the folder from a peer that serves it, file by file",
        )


def addresses_of(records: Iterable[PeerRecord]) -> list[str]:
    """The addresses by which these peers can be invited to: whatever is no such address is left."""
    return [
        address
        for record in records
        for address in record.addresses
        if address.endswith(f"/p2p/{record.peer}") and _is_invitable(address)
    ]


async def _described(model: Path | str, commit: str = "") -> Description:
    # The hub may be slow, and Ctrl-C must not wait for it.
    return await in_thread(partial(_describe_any, model, commit))


def _describe_any(model: Path | str, commit: str) -> Description:
    """Describe a folder, or a hub name once its small files are here."""
    if isinstance(model, Path):
        return describe(model)
    hub = find_model(model, commit)
    return describe(hub.folder, hub)


def _is_invitable(address: str) -> bool:
    try:
        Invite(addresses=(address,), secret=PUBLIC_SECRET, swarm_id=_ANY_SWARM)
    except ValueError:
        return False
    return True


def _is_free(listen: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        # As the host does: connections that an earlier run closed do not keep the port.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((listen, port))
            trial.listen()
        except OSError:
            return False
    return True
