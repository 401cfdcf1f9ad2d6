"""Views: a client that reads nothing else lacks no server it needs and sees no ghosts."""

from collections.abc import Iterable
from functools import cache
from random import Random

import pytest
from gossiping import record

from swarm.identity import Identity
from swarm.peers import VIEW_BYTES, WHOLE_PEERS, PeerTable
from swarm.record import open_record, sign_record, tombstone_of

MANY = [Identity(number.to_bytes(2, "big") * 16) for number in range(1, 301)]
BLOCKS = 8
MOST_KNOWN = 512


@cache
def signed(number: int, sequence: int = 1, **changes: object) -> bytes:
    return sign_record(record(MANY[number], sequence=sequence, **changes), MANY[number])


def gone(number: int, sequence: int = 2) -> bytes:
    plain = tombstone_of(record(MANY[number], sequence=sequence))
    return sign_record(plain, MANY[number])


def table_of(count: int, **changes: object) -> PeerTable:
    """Servers whose numbers tell how slow they are, in two halves of the model."""
    table = PeerTable()
    for number in range(count):
        span = "0:4" if number % 2 == 0 else "4:8"
        facts = {"span": span, "decode_seconds_per_block": 0.001 * (number + 1)}
        assert table.add(signed(number, **{"free_tokens": 1000, **facts, **changes}), 0.0)
    return table


def numbers(records: Iterable[tuple[bytes, float]]) -> list[int]:
    by_peer = {identity.peer: number for number, identity in enumerate(MANY)}
    return [by_peer[open_record(data).peer] for data, _ in records]


def test_a_small_swarm_is_shown_whole_with_its_tombstones() -> None:
    table = table_of(WHOLE_PEERS)
    table.add(gone(0), 1.0)
    table.add(signed(1, 2, state="draining"), 1.0)
    page = table.view(2.0, {})
    assert set(page.records) == set(table.page(2.0).records)
    assert not page.following
    assert page.held == WHOLE_PEERS - 1


def test_of_a_large_swarm_the_fastest_are_shown_and_all_blocks_are_held() -> None:
    table, reader = table_of(WHOLE_PEERS + 1), PeerTable()
    page = table.view(2.0, {})
    assert {0, 1, 2, 3, 4, 5, 6, 7} <= set(numbers(page.records))
    assert len(page.records) < 30
    assert page.held == WHOLE_PEERS + 1
    for data, age in page.records:
        assert age == 2.0
        assert reader.add(data, 102.0, age)
    assert {str(offer.span) for offer in reader.offers(102.0)} == {"0:4", "4:8"}


def test_who_gives_a_view_is_in_it_however_slow_for_it_is_known_to_answer() -> None:
    table = table_of(200)
    for number in range(100, 200):
        assert number in numbers(table.view(2.0, {}, own=MANY[number].peer).records)


@pytest.mark.parametrize("count", [20, 200])
def test_what_the_reader_knows_is_not_told_again(count: int) -> None:
    table, reader = table_of(count), PeerTable()
    for data, age in table.view(2.0, reader.known(MOST_KNOWN)).records:
        reader.add(data, 2.0, age)
    assert table.view(3.0, reader.known(MOST_KNOWN)).records == ()
    table.add(signed(0, 2), 3.0)
    assert numbers(table.view(3.0, reader.known(MOST_KNOWN)).records) == [0]
    ahead = dict.fromkeys(reader.known(MOST_KNOWN), 99)
    assert table.view(3.0, ahead).records == ()


def test_news_of_a_known_peer_reaches_its_reader_however_bad_a_server_it_is() -> None:
    table = table_of(200)
    slow = 199
    known = {MANY[slow].peer: 1}
    assert slow not in numbers(table.view(1.0, known).records)
    for changed in (
        signed(slow, 2, decode_seconds_per_block=9.0),
        signed(slow, 3, state="draining"),
        signed(slow, 4, state="joining", span="4:8"),
        gone(slow, 5),
    ):
        assert slow not in numbers(table.view(1.0, known).records)
        table.add(changed, 1.0)
        view = table.view(1.0, known)
        assert slow in numbers(view.records)
        known = {MANY[slow].peer: open_record(changed).sequence}


def test_a_tombstone_goes_to_those_who_know_the_peer_and_to_no_others() -> None:
    table = table_of(200)
    table.add(gone(199), 1.0)
    assert 199 not in numbers(table.view(1.0, {}).records)
    assert 199 in numbers(table.view(1.0, {MANY[199].peer: 1}).records)


def test_what_ended_is_not_shown_before_anyone_has_swept() -> None:
    table = table_of(200, valid_seconds=30.0)
    table.add(signed(0, 2, free_tokens=5000, valid_seconds=100.0), 20.0)
    assert numbers(table.view(31.0, {MANY[1].peer: 0}).records) == [0]


@pytest.mark.parametrize("most_bytes", [0, 1000, 3000, VIEW_BYTES])
def test_a_view_keeps_within_its_bytes_and_tells_first_who_left(most_bytes: int) -> None:
    table = table_of(300)
    known = {MANY[number].peer: 0 for number in range(300)}
    for number in (250, 251):
        table.add(gone(number), 1.0)
    page = table.view(1.0, known, most_bytes=most_bytes)
    assert sum(len(data) for data, _ in page.records) <= most_bytes
    found = numbers(page.records)
    assert found[:2] == [250, 251][: len(found)]
    if most_bytes == 3000:
        assert len(found) > 3  # then the best


