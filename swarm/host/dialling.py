"""Dialling a peer at several addresses.

1. Addresses are tried in the order given, each with a head start over the next; the first that
   leads to the peer, its secret proved, wins and the others are given up.
2. A peer is unreachable only when every address has failed; a refusal tells more and is kept.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio

from swarm.errors import Refusal, Unreachable
from swarm.host.settings import CONNECT_STAGGER_SECONDS
from swarm.host.sockets import Address


async def first_of(
    addresses: Sequence[Address], attempt: Callable[[Address], Awaitable[None]]
) -> None:
    """Try the addresses until one attempt succeeds; the others are cancelled.

    Raises Refusal if one refused and none succeeded, else Unreachable with every reason.
    """
    failures: list[Refusal | Unreachable] = []
    has_won = False

    async with trio.open_nursery() as nursery:

        async def run(address: Address, failed: trio.Event) -> None:
            nonlocal has_won
            try:
                await attempt(address)
            except (Refusal, Unreachable) as failure:
                failures.append(failure)
                failed.set()
            else:
                has_won = True
                nursery.cancel_scope.cancel()

        for address in addresses:
            failed = trio.Event()
            nursery.start_soon(run, address, failed)
            with trio.move_on_after(CONNECT_STAGGER_SECONDS):
                await failed.wait()
    if has_won:
        return
    for failure in failures:
        if isinstance(failure, Refusal):
            raise failure
    raise Unreachable("; ".join(failure.message for failure in failures))
