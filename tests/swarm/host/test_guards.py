"""Nothing that a stranger or a hostile peer sends harms the host or its other peers."""

import logging
import os
from collections.abc import Awaitable, Callable

import pytest
import trio
from host_attacks import link_of, muxer_of, stranger_at, tcp_to, varint, write_frame
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
from libp2p.network.connection.exceptions import RawConnError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.exceptions import MuxedStreamError

from swarm.errors import Unreachable
from swarm.gate import proof
from swarm.host import host as host_module
from swarm.host import link, settings
from swarm.host.negotiation import line, proposal
from swarm.host.sockets import Tcp
from swarm.identity import new_identity
from swarm.transport import Host, Stream

GOSSIP = "/meshsub/1.1.0"
Attack = Callable[[Host, Host], Awaitable[None]]


def withstands(attack: Attack) -> None:
    """Run an attack on a host and then see that it still serves an honest peer.

    The attack gets a proved attacker's host and the victim.
    """

    async def main(make: Hosts) -> None:
        attacker, victim, honest = await make(), await make(), await make()
        acquaint(attacker, victim, honest)
        victim.serve(ECHO, echo)
        held = await honest.open(victim.peer, ECHO, within=SOON)
        await held.send_all(b"before")
        assert await receive_exactly(held, 6) == b"before"
        await attacker.dial(victim.peer, within=SOON)
        await attack(attacker, victim)
        await held.send_all(b"after")
        assert await receive_exactly(held, 5) == b"after"
        fresh = await honest.open(victim.peer, ECHO, within=SOON)
        await fresh.send_all(b"fresh")
        assert await receive_exactly(fresh, 5) == b"fresh"

    QUIET.run(main)


async def ends(tcp: Tcp) -> None:
    """Read until the other side has closed the connection."""
    with trio.fail_after(SOON):
        try:
            while True:
                await tcp.read()
        except RawConnError:
            return


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xfe\xfd" * 10,
        b"GET / HTTP/1.1\r\n\r\n",
        proposal("/noise")[:20] + b"\x05\xff\xfe\xfd\n",
        line(b"/multistream/1.0.0") + b"\xff\xff\xff\xff\x7f",
        (line(b"/multistream/1.0.0") + line(b"/tls/1.0.0") * 20),
        proposal("/noise") + b"\x00\x20" + os.urandom(32) + b"\xff" * 70_000,
        proposal("/noise") + b"\x00\x00" * 1000,
    ],
)
def test_malformed_bytes_before_the_handshake_end_that_connection_only(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "HANDSHAKE_SECONDS", 1.5)  # for those that could still go on

    async def attack(_attacker: Host, victim: Host) -> None:
        tcp = await tcp_to(victim)
        try:
            await tcp.write(said)
            await ends(tcp)
        except RawConnError:
            pass  # it was quicker than our writing
        finally:
            tcp.shut()

    withstands(attack)


def test_silent_connections_do_not_lock_honest_peers_out() -> None:
    async def attack(_attacker: Host, victim: Host) -> None:
        silent = [await tcp_to(victim) for _ in range(settings.MOST_STRANGERS + 20)]
        with trio.fail_after(5):  # sooner than for their silence
            async with trio.open_nursery() as nursery:
                for tcp in silent[:20]:  # the oldest had to make room
                    nursery.start_soon(ends, tcp)
        for tcp in silent:
            tcp.shut()

    withstands(attack)


def test_a_stranger_that_does_not_prove_the_secret_is_disconnected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "HANDSHAKE_SECONDS", 0.3)

    async def main(make: Hosts) -> None:
        victim = await make()
        async with stranger_at(victim) as stranger:
            with trio.fail_after(SOON):
                await stranger.mux.event_closed.wait()
        assert not victim.links()

    QUIET.run(main)


