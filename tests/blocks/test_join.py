"""Sessions that share a batch get what each would get alone, and keep what each would keep."""

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
from transformers.cache_utils import DynamicLayer

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.join import why_not_joined
from blocks.load import load_stack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]
LENGTHS = (9, 4, 6, 9)  # two of them as long as one another, and longer than gemma3's window
STEPS = 4


def sessions(stacks: Sequence[Stack], texts: Sequence[torch.Tensor]) -> list[list[StackCache]]:
    """Caches in each stack of sessions that have read their texts, by stack."""
    caches = [[stack.new_cache() for stack in stacks] for _ in texts]
    for text, own in zip(texts, caches, strict=True):
        logits_of(stacks, text, own)
    return [list(held) for held in zip(*caches, strict=True)]


def joined_logits(
    stacks: Sequence[Stack], ids: Sequence[torch.Tensor], caches: Sequence[list[StackCache]]
) -> torch.Tensor:
    """One step of all sessions through all stacks: logits [N, vocabulary]."""
    values: Sequence[torch.Tensor] = ids
    for stack, held in zip(stacks, caches, strict=True):
        values = stack.run_joined(values, held, wants_logits=[stack.holds_head] * len(held))
    return torch.cat(list(values))[:, 0]


@pytest.mark.parametrize("family", [*PROVEN, "qwen3_next", "falcon_mamba", "deepseek_v32"])
def test_joined_sessions_of_different_lengths_get_what_each_gets_alone(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    stacks = load_cut(model.checkpoint, CUTS[0])
    texts = [some_ids(length + STEPS, seed=seed) for seed, length in enumerate(LENGTHS)]
    pasts = [text[:, :-STEPS] for text in texts]
    caches = sessions(stacks, pasts)
    for step in range(STEPS):
        ids = [text[:, length + step, None] for text, length in zip(texts, LENGTHS, strict=True)]
        ours = joined_logits(stacks, ids, caches)
        for row, text, length in zip(ours, texts, LENGTHS, strict=True):
            assert_same(row, whole_logits(model, text[:, : length + step + 1])[0, -1])
    for stack, held in zip(stacks, caches, strict=True):
        assert [cache.length for cache in held] == [length + STEPS for length in LENGTHS]
        assert not any(cache.is_torn for cache in held), stack.start


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "deepseek_v32"])
def test_a_session_goes_on_alone_after_joined_steps_and_takes_no_more_memory(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    stack = load_stack(model.checkpoint, 0, BLOCKS)
    texts = [some_ids(8, seed=1), some_ids(5, seed=2)]
    (caches,) = sessions([stack], texts)
    more = [some_ids(1, seed=seed) for seed in (3, 4)]
    stack.run_joined(more, caches)
    for cache, text, next_one in zip(caches, texts, more, strict=True):
        both = torch.cat([text, next_one, some_ids(3, seed=5)], dim=1)
        alone = stack.new_cache()
        stack.run(both[:, : cache.length], cache=alone)
        assert cache.byte_count == alone.byte_count
        got = stack.run(both[:, -3:], cache=cache, start=cache.length, logits_for=0)
        assert_same(got, whole_logits(model, both)[:, -3:])


def test_hidden_states_join_as_ids_do(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, 4)
    first, rest = stack.part(0, 1), stack.part(1, 4)
    texts = [some_ids(4, seed=1), some_ids(7, seed=2)]
    hidden = [first.run(text) for text in texts]
    (caches,) = sessions([rest], [states[:, :-1] for states in hidden])
    last = [states[:, -1:] for states in hidden]
    joined = rest.run_joined(last, caches)
    assert [row.shape for row in joined] == [(1, 1, 32)] * 2
    for row, text in zip(joined, texts, strict=True):
        assert_same(row, stack.run(text)[:, -1:])


def test_one_session_runs_without_a_joined_cache(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    (caches,) = sessions([stack], [some_ids(4)])
    monkeypatch.delattr("blocks.joint.JoinedCache")
    (ours,) = stack.run_joined([some_ids(1, seed=1)], caches, wants_logits=[True])
    both = torch.cat([some_ids(4), some_ids(1, seed=1)], dim=1)
    assert_same(ours, whole_logits(llama, both)[:, -1:])


def test_layers_that_keep_a_state_of_their_own_are_refused(tiny_model: Get) -> None:
    stack = load_stack(tiny_model("recurrent_gemma", True).checkpoint, 0, BLOCKS)
    (caches,) = sessions([stack], [some_ids(4), some_ids(3)])
    with pytest.raises(BlocksError, match="0:6 keep a state of their own"):
        stack.run_joined([some_ids(1), some_ids(1)], caches)
    assert [cache.length for cache in caches] == [4, 3]


def test_a_family_that_counts_positions_itself_joins_only_behind_its_embedding(
    tiny_model: Get,
) -> None:
    checkpoint = tiny_model("bart", True).checkpoint
    first, rest = load_stack(checkpoint, 0, 2), load_stack(checkpoint, 2, BLOCKS)
    assert first.why_not_joined is not None
    assert "counts positions itself" in first.why_not_joined
    assert rest.why_not_joined is None
    hidden = [first.run(some_ids(length, seed=length)) for length in (6, 3)]
    (caches,) = sessions([rest], [states[:, :-1] for states in hidden])
    last = [states[:, -1:] for states in hidden]
    joined = rest.run_joined(last, caches, wants_logits=[True, True])
    for row, states in zip(joined, hidden, strict=True):
        assert_same(row, rest.run(states, logits_for=1))


@pytest.mark.parametrize(
    ("family", "reason"),
    [("roformer", "counts positions itself"), ("git", "widens masks by positions of its own")],
)
def test_what_runs_the_layers_may_forbid_joining_wherever_they_are(
    tiny_model: Get, family: str, reason: str
) -> None:
    stack = load_stack(tiny_model(family, True).checkpoint, 2, 3)
    assert reason in (stack.why_not_joined or "")


def test_layers_that_count_positions_by_the_caches_length_are_refused(tiny_model: Get) -> None:
    stack = load_stack(tiny_model("llama4_text", True).checkpoint, 2, BLOCKS)
    (caches,) = sessions([stack], [stack.sample(length)[0] for length in (4, 3)])
    with pytest.raises(BlocksError, match="counts positions itself"):
        stack.run_joined([stack.sample(1)[0]] * 2, caches)


def test_a_kind_of_cache_nobody_has_looked_at_is_refused(llama: TinyModel) -> None:
    class Compressed(DynamicLayer):
        """Stores something that a joined cache would have to know."""

    cache = load_stack(llama.checkpoint, 1, 3).new_cache()
    assert why_not_joined(cache) is None
    cache.held[1] = Compressed()
    assert why_not_joined(cache) == "block 2 stores a Compressed, which cannot be joined"


@pytest.mark.parametrize(
    ("inputs", "which", "reason"),
    [
        ([some_ids(1), some_ids(2)], (0, 1), "one position of one row"),
        ([some_ids(1), some_ids(1, rows=2)], (0, 1), "2 rows follow a past of 1"),
        ([some_ids(1), some_ids(1)], (0, 2), "and with a past"),
        ([some_ids(1), some_ids(1)], (0, 0), "one step at a time"),
        ([some_ids(1), torch.full((1, 1), 96)], (0, 1), "below the vocabulary"),
    ],
)
def test_sessions_that_cannot_join_are_the_callers_fault_and_unharmed(
    llama: TinyModel,
    inputs: list[torch.Tensor],
    which: tuple[int, ...],
    reason: str,
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    (caches,) = sessions([stack], [some_ids(4), some_ids(3)])
    caches.append(stack.new_cache())
    with pytest.raises(StepError, match=reason):
        stack.run_joined(inputs, [caches[number] for number in which])
    assert [(cache.length, cache.is_torn) for cache in caches] == [
        (4, False),
        (3, False),
        (0, False),
    ]


def test_a_joined_step_that_breaks_half_way_leaves_every_session_torn(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    (caches,) = sessions([stack], [some_ids(4), some_ids(3)])
    weight = stack._carved.parts.layers[3].self_attn.o_proj.weight
    kept, weight.data = weight.data, torch.zeros(3, 3)
    with pytest.raises(RuntimeError):
        stack.run_joined([some_ids(1), some_ids(1)], caches)
    weight.data = kept
    assert [cache.is_torn for cache in caches] == [True, True]
