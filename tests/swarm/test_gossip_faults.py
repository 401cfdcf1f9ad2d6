"""Gossip among peers that lie, and the tables that others fetch."""

import pytest
import trio
from gossiping import (
    IDENTITIES,
    SECRET,
    SWARM_ID,
    TOPIC,
    Member,
    members_that_know_each_other,
    record,
    run,
    until,
)

from swarm.errors import PeerFault, Unreachable
from swarm.identity import Identity
from swarm.memory import MemoryNetwork
from swarm.peers import MOST_PEERS, PeerTable
from swarm.record import open_record, sign_record
from swarm.tables import MOST_AVOIDED, MOST_KNOWN, PEERS_PROTOCOL, fetch_table
from swarm.transport import MessageStream, Stream
from swarm.wire import Frame


def test_a_damaged_record_neither_enters_nor_spreads() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 3)
        stranger = IDENTITIES[10]
        damaged = bytearray(sign_record(record(stranger), stranger))
        damaged[-1] ^= 1
        evil = network.attach("evil", SECRET)
        evil.learn(members[0].peer, members[0].host.addresses)
        await evil.dial(members[0].peer, within=1.0)
        for data in (bytes(damaged), b"", b"\xc1", b"x" * 5000):
            await evil.publish(TOPIC, data)
        foreign = record(stranger, fingerprint="cd" * 32)
        await evil.publish(TOPIC, sign_record(foreign, stranger))
        await trio.sleep(1.0)
        for member in members:
            assert member.table.record_of(stranger.peer) is None
        await evil.publish(TOPIC, sign_record(record(stranger), stranger))
        await until(lambda: all(m.table.record_of(stranger.peer) for m in members), within=1.0)

    run(body)


def test_neither_a_replayed_record_nor_one_of_another_model_is_passed_on() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        passed: list[bytes] = []

        def note(data: bytes) -> bool:
            passed.append(data)
            return True

        listener = network.attach("listener", SECRET)
        listener.learn(other.peer, other.host.addresses)
        await listener.dial(other.peer, within=1.0)
        await listener.subscribe(TOPIC, note)
        evil = network.attach("evil", SECRET)
        evil.learn(other.peer, other.host.addresses)
        await evil.dial(other.peer, within=1.0)
        old = sign_record(record(one.identity, sequence=1), one.identity)
        stranger = IDENTITIES[10]
        foreign = sign_record(record(stranger, fingerprint="cd" * 32), stranger)
        fresh = sign_record(record(stranger), stranger)
        for data in (old, foreign, fresh):
            await evil.publish(TOPIC, data)
        await trio.sleep(0.5)
        assert passed == [fresh]

    run(body)


def test_a_client_gets_a_table_from_one_peer_with_ages() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 4)
        client = network.attach("client", SECRET, is_listening=False)
        client.learn(members[0].peer, members[0].host.addresses)
        await trio.sleep(3.0)
        view, held = await fetch_table(client, members[0].peer, 2.0)
        assert held == 4
        assert {open_record(data).peer for data, _ in view} == {m.peer for m in members}
        now = trio.current_time()
        table = PeerTable(SWARM_ID)
        assert all(table.add(data, now, age) for data, age in view)
        assert all(0 <= age < 10 for _, age in view)
        assert members[0].heard[-1][0] != "client"

    run(body)


def test_a_table_of_hundreds_of_peers_comes_in_pages() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = Member(network, IDENTITIES[0], nursery)
        many = [Identity(number.to_bytes(2, "big") * 16) for number in range(400)]
        for identity in many:
            member.table.add(sign_record(record(identity, name="x" * 128), identity), 0.0)
        client = network.attach("client", SECRET, is_listening=False)
        client.learn(member.peer, member.host.addresses)
        view, _ = await fetch_table(client, member.peer, 5.0)
        assert {open_record(data).peer for data, _ in view} == {i.peer for i in many}
        middle = sorted(identity.peer for identity in many)[199]
        rest, _ = await fetch_table(client, member.peer, 5.0, after=middle)
        assert len(rest) == 200

    run(body)


