"""A token crosses each link of the route once, and the client hears once of it."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
import trio

from blocks.executor import Executor
from blocks.thread import ComputeThread
from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, generate
from swarm.identity import new_identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.messages import Output, Step, unpack
from swarm.model import Description, describe, load
from swarm.server import Room, Server
from swarm.settings import DEMO_FOLDER
from swarm.transport import Handler, LinkListener, MessageCheck, Stream
from swarm.wire import Decoder

TOKENS = 24
CUTS = (Span(0, 3), Span(3, 6), Span(6, 8))


class Tally:
    """Counts steps and outputs by (sender, receiver, serial), decoding what really travels."""

    def __init__(self) -> None:
        self.steps: Counter[tuple[str, str, int]] = Counter()
        self.outputs: Counter[tuple[str, str, int]] = Counter()
        self.frames: Counter[tuple[str, str]] = Counter()

    def note(self, sender: str, receiver: str, decoder: Decoder, data: bytes) -> None:
        for frame in decoder.feed(data):
            self.frames[sender, receiver] += 1
            message = unpack(frame)
            if isinstance(message, Step):
                self.steps[sender, receiver, message.serial] += 1
            elif isinstance(message, Output):
                self.outputs[sender, receiver, message.serial] += 1


class CountedStream:
    """A stream whose sent bytes are tallied."""

    def __init__(self, stream: Stream, own: str, tally: Tally) -> None:
        self._stream = stream
        self._own = own
        self._tally = tally
        self._decoder = Decoder()

    @property
    def peer(self) -> str:
        return self._stream.peer

    @property
    def protocol(self) -> str:
        return self._stream.protocol

    async def send_all(self, data: bytes) -> None:
        self._tally.note(self._own, self.peer, self._decoder, data)
        await self._stream.send_all(data)

    def post(self, data: bytes) -> bool:
        is_taken = self._stream.post(data)
        if is_taken:
            self._tally.note(self._own, self.peer, self._decoder, data)
        return is_taken

    async def receive_some(self) -> bytes:
        return await self._stream.receive_some()

    async def close(self) -> None:
        await self._stream.close()


class CountedHost:
    """A host all of whose streams are tallied."""

    def __init__(self, host: MemoryHost, tally: Tally) -> None:
        self._host = host
        self._tally = tally

    @property
    def peer(self) -> str:
        return self._host.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._host.addresses

    def serve(self, protocol: str, handler: Handler) -> None:
        async def counted(stream: Stream) -> None:
            await handler(CountedStream(stream, self.peer, self._tally))

        self._host.serve(protocol, counted)

    async def open(self, peer: str, protocol: str, *, within: float) -> Stream:
        stream = await self._host.open(peer, protocol, within=within)
        return CountedStream(stream, self.peer, self._tally)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        self._host.learn(peer, addresses)

    async def dial(self, peer: str, *, within: float) -> None:
        await self._host.dial(peer, within=within)

    def links(self) -> frozenset[str]:
        return self._host.links()

    def watch_links(self, listener: LinkListener) -> None:
        self._host.watch_links(listener)

    async def publish(self, topic: str, data: bytes) -> None:
        await self._host.publish(topic, data)

    async def subscribe(self, topic: str, check: MessageCheck) -> trio.MemoryReceiveChannel[bytes]:
        return await self._host.subscribe(topic, check)


@pytest.fixture(scope="module")
def described() -> Description:
    return describe(DEMO_FOLDER)


def test_each_token_crosses_each_link_once_and_the_client_gets_one_output_per_token(
    described: Description,
) -> None:
    tally = Tally()
    way: list[str] = []

    async def main() -> int:
        async with MemoryNetwork() as network, trio.open_nursery() as nursery:
            with ComputeThread(1) as thread:
                hops = []
                for span in CUTS:
                    host = CountedHost(network.attach(new_identity()), tally)
                    room = Room(span=span, fingerprint=described.fingerprint, cache_tokens=100)
                    executor = Executor(load(described, span, "float32", "cpu"), thread)
                    is_serving = trio.Event()
                    nursery.start_soon(Server(host, executor, room).run, is_serving)
                    await is_serving.wait()
                    hops.append(Hop(host.peer, span))
                identity = new_identity()
                client = CountedHost(network.attach(identity, is_listening=False), tally)
                network.introduce()
                way.extend([identity.peer, *(hop.peer for hop in hops), identity.peer])

                async def find(_avoid: frozenset[str], _needed: int) -> Route:
                    return Route(tuple(hops), 0.1)

                async with open_session(
                    client, identity, find, fingerprint=described.fingerprint, max_tokens=60
                ) as session:
                    settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
                    await generate(session, [0, 419, 437, 259, 389], settings)
                    outputs = session.journal.outputs
                nursery.cancel_scope.cancel()
        return outputs

    assert trio.run(main) == TOKENS
    links = list(pairwise(way))
    serials = range(1, TOKENS + 1)
    assert tally.steps == {(*link, serial): 1 for link in links[:-1] for serial in serials}
    assert tally.outputs == {(*links[-1], serial): 1 for serial in serials}
    # beside the steps a link carries its opening and its end, and no acknowledgement of a step
    assert all(tally.frames[link] <= TOKENS + 4 for link in links)
    assert all(
        tally.frames[there, back] <= 4 for back, there in links[:-1] if (back, there) not in links
    )