def test_a_stranger_is_not_served_not_listed_and_hears_no_gossip() -> None:
    async def main(make: Hosts) -> None:
        victim = await make()
        served: list[Stream] = []

        async def note(stream: Stream) -> None:
            served.append(stream)

        victim.serve(ECHO, note)
        await victim.subscribe("news", lambda _: True)
        async with stranger_at(victim) as stranger:
            for protocol in (ECHO, GOSSIP):
                muxed = await stranger.mux.open_stream()
                await muxed.write(proposal(protocol) + b"hello")
                answer = await muxed.read(1000)
                assert answer.endswith(line(b"na"))
            await victim.publish("news", b"for members")
            with trio.move_on_after(0.5) as waited:
                await stranger.mux.accept_stream()
            assert waited.cancelled_caught
        assert not served
        assert not victim.links()

    LIBP2P.run(main)


def test_a_stranger_that_replays_the_proof_of_a_member_stays_out() -> None:
    async def main(make: Hosts) -> None:
        victim = await make()
        member = new_identity().peer
        async with stranger_at(victim) as stranger:
            muxed = await stranger.mux.open_stream()
            shown = proof(SECRET, member, victim.peer, "dialler")
            await muxed.write(proposal("/swarm/gate/1") + shown)
            with trio.fail_after(SOON):
                await stranger.mux.event_closed.wait()
        assert not victim.links()

    QUIET.run(main)


def test_a_stranger_that_talks_instead_of_proving_is_disconnected() -> None:
    async def main(make: Hosts) -> None:
        victim = await make()
        async with stranger_at(victim) as stranger:
            # sooner than for its silence
            with pytest.raises(Exception, match="closed"), trio.fail_after(5):  # noqa: PT012
                while True:
                    await write_frame(stranger.mux, 0, 1, stranger.mux.next_stream_id, bytes(60000))
                    stranger.mux.next_stream_id += 2
        assert not victim.links()

    QUIET.run(main)


@pytest.mark.parametrize(
    "said", [b"\xff\xfe\xfd\n", b"\x05\xff\xfe\xfd\n\n" * 4, line(b"/multistream/1.0.0") + b"\x00"]
)
def test_a_malformed_line_on_a_stream_ends_that_stream_only(said: bytes) -> None:
    async def attack(attacker: Host, victim: Host) -> None:
        muxed = await muxer_of(attacker, victim.peer).open_stream()
        await muxed.write(said)
        with trio.fail_after(SOON):
            try:
                while True:
                    await muxed.read(1000)
            except MuxedStreamError:
                pass
        assert victim.peer in attacker.links()

    withstands(attack)


def _bad_messages() -> list[bytes]:
    forged = rpc_pb2.RPC()
    message = forged.publish.add()
    message.topicIDs.append("news")
    message.data, message.from_id, message.seqno = b"x", b"\xff" * 5, b"1"
    message.key, message.signature = b"\x08\x09\x12\x01z", b"no"
    control = rpc_pb2.RPC()
    control.control.graft.add().topicID = "nowhere"
    control.control.prune.add().topicID = "nowhere"
    control.control.iwant.add().messageIDs.append(b"zz")
    return [b"\xff" * 40, forged.SerializeToString(), control.SerializeToString()]


@pytest.mark.parametrize("message", _bad_messages(), ids=["garbage", "forged", "control"])
def test_malformed_gossip_does_not_end_the_gossip_of_others(message: bytes) -> None:
    async def main(make: Hosts) -> None:
        attacker, victim, honest = await make(), await make(), await make()
        acquaint(attacker, victim, honest)
        await attacker.dial(victim.peer, within=SOON)
        await honest.dial(victim.peer, within=SOON)
        received = await victim.subscribe("news", lambda _: True)
        for _ in range(3):
            stream = await attacker.open(victim.peer, GOSSIP, within=SOON)
            await stream.send_all(varint(len(message)) + message)
        with trio.fail_after(SOON):
            while not received.statistics().current_buffer_used:
                await honest.publish("news", b"true")
                await trio.sleep(0.2)
        assert received.receive_nowait() == b"true"

    LIBP2P.run(main)


def test_a_check_that_fails_denies_the_message_and_harms_nobody() -> None:
    async def main(make: Hosts) -> None:
        here, there = await make(), await make()
        acquaint(here, there)
        await here.dial(there.peer, within=SOON)

        def check(data: bytes) -> bool:
            return 1 / (len(data) - 3) > 0

        received = await there.subscribe("news", check)
        with trio.fail_after(SOON):
            while not received.statistics().current_buffer_used:
                await here.publish("news", b"bad")
                await here.publish("news", b"good")
                await trio.sleep(0.2)
        assert received.receive_nowait() == b"good"

    LIBP2P.run(main)


