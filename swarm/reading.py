"""Records read from linked peers into a table: whole, or what a client needs to see.

1. Who answers nothing, or nonsense, adds nothing and raises nothing.
2. Once one peer that knows anybody has answered, the others have LAGGARD_SECONDS.
3. Whom the table names can be dialled afterwards.
"""

import logging
from collections.abc import Awaitable, Callable, Collection

import trio

from swarm.errors import PeerFault, SwarmError
from swarm.peers import PeerTable
from swarm.tables import MOST_KNOWN, Given, fetch_table, fetch_view
from swarm.transport import Host

log = logging.getLogger(__name__)

VIEW_SECONDS = 5.0
LAGGARD_SECONDS = 0.3


async def read_tables(host: Host, table: PeerTable) -> None:
    """Read the whole table of every linked peer, at the same time.

    Once one has told of anybody, the others have LAGGARD_SECONDS: who is silent must not hold up
    a repair, and a newcomer's empty table is no answer.
    """
    await _read_all(host, table, lambda peer: fetch_table(host, peer, VIEW_SECONDS))


async def read_views(host: Host, table: PeerTable, avoid: Collection[str] = ()) -> None:
    """Read what a client lacks from every linked peer: as `read_tables`, but see `fetch_view`."""
    known = table.known(MOST_KNOWN)
    await _read_all(
        host,
        table,
        lambda peer: fetch_view(host, peer, VIEW_SECONDS, known=known, avoid=avoid),
    )


async def _read_all(host: Host, table: PeerTable, fetch: Callable[[str], Awaitable[Given]]) -> None:
    async def take(peer: str, scope: trio.CancelScope) -> None:
        try:
            given = await fetch(peer)
        except SwarmError as error:
            log.debug("%s gave no table: %s", peer, error.message)
            return
        await _take(given, peer, table)
        if not given.is_empty:
            scope.deadline = min(scope.deadline, trio.current_time() + LAGGARD_SECONDS)

    async with trio.open_nursery() as nursery:
        for peer in sorted(host.links()):
            nursery.start_soon(take, peer, nursery.cancel_scope)
    for record in table.records(trio.current_time()):
        host.learn(record.peer, record.addresses)  # a table's holder knows whom it may dial


async def _take(given: Given, peer: str, table: PeerTable) -> None:
    for signed, age in given.records:
        try:
            table.add(signed, trio.current_time(), age)
        except PeerFault as fault:
            log.debug("%s gave a damaged record: %s", peer, fault.message)
        await trio.lowlevel.checkpoint()  # a signature takes 0.1 ms, a table may hold thousands
