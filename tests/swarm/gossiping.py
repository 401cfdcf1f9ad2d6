"""Hosts that gossip on a network in memory and in virtual time, for the tests beside."""

from collections.abc import Awaitable, Callable
from random import Random

import msgspec
import trio
from trio.testing import MockClock

from swarm.gate import keyed_name
from swarm.gossip import Gossip
from swarm.identity import Identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.peers import PeerTable
from swarm.record import PeerRecord

SECRET = b"0123456789abcdef"
FINGERPRINT = "ab" * 32
SWARM_ID = FINGERPRINT[:16]
TOPIC = keyed_name(SECRET, f"records {SWARM_ID}")
IDENTITIES = [Identity(bytes([seed]) * 32) for seed in range(1, 21)]
SECONDS_TO_KNOW = 5.0


def record(identity: Identity, **changes: object) -> PeerRecord:
    plain = PeerRecord(
        peer=identity.peer,
        sequence=1,
        addresses=(f"/memory/{identity.peer}",),
        fingerprint=FINGERPRINT,
        blocks=8,
        span="0:4",
        decode_seconds_per_block=0.001,
        prefill_seconds_per_block_token=0.0001,
    )
    return msgspec.structs.replace(plain, **changes)


class Member:
    """A host that gossips, and what it was told."""

    def __init__(
        self, network: MemoryNetwork, identity: Identity, nursery: trio.Nursery, **options: object
    ) -> None:
        self.identity = identity
        self.peer = identity.peer
        self.host: MemoryHost = network.attach(identity, SECRET)
        self.table = PeerTable(SWARM_ID)
        self.heard: list[tuple[str, PeerRecord | None]] = []
        self.gossip = Gossip(
            self.host,
            SECRET,
            self.table,
            identity=identity,
            rng=Random(identity.seed[0]),
            unix_ms=lambda: 1_000,
            **options,  # type: ignore[arg-type]
        )
        self.gossip.watch(lambda peer, found: self.heard.append((peer, found)))
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            await self.gossip.run()

    async def join(self, other: "Member") -> None:
        self.host.learn(other.peer, other.host.addresses)
        await self.host.dial(other.peer, within=1.0)

    async def announce(self, **changes: object) -> None:
        await self.gossip.announce(record(self.identity, **changes))

    def knows(self, other: "Member") -> bool:
        found = {known.peer for known in self.table.records(trio.current_time())}
        return other.peer in found

    def was_told_of_the_end_of(self, other: "Member") -> bool:
        return (other.peer, None) in self.heard


Body = Callable[[MemoryNetwork, trio.Nursery], Awaitable[None]]


def run(body: Body, *, delay_seconds: float = 0.02) -> None:
    async def main() -> None:
        async with (
            MemoryNetwork(delay_seconds=delay_seconds) as network,
            trio.open_nursery() as nursery,
        ):
            await body(network, nursery)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def until(is_so: Callable[[], bool], *, within: float) -> float:
    """Wait, in virtual time, and return how long it took."""
    started = trio.current_time()
    with trio.fail_after(within):
        while not is_so():  # noqa: ASYNC110 -- the time it takes is what is asked
            await trio.sleep(0.01)
    return trio.current_time() - started


async def members_that_know_each_other(
    network: MemoryNetwork, nursery: trio.Nursery, count: int, **options: object
) -> list[Member]:
    members = [Member(network, IDENTITIES[n], nursery, **options) for n in range(count)]
    for member in members[1:]:
        await member.join(members[0])
    for member in members:
        await member.announce()
    everyone = [(one, other) for one in members for other in members]
    await until(lambda: all(one.knows(other) for one, other in everyone), within=SECONDS_TO_KNOW)
    return members
