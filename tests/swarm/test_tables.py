"""Tables on the wire: views for clients, pages for those who serve and for older programs."""

import trio
from gossiping import IDENTITIES, SECRET, Member, record, run

from swarm.identity import Identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.record import open_record, sign_record
from swarm.tables import MOST_AVOIDED, MOST_KNOWN, PEERS_PROTOCOL, fetch_table, fetch_view
from swarm.transport import MessageStream, Stream
from swarm.wire import Frame

MANY = [Identity(number.to_bytes(2, "big") * 16) for number in range(1, 401)]


def client_of(network: MemoryNetwork, *members: Member) -> MemoryHost:
    client = network.attach("client", SECRET, is_listening=False)
    for member in members:
        client.learn(member.peer, member.host.addresses)
    return client


async def member_that_knows(
    network: MemoryNetwork, nursery: trio.Nursery, many: list[Identity]
) -> Member:
    member = Member(network, IDENTITIES[0], nursery)
    for identity in many:
        facts = {"span": "0:8", "free_tokens": 1000, "valid_seconds": 100.0}
        member.table.add(sign_record(record(identity, **facts), identity), trio.current_time())
    await trio.testing.wait_all_tasks_blocked()
    return member


def test_a_view_of_a_large_table_is_small_and_the_next_one_holds_only_what_is_new() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = await member_that_knows(network, nursery, MANY)
        client = client_of(network, member)
        first = await fetch_view(client, member.peer, 2.0, known={})
        assert 4 <= len(first.records) <= 8
        assert first.held == len(MANY)
        known = {open_record(data).peer: open_record(data).sequence for data, _ in first.records}
        second = await fetch_view(client, member.peer, 2.0, known=known)
        assert second.records == []
        assert not second.is_empty
        others = await fetch_view(client, member.peer, 2.0, known=known, avoid=known)
        assert 4 <= len(others.records) <= 8
        assert not {open_record(data).peer for data, _ in others.records} & set(known)

    run(body)


def test_a_newcomers_table_is_empty_whether_asked_for_all_or_for_a_view() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = await member_that_knows(network, nursery, [])
        client = client_of(network, member)
        assert (await fetch_table(client, member.peer, 2.0)).is_empty
        assert (await fetch_view(client, member.peer, 2.0, known={"somebody": 1})).is_empty

    run(body)


def test_more_known_and_avoided_than_a_request_takes_are_left_out() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = await member_that_knows(network, nursery, MANY[:10])
        client = client_of(network, member)
        known = {f"stranger {n}": 1 for n in range(MOST_KNOWN)} | {MANY[0].peer: 1}
        avoid = [f"stranger {n}" for n in range(MOST_AVOIDED + 10)]
        view = await fetch_view(client, member.peer, 2.0, known=known, avoid=avoid)
        assert len(view.records) == 10

    run(body)


def test_an_older_client_gets_pages_of_the_whole_table() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        member = await member_that_knows(network, nursery, MANY)
        client = client_of(network, member)
        stream = MessageStream(await client.open(member.peer, PEERS_PROTOCOL, within=1.0))
        after, found = "", 0
        while True:
            await stream.send_frame(Frame({"after": after, "own": b""}))
            header = (await stream.receive_frame(within=1.0)).header
            found += len(header["records"])
            after = header["following"]
            if not after:
                break
        await stream.close()
        assert found == len(MANY)

    run(body)


def test_an_older_peer_gives_its_whole_table_to_one_who_asks_for_a_view() -> None:
    pages = [MANY[:3], MANY[3:6]]

    async def older(stream: Stream) -> None:
        messages = MessageStream(stream)
        for page in pages:
            header = (await messages.receive_frame()).header
            assert header.get("after", "") == ("" if page is pages[0] else "page 1")
            records = [[sign_record(record(identity), identity), 1.0] for identity in page]
            following = "page 1" if page is pages[0] else ""
            await messages.send_frame(Frame({"records": records, "following": following}))

    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        old = network.attach("old", SECRET)
        old.serve(PEERS_PROTOCOL, older)
        client = network.attach("client", SECRET, is_listening=False)
        client.learn("old", old.addresses)
        view = await fetch_view(client, "old", 2.0, known={"somebody": 1}, avoid=["another"])
        assert len(view.records) == 6
        assert not view.is_empty

    run(body)
