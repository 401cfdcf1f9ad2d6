"""What both networks promise, held against both."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from host_worlds import (
    ECHO,
    LIBP2P,
    MEMORY,
    SOON,
    Hosts,
    World,
    acquaint,
    echo,
    receive_exactly,
    receive_to_end,
    send_until_it_ends,
    until,
)

from swarm.errors import Refusal, Unreachable
from swarm.messages import Credit, Output
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import Tensor

pytestmark = pytest.mark.parametrize("world", [MEMORY, LIBP2P], ids=lambda world: world.name)

Pair = Callable[[Host, Host], Awaitable[None]]


def run_pair(world: World, conversation: Pair) -> None:
    """Hold a conversation between two hosts that know each other; the second serves echo."""

    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        there.serve(ECHO, echo)
        await conversation(here, there)

    world.run(main)


@pytest.mark.parametrize("size", [1, 300_000, 8_000_000])
def test_bytes_come_back_as_they_were_sent(world: World, size: int) -> None:
    async def talk(here: Host, there: Host) -> None:
        sent = bytes(range(256)) * (size // 256 + 1)
        stream = await here.open(there.peer, ECHO, within=SOON)
        assert (stream.peer, stream.protocol) == (there.peer, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, sent)
            assert await receive_exactly(stream, len(sent)) == sent

    run_pair(world, talk)


def test_messages_with_tensors_cross_whole(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = MessageStream(await here.open(there.peer, ECHO, within=SOON))
        hidden = Tensor("float32", (1, 16, 4096), bytes(range(256)) * 1024)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, Output(serial=1, start=0, payload={"hidden": hidden}))
            answer = await stream.receive(within=SOON)
        assert isinstance(answer, Output)
        assert bytes(answer.payload["hidden"].data) == hidden.data

    run_pair(world, talk)


def test_the_peer_that_was_dialled_may_open_streams_too(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        here.serve(ECHO, echo)
        await here.dial(there.peer, within=SOON)
        await until(lambda: here.peer in there.links())
        stream = await there.open(here.peer, ECHO, within=SOON)
        await stream.send_all(b"back")
        assert await receive_exactly(stream, 4) == b"back"

    run_pair(world, talk)


def test_what_was_sent_before_the_end_is_read_before_the_end(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        async def say_and_leave(stream: Stream) -> None:
            await stream.receive_some()
            for number in range(100):
                await stream.send_all(b"%03d" % number)

        there.serve("/test/leave/1", say_and_leave)
        stream = await here.open(there.peer, "/test/leave/1", within=SOON)
        await stream.send_all(b"go")
        assert await receive_to_end(stream) == b"".join(b"%03d" % n for n in range(100))

    run_pair(world, talk)


def test_closing_a_stream_ends_it_for_the_other_side(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        heard: list[bytes] = []

        async def listen(stream: Stream) -> None:
            heard.append(await receive_to_end(stream))

        there.serve("/test/listen/1", listen)
        stream = await here.open(there.peer, "/test/listen/1", within=SOON)
        await stream.send_all(b"last words")
        await stream.close()
        await stream.close()
        await until(lambda: heard == [b"last words"])
        with pytest.raises(Unreachable):
            await stream.send_all(b"more")
        with pytest.raises(Unreachable):
            await stream.receive_some()

    run_pair(world, talk)


def test_closing_a_stream_wakes_its_own_reader(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = await here.open(there.peer, ECHO, within=SOON)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_to_end, stream)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await stream.close()
            nursery.cancel_scope.deadline = trio.current_time() + SOON / 2
        assert not nursery.cancel_scope.cancelled_caught

    run_pair(world, talk)


def test_a_stream_that_the_peer_closed_cannot_be_written_for_ever(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        async def hang_up(stream: Stream) -> None:
            await stream.receive_some()

        there.serve("/test/hang-up/1", hang_up)
        stream = await here.open(there.peer, "/test/hang-up/1", within=SOON)
        with trio.fail_after(SOON), pytest.raises(Unreachable):
            await send_until_it_ends(stream)

    run_pair(world, talk)


def test_a_protocol_that_is_not_spoken_shows_when_reading(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = await here.open(there.peer, "/test/unheard-of/1", within=SOON)
        with pytest.raises(Unreachable, match="/test/unheard-of/1"):
            await stream.receive_some()

    run_pair(world, talk)


@pytest.mark.parametrize("error", [ValueError("a bug"), Refusal("no"), Unreachable("gone")])
def test_a_handler_that_raises_ends_its_own_stream_only(world: World, error: Exception) -> None:
    async def talk(here: Host, there: Host) -> None:
        async def fail(stream: Stream) -> None:
            await stream.receive_some()
            raise error

        there.serve("/test/fail/1", fail)
        good = await here.open(there.peer, ECHO, within=SOON)
        bad = await here.open(there.peer, "/test/fail/1", within=SOON)
        await bad.send_all(b"go")
        assert await receive_to_end(bad) == b""
        await good.send_all(b"still here")
        assert await receive_exactly(good, 10) == b"still here"

    run_pair(world, talk)


def test_a_wrong_secret_is_refused_and_links_nobody(world: World) -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(b"one secret"), await make(b"another secret")
        acquaint(here, there)
        with pytest.raises(Refusal, match="did not accept the secret") as caught:
            await here.dial(there.peer, within=SOON)
        assert "join token" in caught.value.next_step
        assert not here.links()
        assert not there.links()

    world.run(main)


def test_a_peer_without_a_known_address_is_unreachable_at_once(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        here.learn(there.peer, ())
        with pytest.raises(Unreachable, match="no address"):
            await here.dial(there.peer, within=SOON)
        with pytest.raises(Unreachable, match="no address"):
            await here.dial(here.peer, within=SOON)

    run_pair(world, talk)


def test_another_peer_at_the_address_is_not_taken_for_the_one_dialled(world: World) -> None:
    async def main(make: Hosts) -> None:
        here, there, other = await make(), await make(), await make()
        bare = [address.split("/p2p/")[0] for address in other.addresses]
        here.learn(there.peer, bare)
        with pytest.raises(Unreachable):
            await here.dial(there.peer, within=SOON)
        assert not here.links()

    world.run(main)


def test_links_are_told_when_they_come_up_and_go_down(world: World) -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        events: list[tuple[str, bool]] = []
        here.watch_links(lambda peer, is_up: events.append((peer, is_up)))
        await here.dial(there.peer, within=SOON)
        await here.dial(there.peer, within=SOON)
        assert here.links() == {there.peer}
        await until(lambda: there.links() == {here.peer})
        assert events == [(there.peer, True)]
        await make.leave(there)
        await until(lambda: not here.links())
        assert events == [(there.peer, True), (there.peer, False)]

    world.run(main)


def test_a_host_that_leaves_ends_its_streams_at_both_ends(world: World) -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        there.serve(ECHO, echo)
        stream = await here.open(there.peer, ECHO, within=SOON)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        await make.leave(there)
        assert await receive_to_end(stream) == b""
        with pytest.raises(Unreachable):
            await here.open(there.peer, ECHO, within=SOON)

    world.run(main)


def test_both_may_dial_at_once(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        here.serve(ECHO, echo)

        async def speak(host: Host, peer: str) -> None:
            stream = await host.open(peer, ECHO, within=SOON)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(speak, here, there.peer)
                nursery.start_soon(speak, there, here.peer)
        assert here.links() == {there.peer}
        assert there.links() == {here.peer}

    run_pair(world, talk)


def test_messages_of_several_writers_never_mix(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = await here.open(there.peer, ECHO, within=SOON)
        size, times = 100_000, 5

        async def write(letter: bytes) -> None:
            for _ in range(times):
                await stream.send_all(letter * size)

        async with trio.open_nursery() as nursery:
            for letter in (b"a", b"b", b"c"):
                nursery.start_soon(write, letter)
            data = await receive_exactly(stream, 3 * times * size)
        pieces = {data[start : start + size] for start in range(0, len(data), size)}
        assert pieces == {b"a" * size, b"b" * size, b"c" * size}

    run_pair(world, talk)


def test_what_is_posted_arrives_in_order_with_what_is_sent(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = await here.open(there.peer, ECHO, within=SOON)
        assert not stream.post(b"the first message opens the stream, and may wait")
        await stream.send_all(b"open")
        assert await receive_exactly(stream, 4) == b"open"
        sent, posted = [], 0
        for number in range(300):
            data = b"%05d" % number * (number % 7 + 1)
            if number % 5 and stream.post(data):
                posted += 1
            else:
                await stream.send_all(data)
            sent.append(data)
        assert posted > 200
        assert await receive_exactly(stream, len(b"".join(sent))) == b"".join(sent)

    run_pair(world, talk)


def test_nothing_is_posted_that_would_wait_for_the_receiver(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        may_read, heard = trio.Event(), bytearray()

        async def read_late(stream: Stream) -> None:
            heard.extend(await stream.receive_some())
            await may_read.wait()
            while len(heard) < expected:
                heard.extend(await stream.receive_some())

        there.serve("/test/late-post/1", read_late)
        stream = await here.open(there.peer, "/test/late-post/1", within=SOON)
        await stream.send_all(b"go")
        await until(lambda: heard == b"go")
        taken = [stream.post(bytes([number]) * 50_000) for number in range(40)]
        posted = taken.index(False)
        assert 1 <= posted < 20, "a window's worth is taken, and no more"
        assert not any(taken[posted:]), "what follows is not taken before it"
        expected = 2 + posted * 50_000
        may_read.set()
        await until(lambda: len(heard) == expected)
        assert heard[2:] == b"".join(bytes([number]) * 50_000 for number in range(posted))
        await stream.close()
        assert not stream.post(b"too late")

    run_pair(world, talk)


def test_a_cancelled_read_loses_nothing(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        stream = await here.open(there.peer, ECHO, within=SOON)
        sent = bytes(range(250)) * 4000
        got = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, sent)
            while len(got) < len(sent):
                with trio.move_on_after(0.001):
                    got += await stream.receive_some()
                await trio.lowlevel.checkpoint()
        assert got == sent

    run_pair(world, talk)


def test_a_cancelled_write_ends_the_stream(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        heard: list[int] = []

        async def read_late(stream: Stream) -> None:
            await trio.sleep(0.6)
            heard.append(len(await receive_to_end(stream)))

        there.serve("/test/late/1", read_late)
        stream = await here.open(there.peer, "/test/late/1", within=SOON)
        read_to_end = trio.Event()

        async def read() -> None:
            assert await receive_to_end(stream) == b""
            read_to_end.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            with trio.move_on_after(0.3) as scope:
                await stream.send_all(bytes(4_000_000))
            with trio.fail_after(SOON / 2):
                await read_to_end.wait()
        assert scope.cancelled_caught
        await until(lambda: bool(heard))
        assert heard[0] < 4_000_000
        with pytest.raises(Unreachable):
            await stream.send_all(b"more")

    run_pair(world, talk)


def test_many_streams_open_and_close_over_one_link(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        for number in range(300):  # more than the muxer allows at once
            stream = await here.open(there.peer, ECHO, within=SOON)
            await stream.send_all(b"%d" % number)
            assert await stream.receive_some() == b"%d" % number
            await stream.close()

    run_pair(world, talk)


def test_silence_is_unreachable_at_the_readers_deadline(world: World) -> None:
    async def talk(here: Host, there: Host) -> None:
        async def say_nothing(stream: Stream) -> None:
            await trio.sleep_forever()

        there.serve("/test/silent/1", say_nothing)
        stream = MessageStream(await here.open(there.peer, "/test/silent/1", within=SOON))
        await stream.send(Credit(more=1))
        began = trio.current_time()
        with pytest.raises(Unreachable, match="silent"):
            await stream.receive(within=0.2)
        assert trio.current_time() - began < SOON / 2

    run_pair(world, talk)


def test_gossip_reaches_those_behind_a_neighbour_but_not_its_author(world: World) -> None:
    async def main(make: Hosts) -> None:
        one, middle, far = await make(), await make(), await make()
        acquaint(one, middle, far)
        await one.dial(middle.peer, within=SOON)
        await far.dial(middle.peer, within=SOON)
        channels = [await host.subscribe("news", lambda _: True) for host in (one, middle, far)]
        got: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def collect() -> None:
                async for data in channels[2]:
                    got.append(data)  # noqa: PERF401  (it never ends, and is looked at meanwhile)

            nursery.start_soon(collect)
            with trio.fail_after(SOON):
                while not got:  # a mesh takes a moment to form
                    await one.publish("news", b"hear hear")
                    await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        assert set(got) == {b"hear hear"}
        assert channels[0].statistics().current_buffer_used == 0
        assert one.links() == far.links() == {middle.peer}

    world.run(main)


def test_gossip_that_a_check_denies_is_neither_given_nor_spread(world: World) -> None:
    async def main(make: Hosts) -> None:
        one, middle, far = await make(), await make(), await make()
        acquaint(one, middle, far)
        await one.dial(middle.peer, within=SOON)
        await far.dial(middle.peer, within=SOON)
        await one.subscribe("news", lambda _: True)
        held = await middle.subscribe("news", lambda data: not data.startswith(b"bad"))
        received = await far.subscribe("news", lambda _: True)
        with trio.fail_after(SOON):
            number = 0
            while not received.statistics().current_buffer_used:
                await one.publish("news", b"bad %d" % number)
                await one.publish("news", b"good %d" % number)
                number += 1
                await trio.sleep(0.2)
        for channel in (held, received):
            while channel.statistics().current_buffer_used:
                assert channel.receive_nowait().startswith(b"good")

    world.run(main)
