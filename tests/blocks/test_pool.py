"""Pages are held, shared and given back; nobody ever writes where another looks."""

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blocks.errors import BlocksError
from blocks.pool import NOBODYS, Form, Ledger, Pool, Pools

SIZE = 4
CPU = torch.device("cpu")
FORM = Form(2, 3, 3, torch.float32, CPU)
BLOCK, SLIDING = 5, 6
KEEP = 6  # positions of the sliding block


class Sessions(RuleBasedStateMachine):
    """Ledgers that grow, fork, are cut and dropped, beside the positions each should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools(SIZE)
        self.ledgers: list[Ledger] = []
        self.told: list[list[int]] = []  # of each ledger what it wrote, by position
        self.next = 1

    @rule()
    def comes(self) -> None:
        ledger = Ledger(self.pools)
        ledger.open(BLOCK, FORM, None)
        ledger.open(SLIDING, FORM, KEEP)
        self.ledgers.append(ledger)
        self.told.append([])

    @precondition(lambda self: self.ledgers)
    @rule(which=st.integers(0, 99), tokens=st.integers(1, 20))
    def grows(self, which: int, tokens: int) -> None:
        number = which % len(self.ledgers)
        ledger, told = self.ledgers[number], self.told[number]
        for block in (BLOCK, SLIDING):
            ledger.make_room(block, len(told), tokens)
        self._write(ledger, told, tokens)

    @precondition(lambda self: self.ledgers)
    @rule(which=st.integers(0, 99))
    def steps(self, which: int) -> None:
        number = which % len(self.ledgers)
        self.ledgers[number].make_ready(len(self.told[number]))
        self._write(self.ledgers[number], self.told[number], 1)

    def _write(self, ledger: Ledger, told: list[int], tokens: int) -> None:
        for _ in range(tokens):
            index, place = divmod(len(told), SIZE)
            for pool, pages in ledger.held.values():
                pool.keys[pages[index], place] = self.next
            told.append(self.next)
            self.next += 1

    def _shortest(self, number: int) -> int:
        gone = self.ledgers[number].gone(SLIDING) * SIZE
        return min(len(self.told[number]), gone + KEEP) if gone else 0

    @precondition(lambda self: self.ledgers)
    @rule(which=st.integers(0, 99), share=st.floats(0, 1))
    def is_forked(self, which: int, share: float) -> None:
        number = which % len(self.ledgers)
        least, told = self._shortest(number), self.told[number]
        length = least + int((len(told) - least) * share)
        if length:
            self.ledgers.append(self.ledgers[number].fork(length))
            self.told.append(told[:length])

    @precondition(lambda self: self.ledgers)
    @rule(which=st.integers(0, 99), share=st.floats(0, 1))
    def is_cut(self, which: int, share: float) -> None:
        number = which % len(self.ledgers)
        least, told = self._shortest(number), self.told[number]
        length = least + int((len(told) - least) * share)
        for block in (BLOCK, SLIDING):
            self.ledgers[number].cut(block, length)
        del told[length:]

    @precondition(lambda self: self.ledgers)
    @rule(which=st.integers(0, 99))
    def goes(self, which: int) -> None:
        number = which % len(self.ledgers)
        del self.ledgers[number], self.told[number]

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        for ledger, told in zip(self.ledgers, self.told, strict=True):
            for block, (pool, pages) in ledger.held.items():
                first = ledger.gone(block) * SIZE
                assert not first or len(told) - first >= KEEP
                for position in range(first, len(told)):
                    index, place = divmod(position, SIZE)
                    assert pool.keys[pages[index], place].eq(told[position]).all()

    @invariant()
    def the_pool_counts_what_is_held(self) -> None:
        held = {
            page
            for ledger in self.ledgers
            for _, pages in ledger.held.values()
            for page in pages
            if page != NOBODYS
        }
        assert sum(pool.held for pool in self.pools) == len(held)


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def one_ledger(pools: Pools, positions: int) -> Ledger:
    ledger = Ledger(pools)
    ledger.open(BLOCK, FORM, None)
    ledger.make_room(BLOCK, 0, positions)
    return ledger


def test_a_fork_shares_all_pages_and_copies_only_the_one_it_writes_to() -> None:
    pools = Pools(SIZE)
    donor = one_ledger(pools, 3 * SIZE - 1)
    (pool,) = pools
    fork = donor.fork(3 * SIZE - 2)
    assert pool.held == 3
    fork.make_ready(3 * SIZE - 2)
    assert pool.held == 4
    ours, theirs = donor.held[BLOCK][1], fork.held[BLOCK][1]
    assert ours[:2] == theirs[:2]
    assert ours[2] != theirs[2]


def test_who_was_forked_copies_the_shared_page_before_it_writes_on() -> None:
    pools = Pools(SIZE)
    donor = one_ledger(pools, 2)
    donor.make_ready(2)
    fork = donor.fork(2)
    before = donor.held[BLOCK][1][0]
    donor.make_ready(2)
    assert fork.held[BLOCK][1] == [before]
    assert donor.held[BLOCK][1] != [before]


def test_a_dropped_ledger_gives_its_pages_back_at_once() -> None:
    pools = Pools(SIZE)
    gc.disable()
    try:
        ledger = one_ledger(pools, 9)
        (pool,) = pools
        assert pool.held == 3
        del ledger
        assert pool.held == 0
    finally:
        gc.enable()


def test_pages_keep_what_they_hold_when_the_pool_moves() -> None:
    pools = Pools(SIZE)
    ledger = one_ledger(pools, SIZE)
    (pool,) = pools
    pool.values[ledger.held[BLOCK][1][0]] = 7
    moves, pages = pools.moves, pool.pages
    pool.reserve(2 * pages)
    assert pools.moves == moves + 1
    assert pool.values[ledger.held[BLOCK][1][0]].eq(7).all()
    assert (pool.pages, pool.held) == (2 * pages, 1)


def test_a_full_pool_says_so_and_who_asked_keeps_what_it_had() -> None:
    pools = Pools(SIZE, most_pages=3)
    ledger = one_ledger(pools, 2 * SIZE)
    before, other = list(ledger.held[BLOCK][1]), one_ledger(pools, 1)
    with pytest.raises(BlocksError, match="all 3 pages for keys are held"):
        ledger.make_ready(2 * SIZE)
    assert ledger.held[BLOCK][1] == before
    del other
    ledger.make_ready(2 * SIZE)


def test_no_memory_for_a_pool_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(FORM, SIZE)

    def none(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", none)
    with pytest.raises(BlocksError, match="no memory for more keys"):
        pool.take()


def test_a_ledger_counts_pages_for_what_it_takes_and_positions_for_what_it_uses() -> None:
    ledger = Ledger(Pools(SIZE))
    ledger.open(BLOCK, FORM, None)
    ledger.open(SLIDING, FORM, KEEP)
    for length in range(0, 40, SIZE):
        for block in (BLOCK, SLIDING):
            ledger.make_room(block, length, SIZE)
    token = 2 * (3 + 3) * 4
    gone = (36 - KEEP) // SIZE
    assert ledger.gone(SLIDING) == gone
    assert ledger.byte_count == token * SIZE * (10 + 10 - gone)
    assert ledger.used_byte_count(39) == token * (39 + 39 - gone * SIZE)


def test_the_stamp_changes_with_the_pages_and_only_then() -> None:
    ledger = one_ledger(Pools(SIZE), 2)
    ledger.make_ready(2)
    stamp, table = ledger.stamp, ledger.table(range(BLOCK, BLOCK + 1))
    ledger.make_ready(3)
    assert ledger.stamp == stamp
    assert ledger.table(range(BLOCK, BLOCK + 1)) is table
    ledger.make_ready(4)
    assert ledger.stamp != stamp
    assert ledger.table(range(BLOCK, BLOCK + 1)).tolist() == [ledger.held[BLOCK][1]]
