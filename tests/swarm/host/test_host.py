"""Dialling, ports, addresses and what is left when a host has gone."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from host_attacks import link_of, muxer_of
from host_worlds import (
    ECHO,
    LIBP2P,
    QUIET,
    SECRET,
    SOON,
    Hosts,
    acquaint,
    echo,
    receive_exactly,
    receive_to_end,
    until,
)

from swarm.errors import BadInput, Refusal, SwarmError, Unreachable
from swarm.host import open_host
from swarm.host.sockets import parse_address
from swarm.identity import new_identity
from swarm.transport import Host, Stream


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of a socket to which one can connect, and which never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"


def closed_address() -> str:
    """The address of a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"/ip4/127.0.0.1/tcp/{port}"


def test_dead_addresses_before_a_good_one_do_not_hide_the_peer() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        with silent_server() as silent:
            here.learn(there.peer, [closed_address(), silent, "nonsense", *there.addresses])
            with trio.fail_after(3):
                await here.dial(there.peer, within=SOON)
        assert here.links() == {there.peer}

    QUIET.run(main)


def test_a_dial_to_a_silent_address_meets_its_deadline() -> None:
    async def main(make: Hosts) -> None:
        here, peer = await make(), new_identity().peer
        with silent_server() as silent:
            here.learn(peer, [silent])
            began = trio.current_time()
            with pytest.raises(Unreachable, match=r"within 0\.3 seconds"):
                await here.open(peer, ECHO, within=0.3)
            assert 0.2 < trio.current_time() - began < 2

    QUIET.run(main)


def test_a_closed_port_is_unreachable_at_once_and_named() -> None:
    async def main(make: Hosts) -> None:
        here, peer = await make(), new_identity().peer
        address = closed_address()
        here.learn(peer, [address])
        with pytest.raises(Unreachable, match=address):
            await here.dial(peer, within=SOON)

    QUIET.run(main)


def test_an_address_that_names_another_peer_is_passed_over() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        here.learn(new_identity().peer, there.addresses)
        peer = new_identity().peer
        here.learn(peer, there.addresses)
        with pytest.raises(Unreachable, match="no address"):
            await here.dial(peer, within=SOON)

    QUIET.run(main)


@pytest.mark.parametrize(
    "text",
    ["", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3.4/tcp/65536", "/ip4/a/b/tcp/1", "x\x00"],
)
def test_what_is_no_address_is_not_dialled(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize("text", ["/ip4/1.2.3.4/tcp/4001", "/dns4/a.example/tcp/1/p2p/12D3KooW"])
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_address(text)) == text


def test_one_stream_more_than_the_muxer_allows_waits_for_its_deadline_only() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        there.serve(ECHO, echo)
        held = [await here.open(there.peer, ECHO, within=SOON) for _ in range(256)]
        with pytest.raises(Unreachable, match="gave no stream"):
            await here.open(there.peer, ECHO, within=0.2)
        await held[0].close()
        stream = await here.open(there.peer, ECHO, within=SOON)
        await stream.send_all(b"room again")
        assert await receive_exactly(stream, 10) == b"room again"

    QUIET.run(main)


def test_closed_streams_leave_nothing_in_the_muxers() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)

        async def answer(stream: Stream) -> None:
            await stream.receive_some()
            await stream.send_all(bytes(1000))

        there.serve("/test/answer/1", answer)
        for number in range(300):
            stream = await here.open(there.peer, "/test/answer/1", within=SOON)
            if number % 3:
                await stream.send_all(b"hello")
            if number % 3 == 2:
                await receive_to_end(stream)
            await stream.close()
        mux, other = muxer_of(here, there.peer), muxer_of(there, here.peer)
        await until(lambda: not mux.streams and not other.streams)
        for side in (mux, other):
            assert not side.stream_buffers
            assert not side.stream_events
        assert mux.stream_backlog_semaphore.value == 256
        assert link_of(there, here.peer)._streams_of_peer == 0

    QUIET.run(main)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system lacks it")
def test_a_silent_death_is_noticed_by_the_kernel_on_dialled_and_accepted_sockets() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        await here.dial(there.peer, within=SOON)
        await until(lambda: bool(there.links()))
        for host, peer in ((here, there.peer), (there, here.peer)):
            sock = link_of(host, peer).tcp._sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    QUIET.run(main)


def test_a_broken_link_is_dialled_anew_by_the_next_open() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        there.serve(ECHO, echo)
        stream = await here.open(there.peer, ECHO, within=SOON)
        await stream.send_all(b"one")
        assert await receive_exactly(stream, 3) == b"one"
        link_of(here, there.peer).shut()
        again = await here.open(there.peer, ECHO, within=SOON)
        await again.send_all(b"two")
        assert await receive_exactly(again, 3) == b"two"
        with pytest.raises(Unreachable):
            await stream.receive_some()

    QUIET.run(main)


def test_a_port_in_use_is_said_so() -> None:
    async def main() -> None:
        async with open_host(new_identity(), SECRET, gossip=False) as host:
            address = parse_address(host.addresses[0])
            assert address is not None
            with pytest.raises(BadInput, match=f"port {address.port} is in use") as caught:
                async with open_host(new_identity(), SECRET, port=address.port):
                    pass
            assert "--port" in caught.value.next_step

    trio.run(main)


