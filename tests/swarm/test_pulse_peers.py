"""Pulse among peers that are older, mute, busy, wrong or greedy."""

from contextlib import suppress

import pytest
import trio
from pulsing import World, run

from swarm.errors import Unreachable
from swarm.memory import MemoryHost
from swarm.probe import PROBE_PROTOCOL, serve_probe
from swarm.pulse import MOST_WATCHED, PULSE_PROTOCOL
from swarm.transport import MessageStream, Stream
from swarm.wire import Frame


@pytest.mark.parametrize("is_said", [True, False])
def test_a_peer_whose_loop_stalls_more_and_more_is_spared_if_it_says_so(is_said: bool) -> None:
    async def stalling(stream: Stream) -> None:
        messages, worst = MessageStream(stream), 0.0
        while True:
            frame = await messages.receive_frame()
            lag = worst if is_said else 0.0
            await messages.send_frame(Frame({"round": frame.header["round"], "lag": lag}))
            if frame.header["round"] % 24 == 23:  # each six seconds: the jitter is forgotten
                worst = min(worst + 0.5, 2.0)
                await trio.sleep(worst)

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(60)
        assert bool(world.silences) is not is_said

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, stalling))


def test_our_own_stall_is_told_in_pings_and_pongs_until_it_is_long_ago() -> None:
    pings: list[float] = []

    async def note(stream: Stream) -> None:
        messages = MessageStream(stream)
        while True:
            frame = await messages.receive_frame()
            pings.append(frame.header["lag"])
            await messages.send_frame(frame)

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        stream = MessageStream(await world.far.open("near", PULSE_PROTOCOL, within=1.0))
        pongs: list[float] = []
        await trio.sleep(1)
        world.clock.jump(2.0)
        for number in range(3):
            await trio.sleep(2.2)
            await stream.send_frame(Frame({"round": number}))
            pongs.append((await stream.receive_frame(within=1.0)).header["lag"])
        assert pongs == pytest.approx([2.0, 2.0, 0.0], abs=0.06)
        assert pings[1] == pings[-1] == pytest.approx(0.0)
        assert max(pings) == pytest.approx(2.0, abs=0.06)

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, note))


def test_any_byte_is_life() -> None:
    async def mute(stream: Stream) -> None:
        while True:
            await stream.receive_some()

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        for _ in range(40):
            world.pulse.heard("far")
            world.pulse.heard("a stranger")
            await trio.sleep(0.5)
        assert not world.silences
        assert await world.silence_after(5) < 2.0

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, mute))


def test_the_pings_of_a_peer_are_life_and_carry_its_lag() -> None:
    async def mute(stream: Stream) -> None:
        while True:
            await stream.receive_some()

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        stream = MessageStream(await world.far.open("near", PULSE_PROTOCOL, within=1.0))
        for number in range(40):
            await stream.send_frame(Frame({"round": number, "lag": 2.0}))
            await trio.sleep(0.5)
        assert not world.silences
        assert 3.0 < await world.silence_after(5) < 4.0

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, mute))


def test_an_older_peer_is_asked_by_probes() -> None:
    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(60)
        assert not world.silences
        world.network.cut("near", "far")
        assert await world.silence_after(5) < 1.3

    run(body, delay=0.15, far=serve_probe)


def test_a_peer_that_hangs_up_is_asked_less_and_less_often() -> None:
    calls: list[float] = []

    async def hang_up(stream: Stream) -> None:
        calls.append(trio.current_time())

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(60)
        assert len(world.silences) == 1
        assert 25 < len(calls) < 40

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, hang_up))


def test_a_stream_that_leaves_too_many_pings_unanswered_is_replaced() -> None:
    pings: list[int] = []

    async def mute(stream: Stream) -> None:
        messages = MessageStream(stream)
        while True:
            pings.append((await messages.receive_frame()).header["round"])

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        await trio.sleep(40)
        assert max(pings) == 63
        assert pings.count(0) > 1

    run(body, far=lambda host: host.serve(PULSE_PROTOCOL, mute))


@pytest.mark.parametrize(
    "answer", [{"round": 99}, {"round": -1}, {"lag": 0}, {"round": 0, "lag": float("nan")}]
)
def test_wrong_pongs_are_no_sign_of_life(answer: dict[str, object]) -> None:
    async def lying(stream: Stream) -> None:
        messages = MessageStream(stream)
        while True:
            await messages.receive_frame()
            await messages.send_frame(Frame(answer))

    def serve(host: MemoryHost) -> None:
        host.serve(PULSE_PROTOCOL, lying)
        host.serve(PROBE_PROTOCOL, lying)

    async def body(world: World) -> None:
        world.pulse.watch("far", world.tell)
        assert await world.silence_after(5) < 2.0

    run(body, far=serve)


def test_so_many_peers_are_asked_at_a_time_and_the_next_after_a_release() -> None:
    async def body(world: World) -> None:
        told: list[str] = []
        names = [f"nobody {number}" for number in range(MOST_WATCHED + 1)]
        watches = {name: world.pulse.watch(name, told.append) for name in names}
        await trio.sleep(3)
        assert len(told) == MOST_WATCHED
        watches[told[0]].release()  # any of them may be the one that waits
        await trio.sleep(3)
        assert len(told) == MOST_WATCHED + 1

    run(body)


async def flood(host: MemoryHost, frame: Frame) -> int:
    """Send one frame as often as the other side takes it; return how many it answered."""
    answered = 0
    stream = MessageStream(await host.open("far", PULSE_PROTOCOL, within=1.0))
    with suppress(Unreachable):
        while answered < 1000:
            await stream.send_frame(frame)
            await stream.receive_frame(within=1.0)
            answered += 1
    await stream.close()
    return answered


def test_the_newest_stream_of_an_asker_ends_the_one_before() -> None:
    async def body(world: World) -> None:
        async def ask() -> MessageStream:
            stream = MessageStream(await world.near.open("far", PULSE_PROTOCOL, within=1.0))
            await stream.send_frame(Frame({"round": 1}))
            assert (await stream.receive_frame(within=1.0)).header["round"] == 1
            return stream

        first, _second = await ask(), await ask()
        with pytest.raises(Unreachable), trio.fail_after(1.0):
            await first.receive_frame()

    run(body)


@pytest.mark.parametrize(
    ("header", "most"),
    [({"round": 1}, 70), ({"round": "1"}, 0), ({}, 0), ({"round": 1, "pad": "x" * 500}, 0)],
)
def test_who_floods_is_answered_so_often_on_however_many_streams(
    header: dict[str, object], most: int
) -> None:
    async def body(world: World) -> None:
        answered = [await flood(world.near, Frame(header)) for _ in range(5)]
        assert sum(answered) <= most
        assert (answered[0] > 0) is (most > 0)
        await trio.sleep(10)
        world.pulse.watch("far", world.tell)
        await trio.sleep(20)
        assert not world.silences

    run(body)
