"""Hosts that gossip, in memory or over sockets, and how long their news takes to reach all."""

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random

import trio

from swarm.gossip import Gossip
from swarm.identity import Identity
from swarm.peers import PeerTable
from swarm.record import PeerRecord
from swarm.transport import Host

SECRET = b"the secret of twenty"
FINGERPRINT = "ab" * 32
SWARM_ID = FINGERPRINT[:16]
LOOKS = 200  # in the time that something may take

OpenHost = Callable[[Identity, bytes], AbstractAsyncContextManager[Host]]


class Member:
    """One host, its gossip, and its end."""

    def __init__(self, identity: Identity, host: Host, gossip: Gossip) -> None:
        self.identity = identity
        self.host = host
        self.gossip = gossip
        self.scope = trio.CancelScope()
        self.has_ended = trio.Event()

    @property
    def peer(self) -> str:
        return self.identity.peer

    async def announce(self, free_tokens: int = 100) -> None:
        """Say something new of itself."""
        record = PeerRecord(
            peer=self.peer,
            sequence=0,
            addresses=self.host.addresses,
            fingerprint=FINGERPRINT,
            blocks=8,
            span="0:8",
            decode_seconds_per_block=0.001,
            prefill_seconds_per_block_token=0.0001,
            free_tokens=free_tokens,
        )
        await self.gossip.announce(record)

    def records(self) -> tuple[PeerRecord, ...]:
        """What it knows now."""
        return self.gossip.table.records(trio.current_time())

    def record_of(self, other: "Member") -> PeerRecord | None:
        """What it knows of the other now."""
        return next((record for record in self.records() if record.peer == other.peer), None)


def clock_of_a_machine_of_its_own() -> float:
    """Real seconds, less those in which this thread was ready and others had the cores.

    So a busy machine does not break a law about peers that have one each. Linux counts them.
    """
    schedstat = Path("/proc/thread-self/schedstat")
    waited = int(schedstat.read_text().split()[1]) if schedstat.exists() else 0
    return time.monotonic() - waited / 1e9


class SwarmOfHosts:
    """Members in tasks of their own, until they are killed or leave."""

    def __init__(
        self,
        open_host: OpenHost,
        nursery: trio.Nursery,
        *,
        power_off: Callable[[str], None] = lambda _peer: None,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        """`power_off`: what befalls the machine of a killed peer before its process ends."""
        self.members: list[Member] = []
        self._open_host = open_host
        self._nursery = nursery
        self._power_off = power_off
        self._clock = clock
        self._count = 0

    async def come(self) -> Member:
        """Let one more come, linked to the last that came; it says nothing of itself yet."""
        self._count += 1
        member: Member = await self._nursery.start(self._live, Identity(bytes([self._count]) * 32))
        self.members.append(member)
        return member

    async def kill(self, *members: Member) -> None:
        """End them at once, as if their processes had died: they say nothing."""
        for member in members:
            self.members.remove(member)
            self._power_off(member.peer)
            member.scope.cancel()
        for member in members:
            await member.has_ended.wait()

    async def leave(self, member: Member, *, within: float) -> float:
        """Let one take its leave; return after how many seconds nobody knew it any more."""
        self.members.remove(member)
        took = await self.until_all(
            lambda one: one.record_of(member) is None, within=within, after=member.gossip.leave
        )
        member.scope.cancel()
        await member.has_ended.wait()
        return took

    async def until_all(
        self,
        is_so: Callable[[Member], bool],
        *,
        within: float,
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> float:
        """Wait until it is so for each member; return how many seconds after the beginning of
        `after` that was. AssertionError if it took too long.
        """
        started = self._clock()
        async with trio.open_nursery() as nursery:
            if after is not None:
                nursery.start_soon(after)
            while lacking := [n for n, member in enumerate(self.members) if not is_so(member)]:
                took = self._clock() - started
                assert took < within, f"not so for members {lacking} after {took:.3f} seconds"
                await trio.sleep(within / LOOKS)
            took = self._clock() - started
        assert took <= within, f"so only after {took:.3f} seconds"
        return took

    async def _live(
        self, identity: Identity, task_status: trio.TaskStatus[Member] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with self._open_host(identity, SECRET) as host:
            gossip = Gossip(
                host,
                SECRET,
                PeerTable(SWARM_ID),
                identity=identity,
                rng=Random(identity.seed[0]),
                seeds=await self._enter(host),
            )
            member = Member(identity, host, gossip)
            task_status.started(member)
            with member.scope:
                await gossip.run()
        member.has_ended.set()

    async def _enter(self, host: Host) -> Sequence[str]:
        if not self.members:
            return ()
        last = self.members[-1].host
        host.learn(last.peer, last.addresses)
        await host.dial(last.peer, within=10.0)
        return (last.peer,)
