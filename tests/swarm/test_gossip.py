"""Gossip: who gets to know whom, and when no more."""

import pytest
import trio
from gossiping import (
    IDENTITIES,
    SECONDS_TO_KNOW,
    SECRET,
    Member,
    members_that_know_each_other,
    record,
    run,
    until,
)

from swarm.errors import Unreachable
from swarm.gossip import GossipSettings
from swarm.memory import MemoryNetwork
from swarm.record import sign_record
from swarm.transport import Stream


def test_eight_hosts_that_know_only_the_first_know_each_other_within_five_seconds() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        await members_that_know_each_other(network, nursery, 8)

    run(body)


def test_hosts_that_announced_before_they_had_a_link_are_known_soon_after() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = [Member(network, IDENTITIES[n], nursery) for n in range(3)]
        for member in members:
            await member.announce()
        await trio.sleep(2.0)
        for member in members[1:]:
            await member.join(members[0])
        await until(
            lambda: all(one.knows(other) for one in members for other in members),
            within=SECONDS_TO_KNOW,
        )

    run(body)


def test_an_announcement_that_gets_lost_is_repeated_soon() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        await trio.sleep(60.0)
        publish, attempts = one.host.publish, [0.0]

        async def publish_from_the_third_on(topic: str, data: bytes) -> None:
            attempts.append(trio.current_time())
            if len(attempts) > 3:
                await publish(topic, data)

        one.host.publish = publish_from_the_third_on  # type: ignore[method-assign]
        await one.announce(span="2:6")
        await until(lambda: other.table.record_of(one.peer).span == "2:6", within=4.0)  # type: ignore[union-attr]

    run(body)


def test_a_late_joiner_has_the_whole_table_before_anyone_announces_again() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 6)
        await trio.sleep(30.0)
        sequences = [member.gossip.sequence for member in members]
        late = Member(network, IDENTITIES[6], nursery)
        await late.join(members[0])
        await until(lambda: all(late.knows(member) for member in members), within=0.5)
        assert sequences == [member.gossip.sequence for member in members]

    run(body)


def test_what_a_newcomer_announced_without_links_reaches_all_with_its_first_reading() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 4)
        late = Member(network, IDENTITIES[4], nursery)
        await late.announce()
        await trio.sleep(20.0)  # by now it announces every ten seconds
        published = late.gossip.sequence
        await late.join(members[0])
        await until(lambda: all(member.knows(late) for member in members), within=0.5)
        assert late.gossip.sequence == published

    run(body)


def test_known_peers_stay_known_as_long_as_they_are_there() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 4)
        for _ in range(300):
            await trio.sleep(1.0)
            assert all(one.knows(other) for one in members for other in members)
        assert not any(one.was_told_of_the_end_of(other) for one in members for other in members)

    run(body)


def test_an_announcement_reaches_others_and_their_listeners_at_once() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        await one.announce(state="draining", span="2:6")
        await until(lambda: other.table.record_of(one.peer).span == "2:6", within=0.1)  # type: ignore[union-attr]
        peer, heard = other.heard[-1]
        assert peer == one.peer
        assert heard is not None
        assert heard.state == "draining"

    run(body)


def test_refreshed_figures_travel_with_the_next_announcement_and_cause_none() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        await trio.sleep(30.0)
        published = one.gossip.sequence
        one.gossip.refresh(record(one.identity, free_tokens=77))
        assert one.gossip.sequence == published
        await until(lambda: other.table.record_of(one.peer).free_tokens == 77, within=12.5)  # type: ignore[union-attr]
        assert one.gossip.sequence == published + 1
        with pytest.raises(ValueError, match="cannot sign"):
            one.gossip.refresh(record(other.identity))

    run(body)


def test_a_refresh_after_leaving_does_not_bring_the_peer_back() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        await one.gossip.leave()
        one.gossip.refresh(record(one.identity))
        await trio.sleep(30.0)
        assert not other.knows(one)

    run(body)


def test_who_leaves_is_gone_at_once_everywhere_and_stays_gone() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 5)
        leaver, others = members[0], members[1:]
        await leaver.gossip.leave()
        network.kill(leaver.peer)
        await until(lambda: not any(other.knows(leaver) for other in others), within=0.2)
        assert all(other.was_told_of_the_end_of(leaver) for other in others)
        for _ in range(200):
            await trio.sleep(1.0)
            assert not any(other.knows(leaver) for other in others)

    run(body)


def test_a_farewell_arrives_even_if_gossip_loses_it() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)

        async def lose(topic: str, data: bytes) -> None:
            raise Unreachable("the topic is lost")

        one.host.publish = lose  # type: ignore[method-assign]
        await one.gossip.leave()
        assert not other.knows(one)

    run(body)


