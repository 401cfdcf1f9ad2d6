"""The cache of a session whose keys lie in pages, by itself."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import BLOCKS, TinyModel, assert_same, logits_of, some_ids

from blocks.cache import StackCache
from blocks.decoding import Decoder
from blocks.errors import BlocksError
from blocks.growing import ROLLBACK_TOKENS
from blocks.load import load_stack
from blocks.pool import Pools
from blocks.savepoint import Savepoint
from blocks.stack import Stack
from blocks.trial import Paging

Get = Callable[[str, bool], TinyModel]
PAGE = 8
FAMILIES = ("llama", "gemma3_text")


def both(model: TinyModel, most_pages: int | None = None) -> tuple[Stack, Stack]:
    """All blocks without pages, and with."""
    plain = load_stack(model.checkpoint, 0, BLOCKS)
    return plain, Stack.of(plain._carved.model, 0, BLOCKS, Paging(PAGE, None, most_pages))


def pools_of(stack: Stack) -> Pools:
    decoder = stack._decoder
    assert isinstance(decoder, Decoder)
    return decoder.pools


def held(stack: Stack) -> int:
    return sum(pool.held for pool in pools_of(stack))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_chunks_gets_what_it_gets_without_pages(tiny_model: Get, family: str) -> None:
    plain, paged = both(tiny_model(family, False))
    ids = some_ids(100)
    ours, theirs = paged.new_cache(), plain.new_cache()
    for start, stop in ((0, 13), (13, 14), (14, 40), (40, 100)):
        part = ids[:, start:stop]
        assert_same(logits_of([paged], part, [ours]), logits_of([plain], part, [theirs]))
    assert ours.is_paged
    assert ours.length == theirs.length == 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_session_has_its_keys_in_pages_too(tiny_model: Get, family: str) -> None:
    plain, paged = both(tiny_model(family, False))
    ids, mask = some_ids(10), torch.ones(1, 12, dtype=torch.long)
    mask[:, :3] = 0
    ours, theirs = paged.new_cache(), plain.new_cache()
    for stack, cache in ((paged, ours), (plain, theirs)):
        stack.run(ids, cache=cache, mask=mask[:, :10])
    found = [
        stack.run(some_ids(2, seed=1), cache=cache, start=10, mask=mask, logits_for=0)
        for stack, cache in ((paged, ours), (plain, theirs))
    ]
    assert_same(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_of_several_rows_have_growing_layers(tiny_model: Get, family: str) -> None:
    plain, paged = both(tiny_model(family, False))
    ours, theirs = paged.new_cache(), plain.new_cache()
    for number in range(3):
        ids = some_ids(1 + number, rows=3, seed=number)
        assert_same(logits_of([paged], ids, [ours]), logits_of([plain], ids, [theirs]))
    assert not ours.is_paged
    assert held(paged) == 0
    assert ours.byte_count == theirs.byte_count
    assert_same(
        logits_of([paged], some_ids(1, rows=3), [ours.fork(5)]),
        logits_of([plain], some_ids(1, rows=3), [theirs.fork(5)]),
    )


def test_what_a_session_takes_is_its_pages_and_what_it_uses_its_positions(
    llama: TinyModel,
) -> None:
    _, paged = both(llama)
    cache = paged.new_cache()
    paged.run(some_ids(PAGE + 1), cache=cache)
    token = BLOCKS * 2 * 2 * 8 * 4  # keys and values of two heads of width 8 in float32
    assert cache.byte_count == 2 * PAGE * token
    assert cache.used_byte_count == (PAGE + 1) * token
    assert held(paged) == 2 * BLOCKS


def test_a_fork_takes_no_page_before_one_of_the_two_goes_on(llama: TinyModel) -> None:
    _, paged = both(llama)
    donor = paged.new_cache()
    paged.run(some_ids(2 * PAGE - 1), cache=donor)
    fork = donor.fork(2 * PAGE - 2)
    assert held(paged) == 2 * BLOCKS
    assert fork.byte_count == donor.byte_count  # it holds on to them whatever becomes of the other
    paged.run(some_ids(1), cache=fork, start=2 * PAGE - 2)
    assert held(paged) == 3 * BLOCKS
    del donor
    assert held(paged) == 2 * BLOCKS


def test_sliding_layers_keep_what_their_window_and_a_rollback_need(tiny_model: Get) -> None:
    _, paged = both(tiny_model("gemma3_text", False))
    cache = paged.new_cache()
    for start in range(0, 120, PAGE):
        paged.run(some_ids(PAGE), cache=cache, start=start)
    full, sliding = BLOCKS // 6, BLOCKS - BLOCKS // 6
    most = -(-(ROLLBACK_TOKENS + 4) // PAGE) + 2
    assert 15 * full < held(paged) <= 15 * full + most * sliding
    assert cache.can_roll_back(120 - ROLLBACK_TOKENS)
    assert cache.shortest_fork is not None
    assert 20 < cache.shortest_fork <= 120 - ROLLBACK_TOKENS
    for one in (cache, cache.fork(110)):
        assert not one.can_roll_back(20)
        with pytest.raises(BlocksError, match="cannot go back"):
            one.rollback(20)


def test_a_rollback_gives_pages_back_and_one_to_nothing_all(llama: TinyModel) -> None:
    _, paged = both(llama)
    cache = paged.new_cache()
    paged.run(some_ids(5 * PAGE), cache=cache)
    cache.rollback(PAGE + 1)
    assert held(paged) == 2 * BLOCKS
    cache.rollback(0)
    assert held(paged) == 0
    paged.run(some_ids(3), cache=cache)
    assert held(paged) == BLOCKS


def test_a_restored_session_goes_on_as_if_nothing_had_been(llama: TinyModel) -> None:
    plain, paged = both(llama)
    ours, theirs = paged.new_cache(), plain.new_cache()
    ids = some_ids(PAGE + 3)
    for stack, cache in ((paged, ours), (plain, theirs)):
        stack.run(ids[:, :PAGE], cache=cache)
    point = Savepoint(ours)

    def fail(*_: object) -> None:
        raise RuntimeError

    layer = paged._carved.parts.layers[3]
    with layer.register_forward_pre_hook(fail), pytest.raises(RuntimeError):
        paged.run(some_ids(1, seed=9), cache=ours, start=PAGE)
    assert ours.is_torn
    point.restore()
    assert_same(
        logits_of([paged], ids[:, PAGE:], [ours]), logits_of([plain], ids[:, PAGE:], [theirs])
    )


def test_a_chunk_without_pages_for_all_of_it_changes_nothing(llama: TinyModel) -> None:
    plain, paged = both(llama, most_pages=2 * BLOCKS)
    ours, theirs = paged.new_cache(), plain.new_cache()
    for stack, cache in ((paged, ours), (plain, theirs)):
        stack.run(some_ids(5), cache=cache)
    with pytest.raises(BlocksError, match="pages for keys are held"):
        paged.run(some_ids(20), cache=ours, start=5)
    assert (ours.length, ours.is_torn) == (5, False)
    ids = some_ids(2 * PAGE - 5)
    assert_same(logits_of([paged], ids, [ours]), logits_of([plain], ids, [theirs]))


def parked(cache: StackCache) -> None:
    assert cache.park()
    assert cache.byte_count == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_parked_session_gives_its_pages_back_and_goes_on_to_the_bit(
    tiny_model: Get, family: str
) -> None:
    _, paged = both(tiny_model(family, False))
    ours, theirs = paged.new_cache(), paged.new_cache()
    for start in range(0, 90, 15):
        ids = some_ids(15, seed=start)
        found = [paged.run(ids, cache=cache, start=start, logits_for=0) for cache in (ours, theirs)]
        assert torch.equal(*found)
        before = held(paged)
        parked(ours)
        assert held(paged) == before // 2
        other = paged.new_cache()  # whoever comes meanwhile gets its pages
        paged.run(some_ids(40, seed=7), cache=other)
        del other
    one = some_ids(1)
    parked(ours)
    found = paged.run_joined([one, one], [ours, theirs], wants_logits=[True, True])
    assert torch.equal(*found)


def test_a_parked_session_can_be_forked_and_rolled_back(llama: TinyModel) -> None:
    plain, paged = both(llama)
    ours, theirs = paged.new_cache(), plain.new_cache()
    for stack, cache in ((paged, ours), (plain, theirs)):
        stack.run(some_ids(20), cache=cache)
    parked(ours)
    fork, their_fork = ours.fork(11), theirs.fork(11)
    parked(ours)
    for cache in (ours, theirs):
        cache.rollback(17)
    for mine, other in ((ours, theirs), (fork, their_fork)):
        ids = some_ids(3, seed=mine.length)
        assert_same(logits_of([paged], ids, [mine]), logits_of([plain], ids, [other]))


def test_a_session_that_finds_no_pages_stays_parked_until_there_are(llama: TinyModel) -> None:
    _, paged = both(llama, most_pages=2 * BLOCKS)
    cache, other = paged.new_cache(), paged.new_cache()
    paged.run(some_ids(PAGE + 2), cache=cache)
    parked(cache)
    paged.run(some_ids(3), cache=other)
    with pytest.raises(BlocksError, match="pages for keys are held"):
        paged.run(some_ids(1), cache=cache, start=PAGE + 2)
    assert not cache.is_torn
    assert held(paged) == BLOCKS
    del other
    paged.run(some_ids(1), cache=cache, start=PAGE + 2)
    assert held(paged) == 2 * BLOCKS


def test_what_is_not_in_pages_is_not_parked(llama: TinyModel) -> None:
    plain, paged = both(llama)
    for cache in (plain.new_cache(), paged.new_cache()):
        assert not cache.park()
    cache = plain.new_cache()
    plain.run(some_ids(3), cache=cache)
    assert not cache.park()


def test_memory_is_reserved_for_all_blocks_alike(llama: TinyModel) -> None:
    _, paged = both(llama)
    page_bytes = PAGE * 2 * 2 * 8 * 4
    cache = paged.new_cache()
    paged.run(some_ids(1), cache=cache)
    pools_of(paged).reserve(50 * BLOCKS * page_bytes + 1, cache.ledger)
    del cache
    (pool,) = pools_of(paged)
    assert (pool.pages, pool.held) == (50 * BLOCKS, 0)