def test_a_small_table_of_many_tombstones_keeps_within_its_bytes() -> None:
    table = PeerTable()
    for number in range(300):
        table.add(gone(number), 0.0)
    table.add(signed(0, 3), 0.0)
    page = table.view(1.0, {}, most_bytes=5000)
    assert sum(len(data) for data, _ in page.records) <= 5000
    assert numbers(page.records)[0] == 0


def test_if_some_of_the_best_are_to_avoid_the_best_of_the_others_are_shown_too() -> None:
    table = table_of(200)
    plain = set(numbers(table.view(1.0, {}).records))
    avoided = frozenset(MANY[number].peer for number in plain)
    shown = table.view(1.0, dict.fromkeys(avoided, 1), avoided).records
    assert not plain & set(numbers(shown))
    fastest = [number for number in range(200) if number not in plain]
    evens = [number for number in fastest if number % 2 == 0][:4]
    odds = [number for number in fastest if number % 2 == 1][:4]
    assert {*evens, *odds} <= set(numbers(shown))
    everyone = frozenset(identity.peer for identity in MANY)
    assert set(numbers(table.view(1.0, {}, everyone).records)) == plain


def test_who_comes_leaves_or_moves_changes_the_view_at_once() -> None:
    table = table_of(200)
    assert table.view(1.0, {}).records
    table.add(signed(251, span="0:4", decode_seconds_per_block=1e-5, free_tokens=900), 1.0)
    assert 251 in numbers(table.view(1.0, {}).records)
    table.add(gone(251), 1.0)
    assert 251 not in numbers(table.view(1.0, {}).records)
    for number in [n for n in range(200) if n % 2 == 1]:  # all but one hold 0:4 now
        if number != 177:
            table.add(signed(number, 2, span="0:4", free_tokens=1000), 1.0)
    assert 177 in numbers(table.view(1.0, {}).records)


def test_renewed_figures_are_told_as_they_are_and_ranked_a_second_later() -> None:
    table = table_of(200)
    assert 100 not in numbers(table.view(1.0, {}).records)
    table.add(signed(0, 2, free_tokens=7), 1.5)
    table.add(signed(100, 2, decode_seconds_per_block=1e-6, free_tokens=1000), 1.5)
    told = {open_record(data).peer: open_record(data) for data, _ in table.view(1.5, {}).records}
    assert told[MANY[0].peer].free_tokens == 7
    assert 100 in numbers(table.view(2.5, {}).records)


def test_one_that_lies_about_the_models_depth_does_not_change_the_view() -> None:
    table = table_of(200)
    honest = set(numbers(table.view(1.0, {}).records))
    liar = signed(250, blocks=1024, span="0:1024", free_tokens=2**50)
    table.add(liar, 1.0)
    assert set(numbers(table.view(1.0, {}).records)) == honest


def test_only_so_many_are_told_as_known_and_those_heard_of_last_are_among_them() -> None:
    table = table_of(10)
    table.add(gone(3), 1.0)
    table.add(signed(0, 5), 1.0)
    assert table.known(2) == {MANY[9].peer: 1, MANY[0].peer: 5}
    assert table.known(100) == {MANY[n].peer: 1 for n in range(1, 10) if n != 3} | {
        MANY[0].peer: 5,
        MANY[3].peer: 2,
    }


def most_room(table: PeerTable, now: float) -> list[int]:
    return [
        max((o.free_tokens for o in table.offers(now) if o.is_online and b in o.span), default=-1)
        for b in range(BLOCKS)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_a_reader_of_views_has_the_servers_it_needs_and_no_ghosts(
    seed: int,
) -> None:
    """Two peers hold the same table; the reader asks one or the other, every five seconds."""
    random = Random(seed)
    tables, reader = (PeerTable(), PeerTable()), PeerTable()
    sequences = dict.fromkeys(range(len(MANY)), 0)
    present: set[int] = set()
    least, most = [(0, 90), (66, 200)][seed % 2]

    def tell(data: bytes, now: float) -> None:
        for table in tables:
            table.add(data, now)

    now = 0.0
    for round_ in range(15):
        now = 5.0 * round_
        wanted = random.randint(least, most)
        for number in random.sample(sorted(present), max(0, len(present) - wanted)):
            present.discard(number)
            if random.random() < 0.5:  # the others fall silent
                sequences[number] += 1
                tell(gone(number, sequences[number]), now)
        present |= set(random.sample(range(len(MANY)), max(0, wanted - len(present))))
        for number in sorted(present):
            if sequences[number] == 0 or random.random() < 0.5:
                sequences[number] += 1
                start = random.randrange(6)
                facts = {
                    "span": f"{start}:{start + random.randint(1, 8 - start)}",
                    "state": random.choice(["online", "online", "online", "draining"]),
                    "free_tokens": random.randrange(2000),
                    "decode_seconds_per_block": random.uniform(0.001, 0.1),
                    "valid_seconds": 30.0,
                }
                tell(signed(number, sequences[number], **facts), now)
        now += 1.0
        for table in (*tables, reader):
            table.expire(now)
        chosen = random.randrange(2)
        view = tables[chosen].view(now, reader.known(MOST_KNOWN), own=str(chosen))
        for data, age in view.records:
            reader.add(data, now, age)
        assert most_room(reader, now) == most_room(tables[0], now)
        held = {found.peer: found for found in tables[0].records(now)}
        for found in reader.records(now):
            assert held[found.peer] == found
