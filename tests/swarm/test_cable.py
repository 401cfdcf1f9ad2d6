"""A cut cable is silent for both sides, and mends."""

import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from swarm.cable import LOOPBACK, Cable, is_owner_known, owner_of, relay

QUIET_SECONDS = 0.05  # far longer than a byte takes over loopback


@asynccontextmanager
async def relayed(
    cable: Cable,
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    caller: Cable | None = None,
) -> AsyncIterator[int]:
    """A server behind a relay; gives the relay's port."""
    async with trio.open_nursery() as nursery:
        (server,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        (front,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        port = server.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, handler, [server])
        nursery.start_soon(relay, front, port, cable, lambda _port, _remote: caller)
        yield front.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def hears_nothing(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(QUIET_SECONDS) as scope:
        await stream.receive_some()
    return scope.cancelled_caught


async def received(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(5):
        while len(data) < count:
            data += await stream.receive_some()
    return data


@pytest.mark.parametrize("is_the_callers", [False, True])
def test_what_is_said_over_a_cut_cable_arrives_in_order_when_it_is_mended(
    is_the_callers: bool,
) -> None:
    async def main() -> None:
        own, caller = Cable(), Cable()
        async with (
            relayed(own, echo, caller) as port,
            await trio.open_tcp_stream(LOOPBACK, port) as stream,
        ):
            await stream.send_all(b"one")
            assert await received(stream, 3) == b"one"
            cut = caller if is_the_callers else own
            cut.cut()
            await stream.send_all(b"two")
            assert await hears_nothing(stream)
            await stream.send_all(b"three")
            cut.mend()
            assert await received(stream, 8) == b"twothree"

    trio.run(main)


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_server_that_ends_behind_a_cut_cable_is_not_heard_to_end(is_reset: bool) -> None:
    async def main() -> None:
        cable, is_to_end = Cable(), trio.Event()

        async def end(stream: trio.SocketStream) -> None:
            await is_to_end.wait()
            if is_reset:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        async with (
            relayed(cable, end) as port,
            await trio.open_tcp_stream(LOOPBACK, port) as stream,
        ):
            await wait_all_tasks_blocked(QUIET_SECONDS)
            cable.cut()
            is_to_end.set()
            assert await hears_nothing(stream)
            cable.mend()
            with trio.fail_after(5):
                assert await stream.receive_some() == b""

    trio.run(main)


def test_a_dialler_behind_a_cut_cable_gets_no_answer_and_no_refusal() -> None:
    async def main() -> None:
        cable = Cable()
        cable.cut()
        async with (
            relayed(cable, echo) as port,
            await trio.open_tcp_stream(LOOPBACK, port) as stream,
        ):
            await stream.send_all(b"hello")
            assert await hears_nothing(stream)

    trio.run(main)


def test_a_dead_server_behind_a_whole_cable_ends_the_connection_at_once() -> None:
    async def main() -> None:
        (gone,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        port = gone.socket.getsockname()[1]
        await gone.aclose()
        (front,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, front, port, Cable(), lambda _port, _remote: None)
            here = front.socket.getsockname()[1]
            with trio.fail_after(5):
                async with await trio.open_tcp_stream(LOOPBACK, here) as stream:
                    assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.skipif(not is_owner_known(), reason="the system does not tell who holds a socket")
def test_the_owner_of_a_socket_is_found_among_processes() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        remote = server.getsockname()[1]
        with socket.create_connection((LOOPBACK, remote)) as client:
            port = client.getsockname()[1]
            assert owner_of(port, remote, [os.getppid(), os.getpid()]) == os.getpid()
            assert owner_of(port, remote, [os.getppid()]) is None
        assert owner_of(1, 1, [os.getpid()]) is None
