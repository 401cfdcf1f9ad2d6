"""The memory network's own faults, in virtual time."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from swarm.errors import Refusal, Unreachable
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.pipes import STALL_SECONDS
from swarm.transport import Stream

ECHO = "/test/echo/1"


async def echo(stream: Stream) -> None:
    while True:
        await stream.send_all(await stream.receive_some())


async def receive_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.receive_some()
    return data


Talk = Callable[[MemoryNetwork, MemoryHost, MemoryHost], Awaitable[None]]


def between_two(talk: Talk, *, delay_seconds: float = 0.0, jitter_seconds: float = 0.0) -> None:
    """Hold a conversation between "A" and "B", which serves echo."""

    async def main() -> None:
        async with MemoryNetwork(
            delay_seconds=delay_seconds, jitter_seconds=jitter_seconds
        ) as network:
            here, there = network.attach("A"), network.attach("B")
            network.introduce()
            there.serve(ECHO, echo)
            await talk(network, here, there)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_step_takes_the_delay_of_its_line_both_ways() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, _there: MemoryHost) -> None:
        network.delay("A", "B", 0.05)
        stream = await here.open("B", ECHO, within=1)
        assert trio.current_time() == pytest.approx(0.3)  # three round trips to be linked
        await stream.send_all(b"x")
        await stream.receive_some()
        assert trio.current_time() == pytest.approx(0.4)

    between_two(talk)


def test_a_cut_is_silent_and_a_mended_line_delivers_what_it_held() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, _there: MemoryHost) -> None:
        stream = await here.open("B", ECHO, within=1)
        await stream.send_all(b"one")
        assert await stream.receive_some() == b"one"
        network.cut("A", "B")
        await stream.send_all(b"two")
        with trio.move_on_after(100) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        assert here.links() == {"B"}
        network.mend("A", "B")
        assert await stream.receive_some() == b"two"

    between_two(talk)


def test_an_end_behind_a_cut_is_not_noticed_until_mended() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, there: MemoryHost) -> None:
        hang_up = trio.Event()

        async def wait(_stream: Stream) -> None:
            await hang_up.wait()

        there.serve("/test/wait/1", wait)
        stream = await here.open("B", "/test/wait/1", within=1)
        await stream.send_all(b"x")
        await trio.sleep(0.1)
        network.cut("A", "B")
        hang_up.set()
        await trio.sleep(0.1)
        await stream.send_all(b"y")
        with trio.move_on_after(1) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        network.mend("A", "B")
        with pytest.raises(Unreachable):
            await stream.receive_some()
        with pytest.raises(Unreachable):
            await stream.send_all(b"z")

    between_two(talk)


def test_dialling_over_a_cut_line_meets_its_deadline() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, _there: MemoryHost) -> None:
        network.cut("A", "B")
        with pytest.raises(Unreachable, match="within 3 seconds"):
            await here.open("B", ECHO, within=3)
        assert trio.current_time() == pytest.approx(3)

    between_two(talk)


def test_a_broken_link_ends_its_streams_and_may_be_dialled_again() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, there: MemoryHost) -> None:
        events: list[tuple[str, bool]] = []
        there.watch_links(lambda peer, is_up: events.append((peer, is_up)))
        stream = await here.open("B", ECHO, within=1)
        await stream.send_all(b"x")
        network.break_link("A", "B")
        with pytest.raises(Unreachable):
            await stream.receive_some()
        with pytest.raises(Unreachable):
            await stream.send_all(b"x")
        assert not here.links()
        await here.open("B", ECHO, within=1)
        assert events == [("A", True), ("A", False), ("A", True)]

    between_two(talk)


def test_a_killed_host_is_gone_for_others_and_unusable_for_itself() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, there: MemoryHost) -> None:
        cancelled = trio.Event()

        async def linger(stream: Stream) -> None:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()

        there.serve("/test/linger/1", linger)
        stream = await here.open("B", "/test/linger/1", within=1)
        await stream.send_all(b"x")
        await trio.sleep(0.1)
        network.kill("B")
        await cancelled.wait()
        with pytest.raises(Unreachable):
            await stream.receive_some()
        with pytest.raises(Unreachable):
            await here.open("B", ECHO, within=1)
        with pytest.raises(Unreachable, match="killed"):
            await there.open("A", ECHO, within=1)

    between_two(talk)


def test_a_silently_killed_host_leaves_others_waiting() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, _there: MemoryHost) -> None:
        stream = await here.open("B", ECHO, within=1)
        await stream.send_all(b"x")
        await stream.receive_some()
        network.kill("B", is_silent=True)
        await stream.send_all(b"y")
        with trio.move_on_after(100) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught

    between_two(talk)


def test_a_killed_peer_may_come_back_under_its_name() -> None:
    async def talk(network: MemoryNetwork, here: MemoryHost, _there: MemoryHost) -> None:
        await here.open("B", ECHO, within=1)
        network.kill("B")
        network.attach("B").serve(ECHO, echo)
        stream = await here.open("B", ECHO, within=1)
        await stream.send_all(b"again")
        assert await receive_exactly(stream, 5) == b"again"

    between_two(talk)


def test_a_receiver_that_does_not_read_loses_the_stream_after_the_stall() -> None:
    async def talk(_network: MemoryNetwork, here: MemoryHost, there: MemoryHost) -> None:
        async def sleep(_stream: Stream) -> None:
            await trio.sleep_forever()

        there.serve("/test/sleep/1", sleep)
        stream = await here.open("B", "/test/sleep/1", within=1)
        with pytest.raises(Unreachable, match="did not read"):
            await stream.send_all(bytes(1 << 20))
        assert trio.current_time() == pytest.approx(STALL_SECONDS)

    between_two(talk)


def test_jitter_never_changes_the_order_and_is_the_same_each_time() -> None:
    arrivals: list[list[float]] = []

    async def talk(_network: MemoryNetwork, here: MemoryHost, there: MemoryHost) -> None:
        times: list[float] = []
        data = b""

        async def listen(stream: Stream) -> None:
            nonlocal data
            while len(data) < 100:
                data += await stream.receive_some()
                times.append(trio.current_time())

        there.serve("/test/listen/1", listen)
        stream = await here.open("B", "/test/listen/1", within=10)
        for number in range(100):
            await stream.send_all(bytes([number]))
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert data == bytes(range(100))
        arrivals.append(times)

    for _ in range(2):
        between_two(talk, delay_seconds=0.02, jitter_seconds=0.05)
    assert arrivals[0] == arrivals[1]


def test_gossip_goes_round_a_ring_once() -> None:
    async def main() -> None:
        async with MemoryNetwork(delay_seconds=0.01) as network:
            hosts = [network.attach(name) for name in "ABCD"]
            network.introduce()
            for host, neighbour in zip(hosts, "BCDA", strict=True):
                await host.dial(neighbour, within=1)
            channels = [await host.subscribe("news", lambda _: True) for host in hosts]
            await hosts[0].publish("news", b"once")
            await trio.sleep(1)
            assert [c.statistics().current_buffer_used for c in channels] == [0, 1, 1, 1]
            network.cut("A", "B")
            network.cut("A", "D")
            await hosts[0].publish("news", b"lost")
            await trio.sleep(1)
            assert [c.statistics().current_buffer_used for c in channels] == [0, 1, 1, 1]

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_secrets_are_compared_as_over_the_real_network() -> None:
    async def main() -> None:
        async with MemoryNetwork() as network:
            here, _there = network.attach("A", b"one"), network.attach("B", b"two")
            network.introduce()
            with pytest.raises(Refusal):
                await here.dial("B", within=1)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_name_cannot_be_attached_twice() -> None:
    async def main() -> None:
        async with MemoryNetwork() as network:
            network.attach("A")
            with pytest.raises(ValueError, match="already"):
                network.attach("A")

    trio.run(main, clock=MockClock(autojump_threshold=0))
