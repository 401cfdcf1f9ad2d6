"""Probes: the time they measure, and what they do with peers that do not keep to it."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from swarm.errors import PeerFault, Unreachable
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.probe import PROBE_PROTOCOL, measure_round_trip, serve_probe
from swarm.transport import MessageStream, Stream
from swarm.wire import Frame

Handler = Callable[[Stream], Awaitable[None]]


def run_pair(
    body: Callable[[MemoryNetwork, MemoryHost], Awaitable[None]], handler: Handler | None = None
) -> None:
    """Run with two hosts, "near" and "far", 20 ms apart; far answers with `handler` if given."""

    async def main() -> None:
        async with MemoryNetwork(delay_seconds=0.02) as network:
            near, far = network.attach("near"), network.attach("far")
            network.introduce()
            if handler is None:
                serve_probe(far)
            else:
                far.serve(PROBE_PROTOCOL, handler)
            await body(network, near)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_the_round_trip_is_twice_the_one_way_time_without_the_opening() -> None:
    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        assert await measure_round_trip(near, "far", within=5.0) == pytest.approx(0.04)

    run_pair(body)


def test_two_stalls_do_not_change_the_median() -> None:
    async def stalling(stream: Stream) -> None:
        messages = MessageStream(stream)
        for number in range(6):
            frame = await messages.receive_frame()
            await trio.sleep(1.0 if number in (1, 4) else 0.0)
            await messages.send_frame(frame)

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        assert await measure_round_trip(near, "far", within=5.0) == pytest.approx(0.04)

    run_pair(body, stalling)


def test_a_silent_peer_is_unreachable_when_the_time_is_up() -> None:
    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        await near.dial("far", within=1.0)
        network.cut("near", "far")
        started = trio.current_time()
        with pytest.raises(Unreachable, match="far"):
            await measure_round_trip(near, "far", within=2.0)
        assert trio.current_time() - started == pytest.approx(2.0)

    run_pair(body)


def test_samples_taken_before_a_silence_count_but_never_the_first() -> None:
    async def soon_silent(stream: Stream) -> None:
        messages = MessageStream(stream)
        await trio.sleep(1.0)  # as if opening took long
        for _ in range(2):
            await messages.send_frame(await messages.receive_frame())
        await trio.sleep_forever()

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        assert await measure_round_trip(near, "far", within=2.0) == pytest.approx(0.04)

    run_pair(body, soon_silent)


@pytest.mark.parametrize("header", [{}, {"round": 99}, {"round": "0"}, {"other": 0}])
def test_a_wrong_echo_is_the_peers_fault(header: dict[str, object]) -> None:
    async def lying(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.receive_frame()
        await messages.send_frame(Frame(header))
        await trio.sleep(1.0)

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        with pytest.raises(PeerFault):
            await measure_round_trip(near, "far", within=2.0)

    run_pair(body, lying)


def test_an_ended_stream_is_unreachable_at_once() -> None:
    async def hanging_up(stream: Stream) -> None:
        await stream.close()

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        with pytest.raises(Unreachable), trio.fail_after(1.0):
            await measure_round_trip(near, "far", within=60.0)

    run_pair(body, hanging_up)


def test_a_measuring_closes_its_stream() -> None:
    ended = trio.Event()

    async def watching(stream: Stream) -> None:
        messages = MessageStream(stream)
        try:
            while True:
                await messages.send_frame(await messages.receive_frame())
        finally:
            ended.set()

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        await measure_round_trip(near, "far", within=5.0)
        with trio.fail_after(1.0):
            await ended.wait()

    run_pair(body, watching)


@pytest.mark.parametrize("header", [{"round": None}, {"round": [1]}, {}, {"round": "x" * 500}])
def test_who_sends_nonsense_to_a_probe_loses_the_stream_and_nothing_else(
    header: dict[str, object],
) -> None:
    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        stream = MessageStream(await near.open("far", PROBE_PROTOCOL, within=1.0))
        await stream.send_frame(Frame(header))
        with pytest.raises(Unreachable):
            await stream.receive_frame(within=1.0)
        await stream.close()
        assert await measure_round_trip(near, "far", within=5.0) == pytest.approx(0.04)

    run_pair(body)


def test_one_stream_gets_a_bounded_number_of_echoes() -> None:
    async def echo_for_ever(stream: MessageStream) -> None:
        for number in range(1000):
            await stream.send_frame(Frame({"round": number}))
            await stream.receive_frame(within=1.0)

    async def body(network: MemoryNetwork, near: MemoryHost) -> None:
        stream = MessageStream(await near.open("far", PROBE_PROTOCOL, within=1.0))
        with pytest.raises(Unreachable):
            await echo_for_ever(stream)
        await stream.close()

    run_pair(body)
