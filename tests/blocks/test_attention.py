"""Sessions that are attended to apart get to the bit what each gets alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import BLOCKS, TinyModel, assert_same, some_ids, whole_logits
from torch.nn import functional

from blocks.attention import Rows
from blocks.cache import StackCache
from blocks.errors import BlocksError
from blocks.hf.attention import configs_of
from blocks.load import Dtype, load_stack
from blocks.packed import can_pack, pack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]
LENGTHS = (9, 4, 6, 9, 1)  # around gemma3's window
STEPS = 3
ANY_SIZE = {torch.float32: 1, torch.bfloat16: 1}

# Grouped heads, norms on heads, capped and sliding, learned positions, sinks, a mixture, recurrent
# layers beside attention, and layers that share keys.
APART = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "mixtral",
    "qwen3_next",
    "falcon_h1",
    "gemma3n_text",
)
# Alibi; keys expanded or repeated behind the cache; masks of their own, one at the head only.
TOGETHER = ("bloom", "deepseek_v3", "jetmoe", "doge", "gemma4_unified", "deepseek_v32")


def begun(stack: Stack, texts: Sequence[torch.Tensor]) -> list[StackCache]:
    """Caches of sessions that have read their texts."""
    caches = [stack.new_cache() for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        stack.run(text, cache=cache)
    return caches


def step_both_ways(
    stack: Stack, texts: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of the last ids of the texts, joined and alone, one id a step."""
    pasts = [text[:, :-STEPS] for text in texts]
    joined, alone = begun(stack, pasts), begun(stack, pasts)
    pairs = []
    for step in range(-STEPS, 0):
        ids = [text[:, text.shape[1] + step, None] for text in texts]
        together = stack.run_joined(ids, joined, wants_logits=[True] * len(ids))
        for one, cache, row in zip(ids, alone, together, strict=True):
            pairs.append((row, stack.run(one, cache=cache, start=cache.length, logits_for=1)))
    return pairs