def test_a_client_does_not_wait_for_a_silent_peer_beyond_its_deadline() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = Member(network, IDENTITIES[0], nursery)
        client = network.attach("client", SECRET)
        client.learn(member.peer, member.host.addresses)
        await client.dial(member.peer, within=1.0)
        network.cut("client", member.peer)
        started = trio.current_time()
        with pytest.raises(Unreachable, match="within 2 seconds"):
            await fetch_table(client, member.peer, 2.0)
        assert trio.current_time() - started == pytest.approx(2.0)

    run(body)


GOOD = sign_record(record(IDENTITIES[9]), IDENTITIES[9])
LIES: list[dict[str, object]] = [
    {},
    {"records": "none"},
    {"records": [[GOOD, -1.0]]},
    {"records": [[GOOD, float("nan")]]},
    {"records": [[GOOD]]},
    {"records": [["text", 0.0]]},
    {"records": [], "following": "a"},
    {"records": [[GOOD, 0.0]], "following": 7},
    {"records": [[GOOD, 0.0]], "following": "same for ever"},
    {"records": [[b"", 0.0]] * (2 * MOST_PEERS + 1), "following": "z"},
]


@pytest.mark.parametrize("lie", LIES)
def test_a_malformed_or_endless_table_is_the_peers_fault(lie: dict[str, object]) -> None:
    async def lying(stream: Stream) -> None:
        messages = MessageStream(stream)
        while True:
            await messages.receive_frame()
            await messages.send_frame(Frame(lie))

    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        liar = network.attach("liar", SECRET)
        liar.serve(PEERS_PROTOCOL, lying)
        client = network.attach("client", SECRET)
        client.learn("liar", liar.addresses)
        with pytest.raises(PeerFault, match="liar"):
            await fetch_table(client, "liar", 5.0)

    run(body)


def test_a_liar_among_the_links_ends_no_loop_and_what_is_true_of_its_table_is_taken() -> None:
    damaged = bytearray(GOOD)
    damaged[-1] ^= 1
    answers = iter([{}, {"records": [[bytes(damaged), 0.0], [b"", 0.0], [GOOD, 5.0]]}])

    async def lying(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.receive_frame()
        await messages.send_frame(Frame(next(answers)))
        await trio.sleep(1.0)

    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = Member(network, IDENTITIES[0], nursery)
        liar = network.attach("liar", SECRET)
        liar.serve(PEERS_PROTOCOL, lying)
        member.host.learn("liar", liar.addresses)
        await member.host.dial("liar", within=1.0)
        await until(lambda: member.table.record_of(IDENTITIES[9].peer) is not None, within=5.0)
        assert len(member.table) == 1

    run(body)


ANOTHERS = sign_record(record(IDENTITIES[8]), IDENTITIES[8])


@pytest.mark.parametrize(
    "request_header",
    [
        {"after": 1},
        {"after": "x" * 200},
        {"own": "text"},
        {"own": b"junk"},
        {"own": ANOTHERS},
        {"is_view": 1},
        {"is_view": True, "known": ["peer"]},
        {"is_view": True, "known": {"peer": -1}},
        {"is_view": True, "known": {f"peer {n}": 1 for n in range(MOST_KNOWN + 1)}},
        {"is_view": True, "avoid": ["peer"] * (MOST_AVOIDED + 1)},
    ],
)
def test_a_malformed_request_ends_its_stream_and_nothing_else(
    request_header: dict[str, object],
) -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = Member(network, IDENTITIES[0], nursery)
        client = network.attach("client", SECRET)
        client.learn(member.peer, member.host.addresses)
        await trio.testing.wait_all_tasks_blocked()
        stream = MessageStream(await client.open(member.peer, PEERS_PROTOCOL, within=1.0))
        await stream.send_frame(Frame(request_header))
        with pytest.raises(Unreachable, match="closed"):
            await stream.receive_frame(within=1.0)
        await stream.close()
        assert member.table.record_of(IDENTITIES[8].peer) is None
        assert (await fetch_table(client, member.peer, 1.0)).is_empty

    run(body)
