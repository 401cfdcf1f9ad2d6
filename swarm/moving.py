"""A server keeps blocks, and goes where the swarm needs it more.

1. It moves by the way of every departure: it announces that it leaves, waits until others have
   heard, looks again, hands its sessions over, and only then lets go of its blocks.
2. Servers leave one after the other: each sees the others leaving when it looks again, and only
   the first by name goes on, if the blocks it leaves are held by others who stay.
3. A target that cannot be loaded costs a rest, not the server: it takes its old blocks again.
4. Whatever loaded a holding, this closes it, after the server that uses it has ended.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import trio

from routing.coverage import coverage
from routing.moves import GAIN, better_span, goes_first, should_consider
from routing.offer import Offer
from routing.span import Span
from swarm.errors import SwarmError
from swarm.node import Holding, Node
from swarm.pace import Speeds
from swarm.record import offer_of

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two thoughts whether it is time to look
SETTLE_SECONDS = 4.0  # by then the record that says «leaving» is everywhere
HAND_OVER_SECONDS = 10.0
GOODBYE_SECONDS = 1.0
# Before it is measured: what a CPU gives for a block of a few hundred MB.
GUESSED_SECONDS_PER_BLOCK = 0.01


class Loads(Protocol):
    """Brings the blocks of a span here, and then into memory."""

    async def fetch(self, span: Span) -> None:
        """Bring here what is missing of their weights, while others may be served."""

    async def load(self, span: Span) -> Holding:
        """Load and measure them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freedom:
    """Where a server may go. `candidates`: the spans it can hold; None for all of its length."""

    candidates: tuple[Span, ...] | None = None
    gain: float = GAIN


class Keeper:
    """Keeps a node's blocks. Made by `open_keeper`."""

    def __init__(
        self, node: Node, loader: Loads, freedom: Freedom | None, note: Callable[[str], None]
    ) -> None:
        self._node = node
        self._loader = loader
        self._freedom = freedom
        self._note = note
        self._holding: Holding | None = None
        self._seconds_to_load = 0.0
        self._moved_at = self._checked_at = trio.current_time()
        self._joining_since: dict[str, float] = {}

    async def take(self, span: Span) -> None:
        """Load these blocks and serve them. A SwarmError of the loading leaves the node joining."""
        started = trio.current_time()
        await self._node.join(span, guessed_speeds(self._node.offers()))
        self._holding = await self._loader.load(span)
        await self._node.hold(self._holding)
        self._moved_at = trio.current_time()
        self._seconds_to_load = self._moved_at - started

    async def let_go(self) -> None:
        """End the server if it has not ended, and free what it held."""
        await self._node.end()
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    async def move_when_needed(self) -> None:
        """Look now and then whether other blocks need this server more, and go there.

        Returns at once for a server whose blocks its owner chose. Otherwise until cancelled.
        Raises the SwarmError of a loading where not even the old blocks can be loaded again.
        """
        if self._freedom is None:
            return
        while True:
            await trio.sleep(LOOK_SECONDS)
            if self._better() is not None:
                await self._move()

    async def _move(self) -> None:
        """Leave by announcing it first; stay if the others' answers make it wrong."""
        await self._node.step_back(True)
        await trio.sleep(SETTLE_SECONDS)
        if self._node.is_leaving:
            return
        own = offer_of(self._node.record())
        settled = self._target(trio.current_time())
        if settled is None or not goes_first(own, self._node.offers()):
            await self._node.step_back(False)
            return
        before = self._held()
        try:
            await self._loader.fetch(settled)
        except SwarmError as error:
            self._note(f"blocks {settled} cannot be had: {error.message}")
            await self._rest()
            return
        self._note(f"moving from blocks {before} to {settled}, which need a server more")
        await self._node.release(HAND_OVER_SECONDS)
        await self.let_go()
        try:
            await self.take(settled)
        except SwarmError as error:
            self._note(f"blocks {settled} cannot be held here: {error.message}")
            await self.take(before)
        self._note(f"serving blocks {self._held()}")

    async def _rest(self) -> None:
        """Stay, and look again only after a rest, as if it had just come."""
        self._moved_at = trio.current_time()
        await self._node.step_back(False)

    def _held(self) -> Span:
        if self._holding is None:
            raise RuntimeError("nothing is held")
        return self._holding.span

    def _better(self) -> Span | None:
        """Where to go, if it is time to look."""
        now = trio.current_time()
        self._note_joining(now)
        is_time = should_consider(
            now,
            peer=self._node.host.peer,
            checked_at=self._checked_at,
            moved_at=self._moved_at,
            seconds_to_load=self._seconds_to_load,
            has_gap=0.0 in coverage(self._node.offers(), self._node.blocks, with_joining=True),
        )
        if not is_time or self._holding is None or self._node.is_leaving:
            return None
        self._checked_at = now
        return self._target(now)

    def _target(self, now: float) -> Span | None:
        freedom = self._freedom or Freedom()
        return better_span(
            offer_of(self._node.record()),
            self._node.offers(),
            self._node.blocks,
            seed=int.from_bytes(self._node.host.peer.encode()[-4:], "big"),
            candidates=freedom.candidates,
            gain=freedom.gain,
            seconds_to_load=self._seconds_to_load + SETTLE_SECONDS,
            joining_seconds=self._joining_for(now),
        )

    def _note_joining(self, now: float) -> None:
        joining = [offer.peer for offer in self._node.offers() if offer.is_joining]
        self._joining_since = {peer: self._joining_since.get(peer, now) for peer in joining}

    def _joining_for(self, now: float) -> Mapping[str, float]:
        return {peer: now - since for peer, since in self._joining_since.items()}


def guessed_speeds(offers: Sequence[Offer]) -> Speeds:
    """Return what a newcomer says of itself before it is measured: what others are like."""
    others = [offer for offer in offers if offer.is_online]
    if not others:
        decode = prefill = GUESSED_SECONDS_PER_BLOCK
    else:
        decode = median(offer.decode_seconds_per_block for offer in others)
        prefill = median(offer.prefill_seconds_per_block_token for offer in others)
    return Speeds(
        decode_seconds_per_block=decode, prefill_seconds_per_block_token=prefill, head_seconds=0.0
    )


@asynccontextmanager
async def open_keeper(
    node: Node,
    loader: Loads,
    span: Span,
    *,
    freedom: Freedom | None = None,
    note: Callable[[str], None] = log.info,
) -> AsyncIterator[Keeper]:
    """Load these blocks and serve them until the block of code ends; then free them.

    `freedom`: None for a server that stays where it is. `note` is told of each move in a sentence.
    """
    keeper = Keeper(node, loader, freedom, note)
    try:
        await keeper.take(span)
        yield keeper
    finally:
        with trio.CancelScope(shield=True):
            await keeper.let_go()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_SECONDS):
            await node.drain(0.0)  # if it has not: nobody should count on it any more
