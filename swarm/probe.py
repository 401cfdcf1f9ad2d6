"""How far a peer is: the round trip of a small frame, answered by the peer's program itself.

1. Measuring ends within its deadline: with the samples it has, or with Unreachable.
2. An answer that is not the one asked for is the peer's fault.
3. One stream makes a peer answer a bounded number of frames, each after a bounded wait.
"""

from statistics import median

import trio

from swarm.errors import PeerFault, Unreachable
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import Frame, Limits

PROBE_PROTOCOL = "/swarm/probe/1"

_ROUNDS = 5  # the median then ignores two stalls
_MOST_ECHOES = 64
_IDLE_SECONDS = 10.0
_LIMITS = Limits(frame_bytes=256, header_bytes=256, tensors=0)


def serve_probe(host: Host) -> None:
    """Answer the probes of others from now on."""
    host.serve(PROBE_PROTOCOL, _echo)


async def measure_round_trip(
    host: Host, peer: str, *, within: float, rounds: int = _ROUNDS
) -> float:
    """Return the seconds from a frame's sending to its echo: the median of a few over one stream.

    Unreachable if no echo came within `within` seconds, or the stream ended; PeerFault for a
    wrong echo. The first echo pays for opening the stream and is counted only if `rounds` is 0.
    """
    samples: list[float] = []
    with trio.move_on_after(within):
        stream = MessageStream(await host.open(peer, PROBE_PROTOCOL, within=within), _LIMITS)
        try:
            for number in range(rounds + 1):
                sent = trio.current_time()
                await stream.send_frame(Frame({"round": number}))
                answer = await stream.receive_frame()
                if answer.header.get("round") != number:
                    raise PeerFault(f"{peer} did not echo a probe")
                samples.append(trio.current_time() - sent)
        finally:
            await stream.close()
    if len(samples) < min(rounds + 1, 2):
        raise Unreachable(f"{peer} did not echo a probe within {within:g} seconds")
    return median(samples[1:] or samples)


async def _echo(stream: Stream) -> None:
    messages = MessageStream(stream, _LIMITS)
    for _ in range(_MOST_ECHOES):
        frame = await messages.receive_frame(within=_IDLE_SECONDS)
        match frame.header.get("round"):
            case int(number):
                await messages.send_frame(Frame({"round": number}))
            case _:
                raise PeerFault(f"{stream.peer} sent a probe without its round")