def test_who_has_left_announces_nothing_until_told_to() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        await one.gossip.leave()
        await trio.sleep(60.0)
        assert not other.knows(one)
        await one.announce()
        await until(lambda: other.knows(one), within=0.1)

    run(body)


def test_who_falls_silent_is_gone_after_the_time_its_record_is_valid() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, 3)
        silent, others = members[0], members[1:]
        await trio.sleep(60.0)
        silent.scope.cancel()
        network.kill(silent.peer, is_silent=True)
        valid_seconds = others[0].table.record_of(silent.peer).valid_seconds  # type: ignore[union-attr]
        took = await until(
            lambda: all(other.was_told_of_the_end_of(silent) for other in others),
            within=valid_seconds + 2.0,
        )
        assert took > valid_seconds / 2
        for _ in range(200):
            await trio.sleep(1.0)
            assert not any(other.knows(silent) for other in others)

    run(body)


def test_a_key_that_others_remember_with_a_higher_sequence_goes_above_it() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        first, second = await members_that_know_each_other(network, nursery, 2)
        reborn = IDENTITIES[2]
        earlier = record(reborn, sequence=10**9, state="gone")
        assert first.table.add(sign_record(earlier, reborn), trio.current_time())
        member = Member(network, reborn, nursery)
        await member.join(first)
        await member.announce()
        await until(lambda: first.knows(member) and second.knows(member), within=SECONDS_TO_KNOW)
        assert member.gossip.sequence > 10**9

    run(body)


@pytest.mark.parametrize("count", [8, 12])
def test_everyone_keeps_at_least_six_links_without_everyone_dialling_everyone(count: int) -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        members = await members_that_know_each_other(network, nursery, count)
        await trio.sleep(10.0)
        links = [len(member.host.links()) for member in members]
        assert min(links) >= 6
        await trio.sleep(40.0)
        assert links == [len(member.host.links()) for member in members]
        assert sum(links) / 2 <= count * 8
        network.kill(members[0].peer)
        await trio.sleep(20.0)
        assert all(len(member.host.links()) >= 6 for member in members[1:])

    run(body)


def test_a_host_whose_every_link_broke_comes_back_through_its_seeds() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        seed = network.attach("seed", SECRET)  # of which no record is known
        member = Member(network, IDENTITIES[0], nursery, seeds=("seed",))
        member.host.learn("seed", seed.addresses)
        for _ in range(2):
            await until(lambda: "seed" in member.host.links(), within=SECONDS_TO_KNOW)
            network.break_link("seed", member.peer)

    run(body)


def test_a_peer_that_cannot_be_dialled_is_left_alone_for_a_while() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        dials: list[float] = []
        member = Member(network, IDENTITIES[0], nursery)
        dead = IDENTITIES[1]

        async def dial(peer: str, *, within: float) -> None:
            dials.append(trio.current_time())
            raise Unreachable(f"{peer} is dead")

        member.host.dial = dial  # type: ignore[method-assign]
        member.table.add(sign_record(record(dead, valid_seconds=100.0), dead), trio.current_time())
        await trio.sleep(60.0)
        assert 3 <= len(dials) <= 5

    run(body)


def test_tables_are_read_from_members_not_from_linked_clients() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        asked: list[str] = []
        opening = one.host.open

        async def noting(peer: str, protocol: str, *, within: float) -> Stream:
            asked.append(peer)
            return await opening(peer, protocol, within=within)

        one.host.open = noting  # type: ignore[method-assign]
        for number in range(10):
            client = network.attach(f"client {number}", SECRET, is_listening=False)
            client.learn(one.peer, one.host.addresses)
            await client.dial(one.peer, within=1.0)
        await trio.sleep(300.0)
        assert len(asked) >= 3
        assert set(asked) == {other.peer}

    run(body)


def test_only_the_own_record_can_be_announced() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        one, other = await members_that_know_each_other(network, nursery, 2)
        with pytest.raises(ValueError, match="cannot sign"):
            await one.gossip.announce(record(other.identity))
        assert one.table.record_of(one.peer) is not None

    run(body)


def test_a_swarm_of_many_announces_less_often_and_its_records_live_longer() -> None:
    async def body(network: MemoryNetwork, nursery: trio.Nursery) -> None:
        settings = GossipSettings(announcements_per_second=1.0)
        member = Member(network, IDENTITIES[0], nursery, settings=settings)
        for identity in IDENTITIES[1:]:
            forever = record(identity, valid_seconds=120.0)
            member.table.add(sign_record(forever, identity), 0.0)
        await member.announce()
        found = member.table.record_of(member.peer)
        assert found is not None
        assert found.valid_seconds == pytest.approx(3.5 * 19)

    run(body)