def test_a_host_on_all_interfaces_names_each_and_those_announced_first() -> None:
    async def main() -> None:
        identity = new_identity()
        announced = "/dns4/swarm.example/tcp/4001"
        async with open_host(
            identity, SECRET, listen="0.0.0.0", announce=[announced], gossip=False
        ) as host:
            assert host.addresses[0] == f"{announced}/p2p/{identity.peer}"
            assert any(a.startswith("/ip4/127.0.0.1/tcp/") for a in host.addresses)
            assert not any("0.0.0.0" in address for address in host.addresses)
            assert all(a.endswith(f"/p2p/{identity.peer}") for a in host.addresses)

    trio.run(main)


def test_a_malformed_announced_address_is_bad_input() -> None:
    async def main() -> None:
        with pytest.raises(BadInput, match="nowhere"):
            async with open_host(new_identity(), SECRET, announce=["nowhere"]):
                pass

    trio.run(main)


def test_a_host_that_only_dials_has_no_address_and_is_served() -> None:
    async def main(make: Hosts) -> None:
        there = await make()
        there.serve(ECHO, echo)
        async with open_host(new_identity(), SECRET, listen=None, gossip=False) as here:
            assert here.addresses == ()
            here.learn(there.peer, there.addresses)
            stream = await here.open(there.peer, ECHO, within=SOON)
            await stream.send_all(b"hello")
            assert await receive_exactly(stream, 5) == b"hello"
            with pytest.raises(SwarmError, match="without gossip"):
                await here.publish("news", b"x")

    QUIET.run(main)


def test_gossip_passes_by_a_host_that_takes_no_part() -> None:
    async def main(make: Hosts) -> None:
        one, two = await make(), await make()
        async with open_host(new_identity(), SECRET, gossip=False) as quiet:
            acquaint(one, two, quiet)
            for peer in (quiet.peer, two.peer):
                await one.dial(peer, within=SOON)
            received = await two.subscribe("news", lambda _: True)
            with trio.fail_after(SOON):
                while not received.statistics().current_buffer_used:
                    await one.publish("news", b"hello")
                    await trio.sleep(0.2)
            assert quiet.links() == {one.peer}

    LIBP2P.run(main)


@pytest.mark.parametrize("error", [Refusal("no"), ValueError("a bug"), KeyboardInterrupt()])
def test_what_the_block_raises_comes_out_as_it_was_raised(error: BaseException) -> None:
    async def main() -> None:
        async with open_host(new_identity(), SECRET):
            raise error

    with pytest.raises(type(error)) as caught:
        trio.run(main)
    assert caught.value is error


def test_a_host_that_is_cancelled_ends_at_once() -> None:
    async def main() -> None:
        with trio.move_on_after(0.2) as scope:
            async with open_host(new_identity(), SECRET):
                await trio.sleep_forever()
        assert scope.cancelled_caught

    trio.run(main)


def test_no_descriptor_task_or_thread_outlives_a_host() -> None:
    async def visit() -> None:
        async with (
            open_host(new_identity(), SECRET) as here,
            open_host(new_identity(), SECRET) as there,
        ):
            acquaint(here, there)
            there.serve(ECHO, echo)
            stream = await here.open(there.peer, ECHO, within=SOON)
            await stream.send_all(b"hello")
            await stream.receive_some()

    async def main() -> None:
        await visit()
        tasks, descriptors = trio.lowlevel.current_statistics().tasks_living, _descriptors()
        threads = threading.active_count()
        for _ in range(3):
            await visit()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert _descriptors() == descriptors
        assert threading.active_count() == threads

    trio.run(main)


@pytest.mark.slow
def test_a_reader_that_stops_reading_loses_the_stream_not_the_link() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        there.serve(ECHO, echo)

        async def stop_reading(_stream: Stream) -> None:
            await trio.sleep_forever()

        there.serve("/test/stop/1", stop_reading)
        stream = await here.open(there.peer, "/test/stop/1", within=SOON)
        with trio.fail_after(SOON), pytest.raises(Unreachable):
            await stream.send_all(bytes(4 << 20))
        good = await here.open(there.peer, ECHO, within=SOON)
        await good.send_all(b"fine")
        assert await receive_exactly(good, 4) == b"fine"

    QUIET.run(main)


@pytest.mark.slow
def test_three_hundred_links_come_and_go_and_the_next_is_still_accepted() -> None:
    async def main(make: Hosts) -> None:
        there = await make()
        there.serve(ECHO, echo)
        descriptors = _descriptors()
        for _ in range(300):  # libp2p's own swarm is deaf after 250
            await _visit(there)
        await until(lambda: not there.links())
        assert _descriptors() <= descriptors + 2

    QUIET.run(main)


async def _visit(there: Host) -> None:
    async with open_host(new_identity(), SECRET, listen=None, gossip=False) as here:
        here.learn(there.peer, there.addresses)
        stream = await here.open(there.peer, ECHO, within=SOON)
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (a Path would open one more)
