"""Events carried to the client: as a stream while they come, or as one object at the end.

1. A stream begins when an answer has a route: until then what fails has a status of its own.
2. While nothing is said comments keep the connection: during prefill and repairs.
3. What came meanwhile goes out in one write.
"""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import trio

from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import fault_of
from swarm.gateway.replies import Writer
from swarm.gateway.speaking import Event, Failed
from swarm.gateway.speech import Ended, Opened, Piece

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

Framing = Callable[[dict[str, Any]], bytes]
Events = trio.MemoryReceiveChannel[Event]


def plain_frame(chunk: dict[str, Any]) -> bytes:
    """One chunk as an event without a name, as OpenAI's completions have it."""
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def named_frame(chunk: dict[str, Any]) -> bytes:
    """One chunk as an event named after its `type`."""
    return b"event: " + str(chunk["type"]).encode() + b"\n" + plain_frame(chunk)


async def collect(events: Events, count: int, writer: Writer) -> dict[str, Any]:
    """Return the whole object. ApiError if an answer fails."""
    while count:
        event = await events.receive()
        for _ in chunks_of(event, writer):
            pass
        count -= isinstance(event, Ended)
    return writer.whole()


async def stream(
    exchange: Exchange,
    events: Events,
    count: int,
    writer: Writer,
    *,
    keep_alive_seconds: float,
    frame: Framing = plain_frame,
    last: bytes = DONE,
) -> None:
    """Send the stream. ApiError if an answer fails, before the stream or in it."""
    event = await events.receive()
    if isinstance(event, Failed):
        raise fault_of(event.error, event.spans)
    await exchange.begin_stream()
    while True:
        data = bytearray()
        try:
            while True:
                for chunk in chunks_of(event, writer):
                    data += frame(chunk)
                count -= isinstance(event, Ended)
                event = events.receive_nowait()
        except trio.WouldBlock:
            pass
        finally:
            if data:
                await exchange.push(bytes(data))
        if not count:
            break
        event = await _next(exchange, events, keep_alive_seconds)
    rest = b"".join(frame(chunk) for chunk in writer.finished())
    if rest or last:
        await exchange.push(rest + last)
    await exchange.end_stream()


def chunks_of(event: Event, writer: Writer) -> Iterable[dict[str, Any]]:
    """Return what an event comes to. ApiError if it says that its answer failed."""
    match event:
        case Opened():
            return writer.opened(event)
        case Piece():
            return writer.piece(event)
        case Ended():
            return writer.ended(event)
        case Failed():
            raise fault_of(event.error, event.spans)


async def _next(exchange: Exchange, events: Events, keep_alive_seconds: float) -> Event:
    while True:
        with trio.move_on_after(keep_alive_seconds):
            return await events.receive()
        await exchange.push(KEEP_ALIVE)
