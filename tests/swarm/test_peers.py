"""The table of peers: newest wins, ends in time, and raises no ghosts."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.span import Span
from swarm.errors import PeerFault
from swarm.identity import Identity
from swarm.peers import SHADOW_SECONDS, LinkWishes, PeerTable, choose_dials
from swarm.record import MOST_VALID_SECONDS, PeerRecord, sign_record, tombstone_of

IDENTITIES = [Identity(bytes([seed]) * 32) for seed in range(1, 21)]
ALICE, BOB = IDENTITIES[:2]
FINGERPRINT = "ab" * 32


def record(identity: Identity = ALICE, sequence: int = 1, **changes: object) -> PeerRecord:
    plain = PeerRecord(
        peer=identity.peer,
        sequence=sequence,
        fingerprint=FINGERPRINT,
        blocks=8,
        span="0:4",
        decode_seconds_per_block=0.001,
        prefill_seconds_per_block_token=0.0001,
        valid_seconds=30.0,
    )
    return msgspec.structs.replace(plain, **changes)


def signed(identity: Identity = ALICE, sequence: int = 1, **changes: object) -> bytes:
    return sign_record(record(identity, sequence, **changes), identity)


def gone(identity: Identity = ALICE, sequence: int = 1) -> bytes:
    return sign_record(tombstone_of(record(identity, sequence)), identity)


def peers_in(table: PeerTable, now: float) -> set[str]:
    return {found.peer for found in table.records(now)}


def test_the_newest_record_wins_in_whatever_order_they_come() -> None:
    table = PeerTable()
    assert table.add(signed(sequence=2, free_tokens=20), 0.0)
    assert not table.add(signed(sequence=1, free_tokens=10), 1.0)
    assert not table.add(signed(sequence=2, free_tokens=99), 1.0)
    assert table.add(signed(sequence=3, free_tokens=30), 2.0)
    held = table.record_of(ALICE.peer)
    assert held is not None
    assert held.free_tokens == 30
    assert len(table) == 1


def test_a_damaged_record_is_a_fault_and_leaves_no_trace() -> None:
    table = PeerTable()
    damaged = bytearray(signed(sequence=5))
    damaged[-1] ^= 1
    with pytest.raises(PeerFault):
        table.add(bytes(damaged), 0.0)
    assert len(table) == 0
    assert table.add(signed(sequence=1), 0.0)


def test_a_record_ends_its_own_seconds_after_its_first_receipt() -> None:
    table = PeerTable()
    table.add(signed(valid_seconds=30.0), 100.0)
    table.add(signed(valid_seconds=30.0), 120.0)  # heard again: no longer life
    assert peers_in(table, 129.9) == {ALICE.peer}
    assert peers_in(table, 130.0) == set()
    assert [ended.peer for ended in table.expire(130.0)] == [ALICE.peer]
    assert table.expire(130.0) == ()
    assert table.record_of(ALICE.peer) is None


def test_an_age_told_shortens_the_life() -> None:
    table = PeerTable()
    assert table.add(signed(valid_seconds=30.0), 100.0, age=25.0)
    assert peers_in(table, 104.9) == {ALICE.peer}
    assert peers_in(table, 105.1) == set()


def test_a_record_that_is_over_is_not_taken_and_does_not_bar_the_peer() -> None:
    table = PeerTable()
    assert not table.add(signed(), 100.0, age=1e9)
    assert table.add(signed(), 100.0)


def test_a_negative_age_does_not_lengthen_the_life() -> None:
    table = PeerTable()
    table.add(signed(valid_seconds=30.0), 0.0, age=-1e6)
    assert peers_in(table, 30.1) == set()


def test_a_promise_of_eternity_is_capped() -> None:
    table = PeerTable()
    table.add(signed(valid_seconds=1e9), 0.0)
    assert peers_in(table, MOST_VALID_SECONDS - 0.1) == {ALICE.peer}
    assert peers_in(table, MOST_VALID_SECONDS) == set()


@pytest.mark.parametrize("sequence", [1, 2])
def test_after_a_tombstone_no_older_or_equal_record_raises_the_ghost(sequence: int) -> None:
    table = PeerTable()
    table.add(signed(sequence=1), 0.0)
    assert table.add(gone(sequence=2), 1.0)
    assert peers_in(table, 1.0) == set()
    assert not table.add(signed(sequence=sequence), 1.0 + SHADOW_SECONDS / 2)
    assert table.add(signed(sequence=3), 2.0)


def test_a_tombstone_that_comes_first_bars_the_record_that_it_ended() -> None:
    table = PeerTable()
    assert table.add(gone(sequence=2), 0.0)
    assert not table.add(signed(sequence=1), 1.0)


def test_an_expired_record_cannot_come_back_from_a_slower_holder() -> None:
    table = PeerTable()
    table.add(signed(valid_seconds=30.0), 0.0)
    table.expire(31.0)
    assert not table.add(signed(valid_seconds=30.0), 31.0, age=29.0)
    assert table.add(signed(sequence=2, valid_seconds=30.0), 31.0)


def test_a_shadow_is_forgotten_in_time() -> None:
    table = PeerTable()
    table.add(gone(sequence=2), 0.0)
    table.expire(SHADOW_SECONDS - 0.1)
    assert table.page(SHADOW_SECONDS - 0.1).records
    table.expire(SHADOW_SECONDS)
    assert not table.page(SHADOW_SECONDS).records


def test_records_of_another_model_are_not_of_this_swarm() -> None:
    table = PeerTable("ab" * 8)
    assert not table.add(signed(fingerprint="cd" * 32), 0.0)
    assert table.add(signed(), 0.0)


def test_a_full_table_keeps_who_is_in_and_lets_newcomers_in_when_one_ends() -> None:
    table = PeerTable(most_peers=3)
    first, others = IDENTITIES[0], IDENTITIES[1:4]
    for identity in (first, *others[:2]):
        assert table.add(signed(identity), 0.0)
    assert not table.add(signed(others[2]), 1.0)
    assert table.add(signed(first, sequence=2), 1.0)
    assert table.add(gone(others[0], sequence=2), 1.0)
    assert table.add(signed(others[2]), 1.0)
    assert len(table) == 3


def test_shadows_are_bounded_too() -> None:
    table = PeerTable(most_peers=3)
    for identity in IDENTITIES:
        table.add(gone(identity), 0.0)
    assert len(table.page(0.0).records) == 3


@given(st.integers(1, 6000), st.sets(st.sampled_from(IDENTITIES), max_size=20))
@settings(max_examples=40, deadline=None)
def test_pages_of_any_size_carry_the_whole_table_with_its_ages_and_tombstones(
    most_bytes: int, leaving: set[Identity]
) -> None:
    table, reader = PeerTable(), PeerTable()
    for seconds, identity in enumerate(IDENTITIES):
        table.add(signed(identity), float(seconds))
    for identity in leaving:
        table.add(gone(identity, sequence=2), 20.0)
    after, pages = "", 0
    while True:
        page = table.page(25.0, after, most_bytes)
        assert sum(len(data) for data, _ in page.records) <= max(most_bytes, 2048)
        for data, age in page.records:
            assert reader.add(data, 1025.0, age)
        after, pages = page.following, pages + 1
        if not after:
            break
        assert pages <= len(IDENTITIES)
    assert peers_in(reader, 1025.0) == peers_in(table, 25.0)
    for later in (30.5, 36.5, 44.5):  # each ends in both at the same time
        assert peers_in(reader, 1000.0 + later) == peers_in(table, later)
    for identity in leaving:
        assert not reader.add(signed(identity), 1025.0)


def test_what_has_ended_is_not_handed_on() -> None:
    table = PeerTable()
    table.add(signed(valid_seconds=30.0), 0.0)
    assert table.page(30.0).records == ()


def test_offers_are_the_valid_records_as_routing_sees_them() -> None:
    table = PeerTable()
    table.add(signed(ALICE, valid_seconds=10.0), 0.0)
    table.add(signed(BOB, span="4:8", state="joining"), 0.0)
    assert {(o.peer, o.span, o.is_online) for o in table.offers(5.0)} == {
        (ALICE.peer, Span(0, 4), True),
        (BOB.peer, Span(4, 8), False),
    }
    assert [o.peer for o in table.offers(15.0)] == [BOB.peer]


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(IDENTITIES[:3]),
        st.integers(1, 6),
        st.booleans(),
        st.floats(0, 40),  # age told
        st.floats(0, 5),  # seconds until the next: all within the time that a shadow stays
    ),
    max_size=20,
)


@given(_STEPS)
@settings(max_examples=100, deadline=None)
def test_no_order_of_events_shows_an_older_record_after_a_newer_one(
    steps: list[tuple[Identity, int, bool, float, float]],
) -> None:
    table, now = PeerTable(), 0.0
    newest: dict[str, int] = {}
    for identity, sequence, is_gone, age, pause in steps:
        data = gone(identity, sequence) if is_gone else signed(identity, sequence)
        is_news = table.add(data, now, age)
        if is_news:
            assert sequence > newest.get(identity.peer, 0)
            newest[identity.peer] = sequence
            assert (identity.peer in peers_in(table, now)) is not is_gone
        now += pause
        table.expire(now)
        for found in table.records(now):
            assert found.sequence == newest[found.peer]


def dials(
    own: str | None,
    spans: list[str],
    linked: set[int],
    avoid: frozenset[int] = frozenset(),
    seed: int = 0,
) -> list[int]:
    """Whom to dial among peers with these spans, as their numbers."""
    known = [record(IDENTITIES[n], span=span, blocks=32) for n, span in enumerate(spans)]
    numbers = {identity.peer: number for number, identity in enumerate(IDENTITIES)}
    chosen = choose_dials(
        Span.parse(own) if own else None,
        known,
        {IDENTITIES[n].peer for n in linked} | {"a client"},
        {IDENTITIES[n].peer for n in avoid},
        LinkWishes(least=3, neighbours=2, most=4),
        random.Random(seed),
    )
    return [numbers[peer] for peer in chosen]


FAR, BEFORE, BEHIND = "20:24", "4:8", "12:16"


def test_neighbours_in_block_order_are_dialled_before_anyone_else() -> None:
    chosen = dials("8:12", [FAR, FAR, FAR, BEFORE, FAR, BEHIND], linked=set())
    assert set(chosen[:2]) == {3, 5}
    assert len(chosen) == 3


def test_with_links_enough_only_missing_neighbours_are_dialled() -> None:
    assert dials("8:12", [FAR, FAR, FAR, BEHIND, FAR], linked={0, 1, 2}) == [3]
    assert dials("8:12", [FAR, FAR, FAR, FAR], linked={0, 1, 2}) == []


def test_nobody_is_dialled_beyond_the_most_links() -> None:
    assert dials("8:12", [FAR, FAR, FAR, FAR, BEHIND, BEFORE], linked={0, 1, 2, 3}) == []


def test_links_to_clients_do_not_count() -> None:
    assert len(dials(None, [FAR] * 5, linked=set())) == 3


def test_peers_to_avoid_are_not_dialled() -> None:
    assert dials("8:12", [BEHIND, FAR, BEHIND], linked=set(), avoid=frozenset({0, 1})) == [2]


def test_hosts_with_other_seeds_do_not_all_dial_the_same_peers() -> None:
    assert len({tuple(dials(None, [FAR] * 10, linked=set(), seed=seed)) for seed in range(20)}) > 10
