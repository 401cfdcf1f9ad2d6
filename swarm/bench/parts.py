"""What a token's links and frames take, found out beside the tokens themselves.

1. A link that nobody measured nor can predict counts nothing, and says so.
2. Frames are of the kinds and sizes that the route carries; the last one is a real answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from routing.cost import CLIENT
from swarm.bench.rows import CodecSeconds
from swarm.client import Client
from swarm.messages import Message, Output, Step, Wish, pack, unpack
from swarm.wire import DTYPE_BYTES, Decoder, Tensor, encode

_ROUNDS = 5  # the median then ignores two stalls
_TIMES = 50  # in a round: one frame takes microseconds

Source = Literal["measured", "predicted", "unknown"]


@dataclass(frozen=True, slots=True)
class LinkTime:
    """One link of a route, one way. The client's name is empty."""

    origin: str
    peer: str
    seconds: float
    source: Source

    def facts(self) -> dict[str, Any]:
        """The link as --json prints it."""
        ends = {"from": self.origin or "client", "to": self.peer or "client"}
        return {**ends, "one_way_ms": self.seconds * 1000, "source": self.source}


def link_times(client: Client, peers: Sequence[str]) -> list[LinkTime]:
    """Return the links from the client over these peers and back to it."""
    told = {record.peer: record.coordinate for record in client.records()}
    places = {peer: place for peer, place in told.items() if place is not None}
    links = client.whereabouts.links(places, 0.0)
    found: list[LinkTime] = []
    for origin, peer in pairwise((CLIENT, *peers, CLIENT)):
        seconds = links.one_way_seconds(origin, peer)
        source: Source = "predicted" if seconds else "unknown"
        if links.measured.is_measured(origin, peer):
            source = "measured"
        found.append(LinkTime(origin, peer, seconds, source))
    return found


def codec_seconds(
    client: Client, route: Sequence[tuple[str, str]], wish: Wish, output: Output
) -> CodecSeconds:
    """Time the frames of one decode step over this route (peer, span), ended by this answer."""
    steps = [_step(0, wish, {"ids": Tensor("int32", (1, 1), bytes(4))}, output)]
    for number, (peer, _) in enumerate(route[:-1], start=1):
        record = client.record_of(peer)
        dtype = record.dtype if record and record.dtype in DTYPE_BYTES else "float32"
        size = client.model.card.hidden_size
        hidden = Tensor(dtype, (1, 1, size), bytes(size * DTYPE_BYTES[dtype]))
        steps.append(_step(number, wish, {"hidden": hidden}, output))
    made = [_make_seconds(step) for step in steps]
    read = [_read_seconds(step) for step in steps]
    answered = _make_seconds(output), _read_seconds(output)
    return CodecSeconds(client=made[0] + answered[1], hops=sum(made[1:]) + sum(read) + answered[0])


def _step(hops: int, wish: Wish, payload: dict[str, Tensor], output: Output) -> Step:
    """The step that led to this answer, as it looks after so many hops."""
    return Step(
        serial=output.serial,
        after=output.serial - 1,
        start=output.start,
        wanted="last",
        wish=wish,
        times=output.times[:hops],
        payload=payload,
    )


def _make_seconds(message: Message) -> float:
    return _seconds(lambda: encode(pack(message)))


def _read_seconds(message: Message) -> float:
    data = encode(pack(message))
    return _seconds(lambda: [unpack(frame) for frame in Decoder().feed(data)])


def _seconds(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(_TIMES):
            work()
        taken.append((time.perf_counter() - began) / _TIMES)
    return median(taken)
