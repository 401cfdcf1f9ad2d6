"""A session's cache grows in place, goes back exactly, and costs what it says."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from tiny_models import BLOCKS, WINDOW, TinyModel, assert_same, some_ids, whole_logits

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.growing import ROLLBACK_TOKENS
from blocks.load import load_stack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]


def run(stack: Stack, cache: StackCache, ids: torch.Tensor) -> torch.Tensor:
    return stack.run(ids, cache=cache, start=cache.length, logits_for=0)


def whole_stack(model: TinyModel) -> tuple[Stack, StackCache]:
    stack = load_stack(model.checkpoint, 0, BLOCKS)
    return stack, stack.new_cache()


def test_appending_a_token_does_not_move_what_is_held(llama: TinyModel) -> None:
    stack, cache = whole_stack(llama)
    run(stack, cache, some_ids(40))
    places, size = [layer.keys.data_ptr() for layer in cache.held], cache.byte_count
    for _ in range(24):
        run(stack, cache, some_ids(1))
    assert [layer.keys.data_ptr() for layer in cache.held] == places
    assert cache.byte_count == size


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_text_that_outgrows_its_room_many_times_equals_the_whole_model(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    stack, cache = whole_stack(model)
    ids = some_ids(120)
    chunks = ids.split([33, 33, 1, 1, 1, 30, 20, 1], dim=1)
    parts = [run(stack, cache, chunk) for chunk in chunks]
    assert_same(torch.cat(parts, dim=1), whole_logits(model, ids))


def test_a_sliding_layer_forgets_what_its_window_and_a_draft_cannot_need(tiny_model: Get) -> None:
    stack, cache = whole_stack(tiny_model("gemma3_text", False))
    for _ in range(120):
        run(stack, cache, some_ids(1))
    sliding, full = cache.held[0], cache.held[-1]
    assert full.keys.shape[-2] == 120
    bound = 2 * (WINDOW - 1 + ROLLBACK_TOKENS + 1)
    assert WINDOW - 1 + ROLLBACK_TOKENS <= sliding.keys.shape[-2] <= bound
    assert sliding.buffers[0].room.shape[-2] <= bound


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_a_rolled_back_session_goes_on_as_if_it_had_never_been_longer(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    stack, cache = whole_stack(model)
    kept = some_ids(70)
    run(stack, cache, kept)
    for length, seed in ((68, 1), (60, 2), (61, 3), (20, 4), (3, 5)):
        run(stack, cache, some_ids(5, seed=seed))
        cache.rollback(length)
        kept = torch.cat([kept[:, :length], some_ids(2, seed=9)], dim=1)
        ours = run(stack, cache, kept[:, length:])
        assert_same(ours, whole_logits(model, kept)[:, length:])
        assert cache.length == length + 2


def test_a_sliding_layer_refuses_to_go_back_further_than_it_remembers(tiny_model: Get) -> None:
    stack, cache = whole_stack(tiny_model("gemma3_text", False))
    for _ in range(3):
        run(stack, cache, some_ids(40))
    assert cache.can_roll_back(120 - ROLLBACK_TOKENS)
    assert not cache.can_roll_back(WINDOW)
    with pytest.raises(BlocksError, match="cannot go back from 120 to 5"):
        cache.rollback(WINDOW)
    assert cache.length == 120


def test_recurrent_layers_go_back_to_nothing_or_nowhere(tiny_model: Get) -> None:
    model = tiny_model("qwen3_next", False)
    stack, cache = whole_stack(model)
    run(stack, cache, some_ids(6, seed=1))
    assert [cache.can_roll_back(length) for length in (0, 3, 6, 7)] == [True, False, True, False]
    with pytest.raises(BlocksError, match="cannot go back from 6 to 3"):
        cache.rollback(3)
    cache.rollback(0)
    ids = some_ids(6)
    assert_same(run(stack, cache, ids), whole_logits(model, ids))


def test_a_session_cannot_be_rolled_forward(llama: TinyModel) -> None:
    _, cache = whole_stack(llama)
    with pytest.raises(StepError, match="position 1 is beyond the 0 held"):
        cache.rollback(1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "bloom"])
def test_layers_held_elsewhere_store_nothing(tiny_model: Get, family: str) -> None:
    checkpoint = tiny_model(family, False).checkpoint
    stack = load_stack(checkpoint, 2, 4)
    cache = stack.new_cache()
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    stack.run(hidden, cache=cache)
    for number, layer in enumerate(cache.layers):
        if number not in (2, 3):
            assert not any(torch.is_tensor(one) and one.dim() for one in vars(layer).values())
    assert cache.byte_count > 0


def test_bytes_are_those_of_keys_and_values(llama: TinyModel) -> None:
    stack, cache = whole_stack(llama)
    assert cache.byte_count == 0
    run(stack, cache, some_ids(10))
    per_token = BLOCKS * 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 numbers of 4 bytes
    assert cache.used_byte_count == 10 * per_token
    assert cache.byte_count == 64 * per_token


def test_dropping_a_cache_frees_its_memory_without_the_garbage_collector(llama: TinyModel) -> None:
    stack, cache = whole_stack(llama)
    run(stack, cache, some_ids(3))
    watched = weakref.ref(cache.held[0])
    gc.disable()
    try:
        del cache
        assert watched() is None
    finally:
        gc.enable()


def test_a_beam_search_may_reorder_rows_between_steps(llama: TinyModel) -> None:
    stack, cache = whole_stack(llama)
    ids = some_ids(8, rows=2)
    run(stack, cache, ids)
    cache.reorder_cache(torch.tensor([1, 1]))
    more = some_ids(2, rows=2, seed=1)
    both = torch.cat([ids[[1, 1]], more], dim=1)
    assert_same(run(stack, cache, more), whole_logits(llama, both)[:, 8:])
