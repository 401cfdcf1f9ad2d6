"""Two hosts in virtual time, one of which watches the other: what the tests of pulses share."""

from collections.abc import Awaitable, Callable

import trio
from trio.testing import MockClock

from swarm.memory import MemoryHost, MemoryNetwork
from swarm.pulse import Pulse

LAN = 0.001


class World:
    """Two linked hosts, "near" that watches and "far"; whom near found silent, and when."""

    def __init__(self, network: MemoryNetwork, clock: MockClock) -> None:
        self.network = network
        self.clock = clock
        self.near, self.far = network.attach("near"), network.attach("far")
        network.introduce()
        self.pulse = Pulse(self.near)
        self.silences: list[float] = []

    def tell(self, peer: str) -> None:
        assert peer == "far"
        self.silences.append(trio.current_time())

    async def silence_after(self, seconds: float) -> float:
        """The time from now to the one silence told within so many seconds."""
        started, self.silences = trio.current_time(), []
        await trio.sleep(seconds)
        assert len(self.silences) == 1
        return self.silences[0] - started


Body = Callable[[World], Awaitable[None]]


def run(
    body: Body,
    *,
    delay: float = LAN,
    jitter: float = 0.0,
    far: Callable[[MemoryHost], None] | None = None,
) -> None:
    """Run with near's pulse, and far's unless `far` says what far serves instead."""

    async def main() -> None:
        network = MemoryNetwork(delay_seconds=delay, jitter_seconds=jitter)
        async with network, trio.open_nursery() as nursery:
            world = World(network, clock)
            if far is None:
                nursery.start_soon(Pulse(world.far).run)
            else:
                far(world.far)
            nursery.start_soon(world.pulse.run)
            await trio.testing.wait_all_tasks_blocked()
            await body(world)
            nursery.cancel_scope.cancel()

    clock = MockClock(autojump_threshold=0)
    trio.run(main, clock=clock)
