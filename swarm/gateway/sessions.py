"""Sessions that are closed on their hops even if whoever uses them is cancelled.

A session whose tasks are cancelled can say nothing any more: its hops would keep what they hold of
it for their grace time, in case it comes back. A client of the gateway that hangs up will not.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, Protocol, TypeVar

import trio

from swarm.client_session import ClientSession
from swarm.fetching import Model
from swarm.record import PeerRecord

Made = TypeVar("Made")


class Swarm(Protocol):
    """What the gateway needs of a `Client`."""

    @property
    def model(self) -> Model:
        """What is known of the model."""

    def session(
        self, max_tokens: int, *, prompt: Sequence[int] = ..., route_seconds: float = ...
    ) -> AbstractAsyncContextManager[ClientSession]:
        """Open a session with room for so many tokens, to begin with these."""

    def records(self) -> tuple[PeerRecord, ...]:
        """The servers known now."""

    def record_of(self, peer: str) -> PeerRecord | None:
        """What a server says of itself."""


async def in_session(
    opening: AbstractAsyncContextManager[ClientSession],
    work: Callable[[ClientSession], Awaitable[Made]],
) -> Made:
    """Open the session, do the work in it, close it; return or raise what the work does.

    Cancelled, the work ends at once, and the session is closed within its own short deadline.
    """
    task = _Task(opening, work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task.run)
        try:
            await task.is_done.wait()
        except trio.Cancelled:
            task.cancel()
            raise
    if task.error is not None:
        raise task.error
    return task.made[0]


class _Task(Generic[Made]):
    """The life of one session, out of reach of its user's cancellation."""

    def __init__(
        self,
        opening: AbstractAsyncContextManager[ClientSession],
        work: Callable[[ClientSession], Awaitable[Made]],
    ) -> None:
        self._opening = opening
        self._work = work
        self._before, self._within = trio.CancelScope(), trio.CancelScope()
        self._is_open = False
        self.is_done = trio.Event()
        self.made: list[Made] = []
        self.error: Exception | None = None

    def cancel(self) -> None:
        """End the work or, if there is no session yet, the search for its route."""
        (self._within if self._is_open else self._before).cancel()

    async def run(self) -> None:
        try:
            with trio.CancelScope(shield=True), self._before:
                async with self._opening as session:
                    self._is_open = True
                    with self._within:
                        self.made.append(await self._work(session))
        except Exception as error:  # noqa: BLE001  (raised again where it is waited for)
            self.error = error
        finally:
            self.is_done.set()
