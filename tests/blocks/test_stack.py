"""A model cut in stacks computes what the whole model computes."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_models import (
    BLOCKS,
    CUTS,
    PROVEN,
    TinyModel,
    assert_same,
    load_cut,
    logits_of,
    some_ids,
    whole_logits,
)

from blocks.errors import BlocksError, StepError
from blocks.load import load_stack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]


@pytest.fixture(params=[(family, tied) for family in PROVEN for tied in (True, False)], ids=str)
def model(request: pytest.FixtureRequest, tiny_model: Get) -> TinyModel:
    return tiny_model(*request.param)


def fresh_caches(stacks: Sequence[Stack]) -> list:
    return [stack.new_cache() for stack in stacks]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: " ".join(f"{s.start}:{s.stop}" for s in cut))
def test_ids_to_logits_in_one_forward_equals_the_whole_model(
    model: TinyModel, cut: tuple[range, ...]
) -> None:
    ids = some_ids(13, rows=2)
    assert_same(logits_of(load_cut(model.checkpoint, cut), ids), whole_logits(model, ids))


def test_chunked_prefill_decode_and_rollback_equal_the_whole_model(model: TinyModel) -> None:
    stacks = load_cut(model.checkpoint, CUTS[0])
    caches = fresh_caches(stacks)
    ids = some_ids(16)
    parts = [logits_of(stacks, chunk, caches) for chunk in ids.split([6, 3, 4, 1, 1, 1], dim=1)]
    assert_same(torch.cat(parts, dim=1), whole_logits(model, ids))

    for cache in caches:
        cache.rollback(9)
    other = torch.cat([ids[:, :9], some_ids(5, seed=1)], dim=1)
    parts = [logits_of(stacks, chunk, caches) for chunk in other[:, 9:].split([1, 3, 1], dim=1)]
    assert_same(torch.cat(parts, dim=1), whole_logits(model, other)[:, 9:])


def test_a_left_padded_batch_equals_the_whole_model(model: TinyModel) -> None:
    stacks = load_cut(model.checkpoint, CUTS[1])
    ids = some_ids(9, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    if model.checkpoint.model_type == "bloom":
        del arguments["position_ids"]
    theirs = whole_logits(model, ids, **arguments)
    caches = fresh_caches(stacks)
    first = logits_of(stacks, ids[:, :7], caches, mask[:, :7])
    second = logits_of(stacks, ids[:, 7:], caches, mask)
    ours = torch.cat([first, second], dim=1)
    assert_same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("family", ["falcon_mamba", "zamba"])
def test_a_later_chunk_has_its_past_where_the_familys_own_code_forgets_it(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, True)
    stacks = load_cut(model.checkpoint, CUTS[0])
    ids, chunks = some_ids(16), [6, 3, 4, 1, 1, 1]
    caches = fresh_caches(stacks)
    parts = [logits_of(stacks, chunk, caches) for chunk in ids.split(chunks, dim=1)]
    assert_same(torch.cat(parts, dim=1), whole_logits(model, ids))

    whole = load_stack(model.checkpoint, 0, BLOCKS)
    cache = whole.new_cache()
    whole.run(ids[:, :6], cache=cache)
    last = whole.run(ids[:, 6:], cache=cache, start=6, logits_for=2)
    assert_same(last, whole_logits(model, ids)[:, -2:])


@pytest.mark.parametrize("family", [*PROVEN, "qwen3_next", "falcon_mamba"])
def test_two_interleaved_sessions_do_not_mix(tiny_model: Get, family: str) -> None:
    model = tiny_model(family, False)
    stacks = load_cut(model.checkpoint, CUTS[1])
    texts = [some_ids(8, seed=seed) for seed in (1, 2)]
    caches = [fresh_caches(stacks) for _ in texts]
    parts: list[list[torch.Tensor]] = [[], []]
    for piece in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8)):
        for text, own, got in zip(texts, caches, parts, strict=True):
            got.append(logits_of(stacks, text[:, piece], own))
    for text, got in zip(texts, parts, strict=True):
        assert_same(torch.cat(got, dim=1), whole_logits(model, text))


def test_parts_of_one_stack_equal_the_whole_model(model: TinyModel) -> None:
    held = load_stack(model.checkpoint, 0, BLOCKS)
    parts = [held.part(0, 1), held.part(1, 4), held.part(4, BLOCKS)]
    ids = some_ids(10)
    caches = fresh_caches(parts)
    chunks = [logits_of(parts, chunk, caches) for chunk in ids.split([7, 1, 1, 1], dim=1)]
    assert_same(torch.cat(chunks, dim=1), whole_logits(model, ids))
    assert_same(logits_of([held], ids), whole_logits(model, ids))  # and it is whole again


def test_a_part_runs_and_stores_nothing_of_the_other_blocks(llama: TinyModel) -> None:
    held = load_stack(llama.checkpoint, 0, BLOCKS)
    ran: list[int] = []
    for number, layer in enumerate(held._carved.parts.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    part = held.part(2, 4)
    cache = part.new_cache()
    part.run(torch.zeros(1, 3, 32), cache=cache)
    assert ran == [2, 3]
    assert [layer.keys is not None for layer in cache.layers] == [n in ran for n in range(BLOCKS)]


def test_a_part_has_only_the_ends_that_belong_to_it(llama: TinyModel) -> None:
    held = load_stack(llama.checkpoint, 0, BLOCKS)
    ends = [(part.holds_embedding, part.holds_head) for part in (held.part(0, 3), held.part(3, 6))]
    assert ends == [(True, False), (False, True)]
    with pytest.raises(StepError, match="not within 1:3"):
        held.part(1, 3).part(0, 2)


def test_hidden_states_between_any_blocks_are_those_of_the_whole_model(model: TinyModel) -> None:
    ids = some_ids(7)
    with torch.inference_mode():
        theirs = model.whole(input_ids=ids, output_hidden_states=True).hidden_states
    first, last = load_cut(model.checkpoint, CUTS[1])
    hidden = first.run(ids)
    assert_same(hidden, theirs[3])
    assert_same(first.run(theirs[0]), theirs[3])  # hidden states in at block 0, past the embedding
    # the whole model gives its last hidden state after the final norm; ours is before it
    assert_same(last.part(3, 5).run(hidden), theirs[5])
    assert_same(last.part(5, 6).run(theirs[5]), last.run(hidden))


def test_logits_are_given_for_the_last_positions_asked_for(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    ids = some_ids(6)
    all_of_them = stack.run(ids, logits_for=0)
    assert all_of_them.shape == (1, 6, 96)
    assert_same(stack.run(ids, logits_for=2), all_of_them[:, -2:])


def test_bfloat16_stacks_give_float32_logits_near_the_float32_ones(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS, dtype="bfloat16")
    ids = some_ids(6)
    assert stack.run(ids).dtype == torch.bfloat16
    logits = stack.run(ids, logits_for=0)
    assert logits.dtype == torch.float32
    theirs = whole_logits(llama, ids)
    assert (logits - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize(
    ("inputs", "arguments", "reason"),
    [
        (some_ids(3), {"start": 1}, "starts at position 1, but 0 are held"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "need rows and positions"),
        (torch.tensor([3]), {}, "need rows and positions"),
        (torch.tensor([[96]]), {}, "below the vocabulary's 96"),
        (torch.tensor([[-1]]), {}, "below the vocabulary's 96"),
        (torch.tensor([[True]]), {}, "int32 or int64"),
        (some_ids(129), {}, "beyond the context"),
        (torch.zeros(1, 2, 31), {}, "end in an axis of 32"),
        (torch.zeros(1, 32), {}, "end in an axis of 32"),
        (some_ids(3), {"logits_for": 4}, "cannot give the logits"),
        (some_ids(3), {"mask": torch.ones(1, 2, dtype=torch.long)}, "a mask is whole numbers"),
        (some_ids(3), {"mask": torch.ones(1, 3)}, "a mask is whole numbers"),
    ],
)
def test_a_step_that_cannot_be_computed_is_the_senders_fault_and_changes_nothing(
    llama: TinyModel, inputs: torch.Tensor, arguments: dict, reason: str
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    cache = stack.new_cache()
    with pytest.raises(StepError, match=reason):
        stack.run(inputs, cache=cache, **arguments)
    assert (cache.length, cache.byte_count, cache.is_torn) == (0, 0, False)


def test_a_stack_without_an_end_refuses_what_needs_it(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 1, 3)
    with pytest.raises(StepError, match="take hidden states, not ids"):
        stack.run(some_ids(3))
    with pytest.raises(StepError, match="1:3 of 6 cannot give the logits"):
        stack.run(torch.zeros(1, 2, 32), logits_for=1)


def test_another_number_of_rows_than_the_past_has_is_refused(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, 2)
    cache = stack.new_cache()
    stack.run(some_ids(3, rows=2), cache=cache)
    with pytest.raises(StepError, match="1 rows follow a past of 2 rows"):
        stack.run(some_ids(1), cache=cache, start=3)


def test_a_family_that_would_lose_the_past_is_refused(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load_stack(llama.checkpoint, 0, 2)
    monkeypatch.setattr("blocks.hf.forwards.CACHE_NAMES", ())
    with pytest.raises(BlocksError, match="takes no cache"):
        stack.run(some_ids(3), cache=stack.new_cache())
    stack.run(some_ids(3))


def test_a_step_that_breaks_half_way_leaves_a_cache_that_can_only_start_anew(
    llama: TinyModel,
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    cache = stack.new_cache()
    stack.run(some_ids(4), cache=cache)
    weight = stack._carved.parts.layers[3].self_attn.o_proj.weight
    kept, weight.data = weight.data, torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        stack.run(some_ids(1), cache=cache, start=4)
    weight.data = kept
    with pytest.raises(BlocksError, match="failed half way"):
        stack.run(some_ids(1), cache=cache, start=4)
    with pytest.raises(BlocksError, match="cannot go back"):
        cache.rollback(3)
    cache.rollback(0)
    ids = some_ids(5)
    assert_same(stack.run(ids, cache=cache, logits_for=0), whole_logits(llama, ids))
