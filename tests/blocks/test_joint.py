"""Sessions that enter and leave a stack at different blocks run the blocks they share together."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    BLOCKS,
    TinyModel,
    assert_same,
    some_ids,
    whole_logits,
)

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.joint import segments
from blocks.load import load_stack
from blocks.sides import Sides
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]
Spans = Sequence[tuple[int, int]]
SPANS = [(0, 6), (0, 2), (2, 6), (1, 4), (0, 6), (4, 6), (2, 3)]
LENGTHS = (5, 9, 3, 7, 4, 8, 6)

some_spans = st.lists(
    st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda span: span[0] < span[1]),
    min_size=1,
    max_size=6,
)


@given(some_spans, st.booleans())
def test_each_row_runs_its_own_blocks_in_order_each_once(spans: Spans, is_mixed: bool) -> None:
    ran: list[list[int]] = [[] for _ in spans]
    for segment in segments(spans, is_mixed=is_mixed):
        assert segment.rows
        for row in segment.rows:
            ran[row] += segment.blocks
    assert ran == [list(range(*span)) for span in spans]


@given(some_spans)
def test_a_block_runs_once_for_all_rows_that_cross_it(spans: Spans) -> None:
    blocks = [block for segment in segments(spans) for block in segment.blocks]
    assert len(blocks) == len(set(blocks))


def test_rows_of_one_span_have_one_pass() -> None:
    (only,) = segments([(2, 6)] * 3)
    assert (only.blocks, only.rows) == (range(2, 6), (0, 1, 2))


def test_unmixed_rows_share_with_equal_spans_only() -> None:
    found = segments([(0, 4), (2, 4), (0, 4)], is_mixed=False)
    assert [(one.blocks, one.rows) for one in found] == [(range(4), (0, 2)), (range(2, 4), (1,))]


def given_to(stack: Stack, block: int, ids: torch.Tensor) -> tuple[torch.Tensor, Sides]:
    """What the blocks before `block` make of ids."""
    sides = Sides()
    return (stack.part(0, block).run(ids, sides=sides) if block else ids), sides


def with_past(stack: Stack, spans: Spans, texts: Sequence[torch.Tensor]) -> list[StackCache]:
    """Caches of sessions in these spans that have read all but the last id of their texts."""
    caches = []
    for (start, stop), text in zip(spans, texts, strict=True):
        part = stack.part(start, stop)
        values, sides = given_to(stack, start, text[:, :-1])
        caches.append(part.new_cache())
        part.run(values, cache=caches[-1], sides=sides)
    return caches


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt2", "bloom", "qwen3_next", "gemma3n_text", "zamba2"]
)
def test_rows_of_different_spans_get_what_each_gets_alone(tiny_model: Get, family: str) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    texts = [some_ids(length + 1, seed=length) for length in LENGTHS]
    joined, alone = with_past(stack, SPANS, texts), with_past(stack, SPANS, texts)
    wants = [stop == BLOCKS and start != 4 for start, stop in SPANS]
    for step in range(2):
        news = [text[:, -1:] if step == 0 else some_ids(1, seed=99) for text in texts]
        given = []
        for (start, _), text, new in zip(SPANS, texts, news, strict=True):
            longer = text if step == 0 else torch.cat([text, new], dim=1)
            values, sides = given_to(stack, start, longer)
            given.append((values[:, -1:], {name: side[:, -1:] for name, side in sides.items()}))
        beside = [dict(sides) for _, sides in given]
        found = stack.run_joined(
            [values for values, _ in given], joined, wants_logits=wants, sides=beside
        )
        for row, (values, sides) in enumerate(given):
            part = stack.part(*SPANS[row])
            theirs = part.run(
                values,
                cache=alone[row],
                start=alone[row].length,
                logits_for=1 if wants[row] else None,
                sides=sides,
            )
            assert_same(found[row], theirs)
            assert found[row].dtype == torch.float32
            assert beside[row].keys() == sides.keys()
            for name, side in sides.items():
                torch.testing.assert_close(beside[row][name], side, rtol=0, atol=1e-5)
    assert [cache.length for cache in joined] == [length + 2 for length in LENGTHS]


def test_blocks_that_rows_share_run_once(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    spans = [(0, 6), (2, 6), (0, 4)]
    caches = with_past(stack, spans, [some_ids(length) for length in (4, 6, 5)])
    hidden = stack.sample(1)[0]
    stack.run_joined([some_ids(1), hidden, some_ids(1)], caches)  # the first tries its blocks
    rows: dict[int, list[int]] = {number: [] for number in range(BLOCKS)}
    for number, layer in enumerate(stack._carved.parts.layers):
        layer.register_forward_hook(
            lambda layer, args, output, number=number: rows[number].append(len(args[0]))
        )
    stack.run_joined([some_ids(1), hidden, some_ids(1)], caches)
    assert rows == {0: [2], 1: [2], 2: [3], 3: [3], 4: [2], 5: [2]}


def test_ids_and_hidden_states_may_enter_block_0_in_one_step(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    texts = [some_ids(5, seed=1), some_ids(8, seed=2)]
    caches = with_past(stack, [(0, 6), (0, 6)], texts)
    embedded = stack._carved.model.get_input_embeddings()(texts[1][:, -1:])
    found = stack.run_joined(
        [texts[0][:, -1:], embedded.detach()], caches, wants_logits=[True, True]
    )
    for row, text in zip(found, texts, strict=True):
        assert_same(row, whole_logits(llama, text)[:, -1:])


def test_logits_are_for_sessions_that_end_at_the_head(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    caches = with_past(stack, [(0, 6), (0, 4)], [some_ids(4), some_ids(3)])
    with pytest.raises(StepError, match="blocks 0:4 of 6 cannot give the logits"):
        stack.run_joined([some_ids(1)] * 2, caches, wants_logits=[True, True])
    assert [(cache.length, cache.is_torn) for cache in caches] == [(3, False), (2, False)]


def test_a_torn_session_does_not_tear_the_others(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    caches = with_past(stack, [(0, 6), (0, 4)], [some_ids(4), some_ids(3)])
    caches[1].begin(1)
    with pytest.raises(BlocksError, match="an earlier step failed"):
        stack.run_joined([some_ids(1)] * 2, caches)
    assert not caches[0].is_torn


def test_rows_that_were_through_are_torn_too_when_a_later_pass_breaks(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    caches = with_past(stack, [(0, 2), (0, 6), (1, 6)], [some_ids(n) for n in (4, 3, 5)])

    def fail(*_: object) -> None:
        raise RuntimeError

    with (
        stack._carved.parts.layers[3].register_forward_pre_hook(fail),
        pytest.raises(RuntimeError),
    ):
        stack.run_joined([some_ids(1), some_ids(1), stack.sample(1)[0]], caches)
    assert [cache.is_torn for cache in caches] == [True] * 3
