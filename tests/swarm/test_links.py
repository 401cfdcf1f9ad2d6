"""Links carry out Dial, Send and Shut, and report each end once."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from swarm import links as module
from swarm.chain import Dial, Send, Shut
from swarm.links import MOST_UNWRITTEN, WRITE_SECONDS, Links
from swarm.memory import MemoryNetwork
from swarm.messages import CHAIN_PROTOCOL, AnyMessage, Close, Credit, FaultKind, Ready, Step
from swarm.transport import MessageStream, Stream
from swarm.wire import Tensor

BIG = {"ids": Tensor("int32", (1, 1 << 18), bytes(4 << 18))}


def big(serial: int) -> Step:
    return Step(serial=serial, after=serial - 1, start=0, payload=BIG)


class Heard:
    def __init__(self) -> None:
        self.messages: list[tuple[int, AnyMessage]] = []
        self.ends: list[tuple[int, FaultKind, str]] = []

    def received(self, link: int, message: AnyMessage) -> None:
        self.messages.append((link, message))

    def ended(self, link: int, failure: FaultKind, message: str) -> None:
        self.ends.append((link, failure, message))


class Bench:
    """Our links, and a far peer whose streams are handed to the test."""

    def __init__(self, network: MemoryNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nursery = nursery
        self.heard = Heard()
        self.here, self.far = network.attach("here"), network.attach("far")
        network.introduce()
        self.links = Links(self.here, nursery, self.heard)
        self.arrived, self._streams = trio.open_memory_channel[Stream](10)[::-1]
        self.far.serve(CHAIN_PROTOCOL, self._take)
        self.release = trio.Event()

    async def _take(self, stream: Stream) -> None:
        await self._streams.send(stream)
        await self.release.wait()

    async def dialled(self) -> tuple[int, MessageStream]:
        number = self.links.new_number()
        self.links.carry_out(Dial(number, "far", Ready(have=0)))
        stream = MessageStream(await self.arrived.receive())
        assert await stream.receive() == Ready(have=0)
        return number, stream


def run(body: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with MemoryNetwork(delay_seconds=0.01) as network, trio.open_nursery() as nursery:
            await body(Bench(network, nursery))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_messages_arrive_in_the_order_they_were_sent() -> None:
    async def body(bench: Bench) -> None:
        number, stream = await bench.dialled()
        for more in range(20):
            bench.links.carry_out(Send(number, Credit(more=more)))
        assert [await stream.receive() for _ in range(20)] == [Credit(more=n) for n in range(20)]

    run(body)


def test_what_was_sent_before_a_shut_is_written_and_then_the_stream_ends() -> None:
    async def body(bench: Bench) -> None:
        number, stream = await bench.dialled()
        bench.links.carry_out(Send(number, Close()))
        bench.links.carry_out(Shut(number))
        assert await stream.receive() == Close()
        with pytest.raises(module.Unreachable):
            await stream.receive()
        assert not len(bench.links)

    run(body)


def test_a_link_that_is_shut_says_nothing_more() -> None:
    async def body(bench: Bench) -> None:
        number, stream = await bench.dialled()
        for serial in range(1, 4):  # more than the window: the link lingers while it writes
            bench.links.carry_out(Send(number, big(serial)))
        bench.links.carry_out(Shut(number))
        await stream.send(Close())
        await trio.sleep(1.0)
        await stream.close()
        await bench.links.wait_empty()
        assert bench.heard.messages == []
        assert bench.heard.ends == []

    run(body)


def test_reading_never_waits_for_writing() -> None:
    async def body(bench: Bench) -> None:
        number, stream = await bench.dialled()
        for serial in range(1, 4):
            bench.links.carry_out(Send(number, big(serial)))
        await stream.send(Credit(more=1))  # its own reader reads nothing yet
        await trio.sleep(0.1)
        assert bench.heard.messages == [(number, Credit(more=1))]

    run(body)


def test_a_receiver_that_takes_nothing_is_given_up_in_time() -> None:
    async def body(bench: Bench) -> None:
        number, _ = await bench.dialled()
        bench.network.cut("here", "far")
        for serial in range(1, 4):
            bench.links.carry_out(Send(number, big(serial)))
        await trio.sleep(WRITE_SECONDS + 1)
        assert [(link, failure) for link, failure, _ in bench.heard.ends] == [(number, "closed")]
        assert not len(bench.links)

    run(body)


def test_a_link_whose_queue_runs_over_is_given_up() -> None:
    async def body(bench: Bench) -> None:
        number, _ = await bench.dialled()
        bench.links.carry_out(Send(number, big(1)))  # nobody reads it: the others wait behind it
        for _ in range(MOST_UNWRITTEN + 2):
            bench.links.carry_out(Send(number, Close()))
        await trio.sleep(0.1)
        ((link, failure, message),) = bench.heard.ends
        assert (link, failure) == (number, "closed")
        assert str(MOST_UNWRITTEN) in message

    run(body)


def test_a_message_that_no_frame_carries_ends_its_link_and_nothing_else() -> None:
    async def body(bench: Bench) -> None:
        number, _ = await bench.dialled()
        other, stream = await bench.dialled()
        size = 33 << 20
        payload = {"ids": Tensor("uint8", (1, size), bytes(size))}
        bench.links.carry_out(Send(number, Step(serial=1, after=0, start=0, payload=payload)))
        await trio.sleep(0.1)
        assert [(link, failure) for link, failure, _ in bench.heard.ends] == [(number, "failed")]
        bench.links.carry_out(Send(other, Close()))
        assert await stream.receive() == Close()

    run(body)


def test_a_peer_that_nobody_knows_is_unreachable() -> None:
    async def body(bench: Bench) -> None:
        bench.links.carry_out(Dial(7, "stranger", Close()))
        await bench.links.wait_empty()
        assert [(link, failure) for link, failure, _ in bench.heard.ends] == [(7, "unreachable")]

    run(body)


def test_bytes_that_are_no_message_are_the_peers_fault() -> None:
    async def body(bench: Bench) -> None:
        number, stream = await bench.dialled()
        await stream._stream.send_all(b"\x00\x00\x00\x01\xff")
        await trio.sleep(0.1)
        assert [(link, failure) for link, failure, _ in bench.heard.ends] == [
            (number, "broke_word")
        ]

    run(body)


def test_a_handler_that_is_cancelled_reports_the_end_of_its_link() -> None:
    """Else the leg would wait for ever for a stream that nobody reads."""

    async def body(bench: Bench) -> None:
        async def adopt(stream: Stream) -> None:
            await bench.links.adopt(5, MessageStream(stream), lambda: None)

        bench.here.serve(CHAIN_PROTOCOL, adopt)
        stream = await bench.far.open("here", CHAIN_PROTOCOL, within=1.0)
        await MessageStream(stream).send(Close())
        await trio.sleep(0.1)
        assert len(bench.links) == 1
        bench.network.kill("here")
        await trio.sleep(0.1)
        assert [link for link, _, _ in bench.heard.ends] == [5]
        assert not len(bench.links)

    run(body)


def test_all_who_wait_for_the_last_link_are_woken() -> None:
    async def body(bench: Bench) -> None:
        number, _ = await bench.dialled()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bench.links.wait_empty)
                nursery.start_soon(bench.links.wait_empty)
                await trio.sleep(0.1)
                bench.links.carry_out(Shut(number))

    run(body)
