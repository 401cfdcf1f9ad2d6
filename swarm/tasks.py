"""Tasks that belong to a block of code and end with it, and work that a cancelled one leaves."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

Result = TypeVar("Result")


@asynccontextmanager
async def open_tasks() -> AsyncIterator[trio.Nursery]:
    """Run tasks until the block ends, then cancel them.

    What the block raises leaves as it is, not in a group: its caller can catch it by name. A task
    that raises ends the block, and its error leaves in a group.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001  (raised again below)
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def in_thread(work: Callable[[], Result]) -> Result:
    """Run what blocks in a thread of its own. Cancelled, it is left to itself: nobody waits."""
    result: Result = await trio.to_thread.run_sync(
        work,
        abandon_on_cancel=True,  # type: ignore[call-arg]  # libp2p brings the stubs of an older trio
    )
    return result
