"""Twenty hosts: news is everywhere within two seconds, who leaves is gone at once and who was
killed when its record ends, also after a third was killed at the same time.

In virtual time; and over real sockets, which prints how long each took:

    pytest --run-slow -s tests/laws/test_twenty_hosts.py
"""

import time
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
from swarm_of_hosts import Member, SwarmOfHosts, clock_of_a_machine_of_its_own
from trio.testing import MockClock

from swarm.errors import SwarmError
from swarm.host import open_host
from swarm.memory import MemoryNetwork

HOSTS = 20
NEWS_SECONDS = 2.0
AT_ONCE_SECONDS = 0.5  # in virtual time: a few of its links' 50 to 100 ms
STARTING_SECONDS = 60.0  # no law: the handshakes of twenty hosts on a busy machine
SETTLING_SECONDS = 5.0  # the last that came still has one link only; links are sought each second
# Twenty hosts in one process want half a core: with less, what waits for it piles up, and the
# times are the machine's.
MOST_STARVED = 0.1
LAG_SECONDS = 0.5  # between hearing of a record and of a kill


@dataclass
class Trial:
    """One run of the law, and how many seconds each part of it took."""

    swarm: SwarmOfHosts
    seconds: dict[str, float] = field(default_factory=dict)

    async def fill(self) -> None:
        while len(self.swarm.members) < HOSTS:
            await (await self.swarm.come()).announce()
        everyone = list(self.swarm.members)
        await self.swarm.until_all(
            lambda one: all(one.record_of(other) for other in everyone), within=STARTING_SECONDS
        )
        await trio.sleep(SETTLING_SECONDS)

    async def news_is_everywhere(self, when: str) -> None:
        """What a member newly says of itself, and a newcomer's record."""
        teller = self.swarm.members[len(self.swarm.members) // 2]
        tokens = 1000 + len(self.seconds)
        self.seconds[f"{when}: a change is known to all"] = await self.swarm.until_all(
            lambda one: any(record.free_tokens == tokens for record in one.records()),
            within=NEWS_SECONDS,
            after=partial(teller.announce, tokens),
        )
        newcomer = await self.swarm.come()
        self.seconds[f"{when}: a newcomer is known to all"] = await self.swarm.until_all(
            lambda one: one.record_of(newcomer) is not None,
            within=NEWS_SECONDS,
            after=newcomer.announce,
        )

    async def who_leaves_is_gone_at_once(self, when: str) -> None:
        self.seconds[f"{when}: nobody knows who left"] = await self.swarm.leave(
            self.swarm.members[3], within=NEWS_SECONDS
        )

    async def the_killed_are_gone_in_time(self, when: str, killed: list[Member]) -> None:
        valid_seconds = self._longest_validity(killed)
        self.seconds[f"{when}: nobody knows the killed"] = await self.swarm.until_all(
            lambda one: not any(one.record_of(dead) for dead in killed),
            within=valid_seconds + LAG_SECONDS,
        )

    def _longest_validity(self, killed: list[Member]) -> float:
        return max(
            record.valid_seconds
            for one in self.swarm.members
            for dead in killed
            if (record := one.record_of(dead)) is not None
        )


async def hold_the_law(trial: Trial) -> None:
    swarm = trial.swarm
    await trial.fill()
    await trial.news_is_everywhere("at rest")
    await trial.who_leaves_is_gone_at_once("at rest")
    first = swarm.members[5]
    await swarm.kill(first)
    await trial.the_killed_are_gone_in_time("at rest", [first])
    await trial.fill()
    third = swarm.members[::3]  # the first that came and the newest among them
    await swarm.kill(*third)
    await trial.news_is_everywhere("a third killed")
    await trial.who_leaves_is_gone_at_once("a third killed")
    await trial.the_killed_are_gone_in_time("a third killed", third)
    for one in swarm.members:
        assert all(one.record_of(other) for other in swarm.members)


@pytest.mark.parametrize("is_silent", [False, True])
def test_twenty_hosts_in_virtual_time_hold_the_law_whether_the_killed_close_or_fall_silent(
    is_silent: bool,
) -> None:
    async def main() -> None:
        network = MemoryNetwork(delay_seconds=0.05, jitter_seconds=0.05)
        async with network, trio.open_nursery() as nursery:
            swarm = SwarmOfHosts(
                network.open_host,
                nursery,
                power_off=lambda peer: network.kill(peer, is_silent=is_silent),
            )
            trial = Trial(swarm)
            await hold_the_law(trial)
            at_once = [took for what, took in trial.seconds.items() if "left" in what]
            assert max(at_once) < AT_ONCE_SECONDS
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
def test_twenty_hosts_over_real_sockets_hold_the_law() -> None:
    began, own_began = time.monotonic(), clock_of_a_machine_of_its_own()
    seconds: dict[str, float] = {}

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            swarm = SwarmOfHosts(open_host, nursery, clock=clock_of_a_machine_of_its_own)
            await hold_the_law(Trial(swarm, seconds))
            nursery.cancel_scope.cancel()

    broken: BaseExceptionGroup[Exception] | None = None
    try:
        trio.run(main)
    except* (AssertionError, SwarmError) as failures:
        broken = failures
    passed = time.monotonic() - began
    starved = passed - (clock_of_a_machine_of_its_own() - own_began)
    for what, took in seconds.items():
        print(f"{took:8.3f} s  {what}")
    print(f"{starved:8.3f} s  of {passed:.3f} waited for a core that others had")
    if broken is not None:
        if starved > MOST_STARVED * passed:
            pytest.skip(f"others had the cores for {starved:.0f} of {passed:.0f} seconds: {broken}")
        raise broken