def texts_of(lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    return [some_ids(length + STEPS, seed=seed) for seed, length in enumerate(lengths)]


@pytest.mark.parametrize("family", APART)
def test_rows_attended_to_apart_get_what_each_gets_alone_and_nothing_is_padded(
    tiny_model: Get, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, False)
    stack, texts = load_stack(model.checkpoint, 0, BLOCKS), texts_of()
    stack.run_joined([some_ids(1)] * 2, begun(stack, texts[:2]))  # the first tries its blocks
    monkeypatch.delattr("blocks.join._padded")
    for joined, alone in step_both_ways(stack, texts):
        torch.testing.assert_close(joined, alone, rtol=0, atol=2e-5)
    (cache,) = begun(stack, texts[:1])
    again = stack.run(some_ids(1), cache=cache, start=cache.length, logits_for=1)
    text = torch.cat([texts[0], some_ids(1)], dim=1)
    assert_same(again, whole_logits(model, text)[:, -1:])  # no trace of rows is left


@pytest.mark.parametrize("family", TOGETHER)
def test_a_family_that_cannot_be_attended_to_apart_is_padded(tiny_model: Get, family: str) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    names = {config._attn_implementation for config in configs_of(stack._carved.model)}
    texts = texts_of((9, 4))
    for joined, alone in step_both_ways(stack, texts):
        assert_same(joined, alone)
    assert not stack.joins_by_rows
    assert names == {config._attn_implementation for config in configs_of(stack._carved.model)}


@pytest.mark.parametrize(
    ("where", "put"),
    [
        ("blocks.attention.Rows._apart", lambda self, module, query, *_: query.transpose(1, 2)),
        ("blocks.attention.Rows.is_whole", False),
    ],
)
def test_a_family_is_padded_if_the_trial_of_a_block_says_so(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, where: str, put: object
) -> None:
    stack, texts = load_stack(llama.checkpoint, 0, BLOCKS), texts_of((9, 4))
    monkeypatch.setattr(where, put)
    for joined, alone in step_both_ways(stack, texts):
        assert_same(joined, alone)
    assert not stack.joins_by_rows


@pytest.mark.parametrize(("kind", "is_apart"), [("bfloat16", True), ("float32", False)])
def test_logits_are_judged_by_the_precision_they_are_computed_in_not_by_their_own(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: Dtype, is_apart: bool
) -> None:
    apart = Rows._apart

    def nearly(self: Rows, *given: Any) -> torch.Tensor:
        return apart(self, *given) * 1.01

    monkeypatch.setattr(Rows, "_apart", nearly)
    stack = load_stack(llama.checkpoint, BLOCKS - 1, BLOCKS, dtype=kind)
    assert stack.joins_by_rows == is_apart


def test_what_an_indexer_chooses_among_is_never_taken_apart(
    tiny_model: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocks.apart._is_seen", lambda carved, one: True)
    assert not load_stack(tiny_model("deepseek_v32", False).checkpoint, 2, 4).joins_by_rows
    assert load_stack(tiny_model("llama", False).checkpoint, 2, 4).joins_by_rows


@pytest.mark.skipif(not can_pack(), reason="plain matrices round by how many rows there are")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_session_of_a_packed_stack_gets_the_same_bits_alone_and_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: Dtype
) -> None:
    # what is left of a row by vectors of 32 would be rounded in another way than the vectors
    wide = {**tiny_models.FAMILIES["llama"], "intermediate_size": 64}
    monkeypatch.setitem(tiny_models.FAMILIES, family, wide)
    checkpoint = tiny_models.build(family, tmp_path, tied=False).checkpoint
    stack = load_stack(checkpoint, 0, BLOCKS, dtype=kind)
    pack(stack._carved.model, least_values=ANY_SIZE)
    for joined, alone in step_both_ways(stack, texts_of((9, 4, 6, 1, 30, 17, 70))):
        assert torch.equal(joined, alone)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_heads_that_share_a_key_head_attend_as_they_do_apart(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, 16, generator=generator).to(kind)
        for heads, length in ((8, 1), (2, 40), (2, 40))
    )
    rows = Rows("sdpa", (), is_joint=False)
    ours = rows.attend(torch.nn.Identity(), query, key, value, scaling=0.3)
    theirs = functional.scaled_dot_product_attention(
        query.float(),
        key.float().repeat_interleave(4, 1),
        value.float().repeat_interleave(4, 1),
        scale=0.3,
    )
    assert ours.shape == (3, 1, 8, 16)
    torch.testing.assert_close(ours.float(), theirs.transpose(1, 2), rtol=0, atol=2e-2)


def test_half_precision_alone_attends_by_key_heads(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS, dtype="bfloat16")
    (cache,) = begun(stack, [some_ids(5)])
    stack.run(some_ids(1), cache=cache, start=5)
    calls: list[int] = []
    monkeypatch.setattr(
        "blocks.attention._by_key_head",
        lambda query, pasts, scale: calls.append(1) or torch.zeros_like(query),
    )
    stack.run(some_ids(1), cache=cache, start=6)
    assert len(calls) == BLOCKS
    stack.run(some_ids(2), cache=cache, start=7)
    assert len(calls) == BLOCKS


def test_keys_that_are_not_as_the_cache_gave_them_are_refused() -> None:
    rows = Rows("sdpa", (), is_joint=True)
    new = torch.ones(2, 1, 1, 4)
    past = torch.ones(1, 1, 3, 4)
    rows.keep(new, new, [(past, past)] * 2)
    assert not rows.is_whole
    with pytest.raises(BlocksError, match="Identity changes what its cache gives it"):
        rows.attend(torch.nn.Identity(), new, new.clone(), new)
    with pytest.raises(BlocksError, match="Identity changes what its cache gives it"):
        rows.attend(torch.nn.Identity(), new, new, new.clone())
    assert not rows.is_whole


def test_a_step_that_breaks_leaves_the_familys_own_attention(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    caches = begun(stack, [some_ids(4), some_ids(3)])
    stack.run_joined([some_ids(1)] * 2, caches)

    def fail(*_: object) -> None:
        raise RuntimeError

    with (
        stack._carved.parts.layers[3].register_forward_pre_hook(fail),
        pytest.raises(RuntimeError),
    ):
        stack.run_joined([some_ids(1)] * 2, caches)
    text = some_ids(6)
    assert_same(stack.run(text, logits_for=0), whole_logits(llama, text))
