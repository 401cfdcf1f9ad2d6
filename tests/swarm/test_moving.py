"""Servers go where they are needed: on a network in memory, in virtual time."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from routing.coverage import coverage
from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import open_session
from swarm.errors import BadInput, NoRoute
from swarm.files import SmallFiles
from swarm.identity import Identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.messages import Wish
from swarm.model import Description
from swarm.model_card import ModelCard
from swarm.moving import Freedom, guessed_speeds, open_keeper
from swarm.node import Holding, Node, open_node
from swarm.pace import Speeds
from swarm.wire import Tensor
from tests.swarm.session_worlds import ArithmeticExecutor, said_after

SECRET = b"0123456789abcdef"
FINGERPRINT = "ab" * 32
LOAD_SECONDS = 20.0
IDENTITIES = [Identity(bytes([seed]) * 32) for seed in range(1, 12)]
CARD = ModelCard(
    format=1,
    name="arithmetic",
    model_type="none",
    blocks=4,
    hidden_size=1,
    vocabulary_size=97,
    context_length=4096,
    end_of_sequence_ids=(),
)
DESCRIPTION = Description(
    checkpoint=cast(Any, None),
    card=CARD,
    files=SmallFiles({"model.json": CARD.written()}),
    checkpoint_digest="c",
    fingerprint=FINGERPRINT,
)
SPEEDS = Speeds(
    decode_seconds_per_block=0.01, prefill_seconds_per_block_token=0.001, head_seconds=0.0
)


@dataclass
class Kept:
    """A server that may move."""

    node: Node
    host: MemoryHost
    refused: set[Span] = field(default_factory=set)
    loaded: list[Span] = field(default_factory=list)
    closed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_serving(self) -> bool:
        return self.loaded != [] and self.node.record().state in ("online", "draining")


@dataclass
class Loader:
    """Loads, and fetches in no time what is not lost."""

    load: Callable[[Span], Awaitable[Holding]]
    lost: tuple[str, ...]

    async def fetch(self, span: Span) -> None:
        if str(span) in self.lost:
            raise BadInput(f"the hub does not give blocks {span}")


class World:
    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.all: list[Kept] = []

    async def add(
        self,
        span: str,
        *,
        is_free: bool = True,
        refused: tuple[str, ...] = (),
        lost: tuple[str, ...] = (),
        digests: bytes = b"",
    ) -> Kept:
        identity = IDENTITIES[len(self.all)]
        host = self.network.attach(identity, SECRET)
        is_up = trio.Event()
        found: list[Kept] = []

        async def load(wanted: Span) -> Holding:
            await trio.sleep(LOAD_SECONDS)
            if wanted in kept.refused:
                raise BadInput(f"blocks {wanted} do not fit")
            kept.loaded.append(wanted)

            def close() -> None:
                kept.closed += 1

            return Holding(
                span=wanted,
                executor=ArithmeticExecutor(),
                cache_tokens=4096,
                speeds=SPEEDS,
                dtype="float32",
                device="cpu",
                digests=digests,
                close=close,
            )

        async def live() -> None:
            nonlocal kept
            seeds = tuple(other.host.peer for other in self.all)
            async with open_node(host, identity, SECRET, DESCRIPTION, seeds=seeds) as node:
                kept = Kept(node, host, {Span.parse(text) for text in refused})
                found.append(kept)
                freedom = Freedom() if is_free else None
                note = kept.notes.append
                async with open_keeper(
                    node, Loader(load, lost), Span.parse(span), freedom=freedom, note=note
                ) as keeper:
                    is_up.set()
                    await keeper.move_when_needed()
                    await trio.sleep_forever()

        kept = cast(Kept, None)
        for other in self.all:
            host.learn(other.host.peer, other.host.addresses)
            other.host.learn(host.peer, host.addresses)
        self.nursery.start_soon(live)
        await is_up.wait()
        self.all.extend(found)
        return found[0]

    def spans(self) -> list[str]:
        return sorted(kept.node.record().span for kept in self.all)

    def served(self) -> tuple[float, ...]:
        """What each block gets from servers that take new sessions, as each says of itself."""
        records = [kept.node for kept in self.all]
        own = [offer for node in records for offer in node.offers() if offer.peer == node.host.peer]
        return tuple(coverage(own, CARD.blocks))

    async def find(self, avoid: frozenset[str], _needed: int) -> Route:
        """The first servers that join and take sessions."""
        hops: list[Hop] = []
        while not hops or hops[-1].span.stop < CARD.blocks:
            start = hops[-1].span.stop if hops else 0
            for kept in self.all:
                record = kept.node.record()
                is_there = record.state == "online" and record.peer not in avoid
                if is_there and record.held.start == start:
                    hops.append(Hop(record.peer, record.held))
                    break
            else:
                raise NoRoute(f"block {start} is served by nobody", uncovered=(f"{start}",))
        return Route(tuple(hops), 0.1)


def run(body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with (
            MemoryNetwork(delay_seconds=0.01) as network,
            trio.open_nursery() as nursery,
        ):
            await body(World(network, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def watched(world: World, seconds: float) -> list[tuple[float, ...]]:
    """What each block got, once a second."""
    seen = []
    for _ in range(int(seconds)):
        await trio.sleep(1.0)
        seen.append(world.served())
    return seen


def test_one_of_three_goes_where_one_serves_alone_and_no_block_is_ever_uncovered() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "0:2", "0:2", "2:4"):
            await world.add(span)
        seen = await watched(world, 1800)
        assert world.spans() == ["0:2", "0:2", "2:4", "2:4"]
        assert min(min(rates) for rates in seen) > 0
        moved = [kept for kept in world.all if len(kept.loaded) > 1]
        assert [kept.loaded for kept in moved] == [[Span(0, 2), Span(2, 4)]]
        assert [kept.closed for kept in world.all].count(1) == 1
        assert "moving from blocks 0:2 to 2:4" in moved[0].notes[0]

    run(body)


def test_a_server_whose_blocks_its_owner_chose_stays() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "0:2", "0:2", "2:4"):
            await world.add(span, is_free=False)
        await watched(world, 1800)
        assert world.spans() == ["0:2", "0:2", "0:2", "2:4"]

    run(body)


def test_in_a_balanced_swarm_nobody_moves() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "2:4", "0:2", "2:4"):
            await world.add(span)
        await watched(world, 1800)
        assert all(len(kept.loaded) == 1 for kept in world.all)

    run(body)


def test_a_target_that_cannot_be_loaded_costs_a_rest_and_not_the_server() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "0:2", "0:2"):
            await world.add(span, refused=("2:4",))
        await world.add("2:4")
        seen = await watched(world, 1800)
        assert world.spans() == ["0:2", "0:2", "0:2", "2:4"]
        assert min(min(rates) for rates in seen) > 0
        tried = [note for kept in world.all for note in kept.notes if "cannot be held" in note]
        assert tried
        per_server = max(sum("cannot be held" in n for n in kept.notes) for kept in world.all)
        assert per_server <= 1800 / 600

    run(body)


def test_blocks_that_cannot_be_fetched_cost_a_rest_and_no_session() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "0:2", "0:2"):
            await world.add(span, lost=("2:4",))
        await world.add("2:4")
        seen = await watched(world, 1000)
        assert world.spans() == ["0:2", "0:2", "0:2", "2:4"]
        assert all(kept.closed == 0 for kept in world.all)
        assert min(min(rates) for rates in seen) > 0
        assert any("cannot be had" in note for kept in world.all for note in kept.notes)

    run(body)


def test_blocks_that_nobody_serves_any_more_are_taken_soon_whatever_was_moved_lately() -> None:
    async def body(world: World) -> None:
        await world.add("0:2")
        await world.add("0:2")
        last = await world.add("2:4", is_free=False)
        world.network.kill(last.host.peer)
        world.all.remove(last)
        await trio.sleep(120)  # its record ends, one of two looks, settles and loads
        assert world.spans() == ["0:2", "2:4"]
        assert min(world.served()) > 0

    run(body)


def test_a_session_goes_on_unchanged_while_its_servers_move() -> None:
    async def body(world: World) -> None:
        for span in ("0:2", "0:2", "0:2", "2:4"):
            await world.add(span)
        await trio.sleep(570)  # a server that has just come rests before it looks
        client = world.network.attach(IDENTITIES[-1], SECRET, is_listening=False)
        for kept in world.all:
            client.learn(kept.host.peer, kept.host.addresses)
        ids = [3, 1, 4]
        async with open_session(
            client, IDENTITIES[-1], world.find, fingerprint=FINGERPRINT, max_tokens=600
        ) as session:
            start, new = 0, list(ids)
            for _ in range(50):
                tensor = Tensor("int32", (1, len(new)), np.asarray(new, "<i4").tobytes())
                session.step(start, {"ids": tensor}, "last", Wish(count=2))
                output = await session.next_output()
                start += len(new)
                new = [int(np.frombuffer(output.payload["tokens"].data, "<i4")[0])]
                ids += new
                await trio.sleep(5.0)
            assert ids[3:] == said_after(ids[:3], 50)
            assert session.journal.failovers > 0
        assert world.spans() == ["0:2", "0:2", "2:4", "2:4"]

    run(body)


def test_who_would_serve_other_weights_than_the_swarm_is_refused_and_says_goodbye() -> None:
    async def body(world: World) -> None:
        founder = await world.add("0:2", is_free=False, digests=b"a" * 12)

        async def join() -> None:
            async with trio.open_nursery() as nursery:
                world.nursery = nursery
                await world.add("1:3", is_free=False, digests=b"X" * 12)

        with pytest.raises(BaseExceptionGroup) as failed:
            await join()
        refused: BaseException = failed.value
        while isinstance(refused, BaseExceptionGroup):
            refused = refused.exceptions[0]
        assert isinstance(refused, BadInput)
        assert "blocks 1:2 here" in refused.message
        await trio.sleep(2)
        assert [record.peer for record in founder.node.records()] == [founder.host.peer]

    run(body)


def test_what_a_newcomer_is_guessed_to_do_is_what_others_do() -> None:
    async def body(world: World) -> None:
        await world.add("0:4")
        assert guessed_speeds(()).decode_seconds_per_block > 0
        guessed = guessed_speeds(world.all[0].node.offers())
        assert guessed.decode_seconds_per_block == SPEEDS.decode_seconds_per_block

    run(body)