def test_who_ignores_the_window_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MOST_UNREAD_BYTES", 2 << 20)

    async def attack(attacker: Host, victim: Host) -> None:
        async def never_read(_stream: Stream) -> None:
            await trio.sleep_forever()

        victim.serve("/test/deaf/1", never_read)
        stream = await attacker.open(victim.peer, "/test/deaf/1", within=SOON)
        await stream.send_all(b"hello")
        mux = muxer_of(attacker, victim.peer)
        sent = 0
        with pytest.raises(Exception, match="closed"), trio.fail_after(SOON):  # noqa: PT012
            while True:
                await write_frame(mux, 0, 0, mux.next_stream_id - 2, bytes(60000))
                sent += 60000
                assert sent < 64 << 20
        await until(lambda: attacker.peer not in victim.links())

    withstands(attack)


def test_streams_that_a_peer_opens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MOST_STREAMS_PER_LINK", 20)

    async def attack(attacker: Host, victim: Host) -> None:
        mux = muxer_of(attacker, victim.peer)
        most = 0
        for _ in range(500):
            await write_frame(mux, 1, 1, mux.next_stream_id, b"")
            mux.next_stream_id += 2
            most = max(most, link_of(victim, attacker.peer)._streams_of_peer)
        await until(lambda: len(muxer_of(victim, attacker.peer).streams) <= 20 + 10)
        assert most <= 20

    withstands(attack)


@pytest.mark.parametrize("kind", ["forged", "oversized", "unknown"])
def test_bytes_that_are_no_frame_end_that_link_only(kind: str) -> None:
    async def attack(attacker: Host, victim: Host) -> None:
        tie = link_of(attacker, victim.peer)
        if kind == "forged":
            await tie.tcp.write(b"\x00\x40" + os.urandom(64))
        elif kind == "oversized":
            await tie._sealed.write(b"\x00\x00\x00\x00\x00\x00\x00\x01\xff\xff\xff\xff")
        else:
            await tie._sealed.write(b"\x09\x09\xff\xff\x00\x00\x00\x01\xff\xff\xff\xff" * 50)
            return
        await until(lambda: attacker.peer not in victim.links())

    withstands(attack)


def test_a_handlers_bug_is_logged_and_a_peers_fault_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def attack(attacker: Host, victim: Host) -> None:
        async def stumble(_stream: Stream) -> None:
            raise ZeroDivisionError("a bug of ours")

        async def complain(_stream: Stream) -> None:
            raise Unreachable("they left")

        victim.serve("/test/stumble/1", stumble)
        victim.serve("/test/complain/1", complain)
        for protocol in ("/test/stumble/1", "/test/complain/1"):
            stream = await attacker.open(victim.peer, protocol, within=SOON)
            assert await receive_to_end(stream) == b""

    with caplog.at_level(logging.INFO):
        withstands(attack)
    assert "a bug of ours" in caplog.text
    assert "they left" not in caplog.text


def test_libp2p_logs_nothing_of_what_peers_do() -> None:
    for name in ("libp2p", "libp2p.stream_muxer.yamux.yamux", "libp2p.pubsub.pubsub"):
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)


def test_another_version_of_libp2p_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "LIBP2P_VERSION", "0.9.0")
    with pytest.raises(RuntimeError, match=r"0\.9\.0"):
        settings.check_version()


def test_the_links_of_one_peer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MOST_LINKS_PER_PEER", 2)

    async def attack(attacker: Host, victim: Host) -> None:
        assert isinstance(attacker, host_module.Libp2pHost)
        assert isinstance(victim, host_module.Libp2pHost)
        address = attacker._book[victim.peer][0]
        for _ in range(5):
            await attacker._attempt(victim.peer, address)
        await until(lambda: len(victim._links[attacker.peer]) == 2)

    withstands(attack)
