"""What a hostile peer may do: everything that TCP, Noise and the muxer let through."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from swarm.host.handshake import Connection, Handshaker
from swarm.host.host import Libp2pHost
from swarm.host.sockets import Tcp, connect, parse_address
from swarm.identity import new_identity
from swarm.transport import Host


async def tcp_to(host: Host) -> Tcp:
    """Connect, and say nothing."""
    address = parse_address(host.addresses[0])
    assert address is not None
    return await connect(address)


@asynccontextmanager
async def stranger_at(host: Host) -> AsyncIterator[Connection]:
    """A peer with a key but without the secret, whose muxer runs."""
    connection = await Handshaker(new_identity()).dial(await tcp_to(host), host.peer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.mux.start)
        await trio.lowlevel.checkpoint()
        yield connection
        nursery.cancel_scope.cancel()
    connection.tcp.shut()


def link_of(host: Host, peer: str) -> Any:
    """The newest link of a host, to be misused or looked at."""
    assert isinstance(host, Libp2pHost)
    return host._links[peer][-1]


def muxer_of(host: Host, peer: str) -> Any:
    """The muxer of a host's newest link, to be misused or looked at."""
    return link_of(host, peer)._mux


async def write_frame(mux: Any, kind: int, flags: int, stream: int, data: bytes) -> None:
    """Write any muxer frame, whatever the windows say."""
    await mux._write_frame(struct.pack("!BBHII", 0, kind, flags, stream, len(data)) + data)


def varint(number: int) -> bytes:
    """Encode a length as protobuf does."""
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])
