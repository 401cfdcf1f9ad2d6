"""What layers need beside the hidden state arrives, whichever stacks they are in."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from test_executor import collected
from tiny_models import (
    BLOCKS,
    CUTS,
    WITH_SIDES,
    TinyModel,
    assert_same,
    load_cut,
    logits_of,
    some_ids,
    whole_logits,
)
from transformers import AutoModelForCausalLM, DynamicCache

from blocks.codec import Payload, from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.errors import BlocksError, StepError
from blocks.executor import Executor, StepJob
from blocks.hf.forwards import cache_argument
from blocks.load import load_stack
from blocks.sides import Sides
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
CHUNKS = (6, 3, 4, 1, 1, 1)
THREE = CUTS[0]
# blocks that reuse keys next to the one that stores them, and a stack between that only passes on
CUT_IN_SHARED = (range(4), range(4, 5), range(5, 6))


def whole_cached(model: TinyModel, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes of these chunks, one after the other. Some families' cached
    steps are not quite their full forward: ours are to be theirs.
    """
    cache, parts, start = DynamicCache(config=model.whole.config), [], 0
    # zamba's own scan of several positions forgets what went before them
    forgets = model.checkpoint.model_type == "zamba"
    chunks = [CHUNKS[0], *[1] * sum(CHUNKS[1:])] if forgets else list(CHUNKS)
    with torch.inference_mode():
        for chunk in ids.split(chunks, dim=1):
            positions = torch.arange(start, start + chunk.shape[1])[None]
            more: dict[str, Any] = {"position_ids": positions}
            if "zamba" in model.checkpoint.model_type:
                more = {}
            more[cache_argument(model.whole.model)] = cache
            parts.append(model.whole(chunk, use_cache=True, **more).logits)
            start += chunk.shape[1]
    return torch.cat(parts, dim=1)


def fresh(stacks: Sequence[Stack]) -> list[Any]:
    return [stack.new_cache() for stack in stacks]


@pytest.mark.parametrize("cut", [THREE, CUT_IN_SHARED], ids=["three", "shared"])
@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in WITH_SIDES), ("gemma3n_text", False)]
)
def test_three_stacks_compute_what_the_whole_model_computes(
    tiny_model: Get, family: str, tied: bool, cut: tuple[range, ...]
) -> None:
    model = tiny_model(family, tied)
    stacks = load_cut(model.checkpoint, cut)
    ids = some_ids(13, rows=2)
    assert_same(logits_of(stacks, ids), whole_logits(model, ids))
    ids, caches = some_ids(16), fresh(stacks)
    ours = [logits_of(stacks, chunk, caches) for chunk in ids.split(list(CHUNKS), dim=1)]
    assert_same(torch.cat(ours, dim=1), whole_cached(model, ids))


def through(
    executors: Sequence[tuple[Executor, Stack]], serial: int, start: int, ids: torch.Tensor
) -> torch.Tensor:
    """The logits of one step, largest first, sent as payloads from one executor to the next."""
    payload: Payload = {"ids": to_raw(ids.int())}
    for executor, stack in executors:
        settings: dict[str, Any] = {"first": stack.start, "stop": stack.stop, "payload": payload}
        wish = CandidateWish(0)
        executor.submit(StepJob(key="leg", serial=serial, start=start, candidates=wish, **settings))
        (done,) = collected(executor, 1)
        assert done.error is None
        payload = done.output
    return from_raw(payload["logits"])


@pytest.mark.parametrize("family", WITH_SIDES)
def test_payloads_between_executors_carry_what_later_blocks_need(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    model = tiny_model(family, True)
    executors = [(Executor(stack, thread), stack) for stack in load_cut(model.checkpoint, THREE)]
    ids, start, parts = some_ids(16), 0, []
    for serial, chunk in enumerate(ids.split(list(CHUNKS), dim=1)):
        parts.append(through(executors, serial, start, chunk))
        start += chunk.shape[1]
    theirs = whole_cached(model, ids)[0].sort(descending=True).values
    assert_same(torch.cat(parts), theirs)
    for executor, _ in executors:
        executor.close()


@pytest.mark.parametrize("family", WITH_SIDES)
def test_the_last_logits_are_those_of_all_positions(tiny_model: Get, family: str) -> None:
    # gemma4 leaves out positions nobody asked for as soon as layers share keys
    model = tiny_model(family, True)
    ids = some_ids(9, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    stack = load_stack(model.checkpoint, 0, BLOCKS)
    sides = Sides()
    hidden = stack.part(0, 2).run(ids, mask=mask, sides=sides)
    last = stack.part(2, BLOCKS)
    every = last.run(hidden, mask=mask, logits_for=0, sides=dict(sides))
    for wanted in (1, 2):
        ours = last.run(hidden, mask=mask, logits_for=wanted, sides=dict(sides))
        assert_same(ours, every[:, -wanted:])
        assert_same(stack.run(ids, mask=mask, logits_for=wanted), every[:, -wanted:])


@pytest.fixture(scope="module")
def thread() -> Iterator[ComputeThread]:
    with ComputeThread(1) as thread:
        yield thread


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "zamba2", "deepseek_v4"])
def test_parts_of_one_stack_exchange_sides_as_stacks_do(tiny_model: Get, family: str) -> None:
    model = tiny_model(family, True)
    held = load_stack(model.checkpoint, 0, BLOCKS)
    parts = [held.part(span.start, span.stop) for span in CUT_IN_SHARED]
    ids, caches = some_ids(16), fresh(parts)
    ours = [logits_of(parts, chunk, caches) for chunk in ids.split(list(CHUNKS), dim=1)]
    assert_same(torch.cat(ours, dim=1), whole_cached(model, ids))
    assert_same(logits_of([held], ids), whole_logits(model, ids))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_shared_keys_are_padded_and_rolled_back_with_the_session(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, True)
    stacks = load_cut(model.checkpoint, CUT_IN_SHARED)
    caches = fresh(stacks)
    logits_of(stacks, some_ids(9), caches)
    logits_of(stacks, some_ids(4, seed=1), caches)
    for cache in caches:
        cache.rollback(9)
    both = torch.cat([some_ids(9), some_ids(3, seed=2)], dim=1)
    assert_same(logits_of(stacks, both[:, 9:], caches), whole_logits(model, both)[:, 9:])

    ids = some_ids(9, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = whole_logits(model, ids, attention_mask=mask, position_ids=positions)
    caches = fresh(stacks)
    first = logits_of(stacks, ids[:, :7], caches, mask[:, :7])
    ours = torch.cat([first, logits_of(stacks, ids[:, 7:], caches, mask)], dim=1)
    assert_same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "zamba2"])
def test_joined_sessions_bring_their_sides(tiny_model: Get, family: str) -> None:
    model = tiny_model(family, True)
    stacks = load_cut(model.checkpoint, CUT_IN_SHARED)
    texts = [some_ids(length, seed=length) for length in (10, 5, 7)]
    caches = [fresh(stacks) for _ in texts]
    for text, own in zip(texts, caches, strict=True):
        logits_of(stacks, text[:, :-1], own)
    values: Sequence[torch.Tensor] = [text[:, -1:] for text in texts]
    sides = [Sides() for _ in texts]
    for number, stack in enumerate(stacks):
        held = [own[number] for own in caches]
        wanted = [stack.holds_head] * len(held)
        values = stack.run_joined(values, held, wants_logits=wanted, sides=sides)
    for row, text in zip(values, texts, strict=True):
        torch.testing.assert_close(row[0], whole_logits(model, text)[0, -1:], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "reason"), [("zaya", "hand on"), ("deepseek_v4", "stores a")])
def test_what_cannot_be_joined_says_why(tiny_model: Get, family: str, reason: str) -> None:
    stack = load_stack(tiny_model(family, True).checkpoint, 2, 5)
    assert reason in (stack.why_not_joined or "")


def given_to(model: TinyModel, start: int, ids: torch.Tensor) -> tuple[torch.Tensor, Sides]:
    """What blocks before `start` make of ids."""
    sides = Sides()
    return load_stack(model.checkpoint, 0, start).run(ids, sides=sides), sides


@pytest.mark.parametrize(
    ("family", "needs"),
    [
        ("gemma3n_text", ("per_layer", "keys.2", "values.2", "keys.3", "values.3")),
        ("gemma4_text", ("per_layer", "keys.1", "values.1", "keys.2", "values.2")),
        ("zamba2", ("first",)),
        ("deepseek_v4", ("ids",)),
        ("zaya", ("carried",)),
    ],
)
def test_a_missing_side_is_the_senders_fault_and_named(
    tiny_model: Get, family: str, needs: tuple[str, ...]
) -> None:
    model = tiny_model(family, True)
    hidden, sides = given_to(model, 4, some_ids(3))
    stack = load_stack(model.checkpoint, 4, BLOCKS)
    assert stack.needs == needs
    assert tuple(sides) == needs
    cache = stack.new_cache()
    for name in needs:
        fewer = {other: side for other, side in sides.items() if other != name}
        with pytest.raises(StepError, match=f'need "{name}" beside'):
            stack.run(hidden, cache=cache, sides=fewer)
        shorter = {**sides, name: sides[name][:, 1:]}
        with pytest.raises(StepError, match=f'"{name}" of 1 rows and 3 positions cannot'):
            stack.run(hidden, cache=cache, sides=shorter)
    with pytest.raises(StepError, match="beside hidden states"):
        stack.run(hidden, cache=cache)
    assert (cache.length, cache.is_torn, cache.byte_count) == (0, False, 0)
    stack.run(hidden, cache=cache, sides=sides)


@pytest.mark.parametrize(
    ("family", "name", "wrong", "reason"),
    [
        ("deepseek_v4", "ids", torch.full((1, 3), 96), "below the vocabulary's 96"),
        ("deepseek_v4", "ids", torch.zeros(1, 3), '"ids" cannot be torch.float32'),
        ("deepseek_v4", "ids", torch.ones(1, 3, dtype=torch.bool), '"ids" cannot be torch.bool'),
        ("hy_v4", "carried", torch.full((1, 3, 2), 3), "among the 3 positions there are"),
        ("hy_v4", "carried", torch.full((1, 3, 2), -1), "among the 3 positions there are"),
        ("hy_v4", "carried", torch.zeros(1, 3, 0, dtype=torch.long), "cannot have shape"),
        ("hy_v4", "carried", torch.zeros(1, 3, 2), '"carried" cannot be torch.float32'),
        ("zaya", "carried", torch.zeros(1, 3, 2, dtype=torch.long), "cannot be torch.int64"),
        ("zamba2", "first", torch.zeros(1, 3, 64, dtype=torch.long), "cannot be torch.int64"),
        ("zamba2", "first", torch.zeros(1, 3, 63), "cannot have shape"),
    ],
)
def test_sides_of_another_kind_are_the_senders_fault(
    tiny_model: Get, family: str, name: str, wrong: torch.Tensor, reason: str
) -> None:
    model = tiny_model(family, True)
    hidden, sides = given_to(model, 2, some_ids(3))
    stack = load_stack(model.checkpoint, 2, 4)
    with pytest.raises(StepError, match=reason):
        stack.run(hidden, sides={**sides, name: wrong})


def test_hidden_states_have_the_streams_of_their_family(tiny_model: Get) -> None:
    model = tiny_model("gemma3n_text", True)
    hidden, sides = given_to(model, 2, some_ids(3))
    assert hidden.shape == (1, 3, 4, 64)
    stack = load_stack(model.checkpoint, 2, 4)
    with pytest.raises(StepError, match="hidden states end in"):
        stack.run(hidden[:, :, 0], sides=sides)


def test_executors_refuse_a_payload_without_a_needed_side(
    tiny_model: Get, thread: ComputeThread
) -> None:
    model = tiny_model("zamba2", False)
    hidden, _ = given_to(model, 2, some_ids(3))
    executor = Executor(load_stack(model.checkpoint, 2, BLOCKS), thread)
    payload = {"hidden": to_raw(hidden)}
    executor.submit(StepJob(key="a", serial=1, start=0, first=2, stop=BLOCKS, payload=payload))
    (done,) = collected(executor, 1)
    assert done.fault
    assert done.error == 'blocks from 2 on need "first" beside hidden states'
    executor.close()


@pytest.mark.parametrize("family", ["gemma3n_text", "zamba2", "deepseek_v4"])
def test_half_precision_is_that_of_most_weights_and_computes_what_the_whole_model_does(
    tiny_model: Get, family: str
) -> None:
    checkpoint = tiny_model(family, True).checkpoint  # deepseek_v4 keeps its streams in float32
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16)
    spans = [(span.start, span.stop) for span in THREE]
    stacks = [load_stack(checkpoint, *span, dtype="bfloat16") for span in spans]
    assert {stack.dtype for stack in stacks} == {torch.bfloat16}
    with torch.inference_mode():
        theirs = whole(some_ids(13), use_cache=False).logits.float()
    assert_same(logits_of(stacks, some_ids(13)), theirs)


@pytest.mark.parametrize("family", [name for name in WITH_SIDES if name != "zamba"])
def test_what_one_pass_over_several_positions_gives_can_be_taken_position_by_position(
    tiny_model: Get, family: str
) -> None:
    # as when steps share a pass on one hop and come one after the other to the next
    model = tiny_model(family, True)
    hidden, sides = given_to(model, 2, some_ids(9))
    stack = load_stack(model.checkpoint, 2, BLOCKS)
    cache, parts = stack.new_cache(), []
    for number in range(9):
        one = slice(number, number + 1)
        beside = {name: side[:, one] for name, side in sides.items()}
        parts.append(
            stack.run(hidden[:, one], cache=cache, start=number, logits_for=1, sides=beside)
        )
    theirs = whole_logits(model, some_ids(9))
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs, rtol=0, atol=5e-5)


def test_families_without_sides_send_none_and_need_none(llama: TinyModel) -> None:
    stacks = load_cut(llama.checkpoint, THREE)
    assert [stack.needs for stack in stacks] == [(), (), ()]
    _, sides = given_to(llama, 2, some_ids(3))
    assert sides == {}


def test_only_the_first_stack_loads_the_second_table_by_token(tiny_model: Get) -> None:
    checkpoint = tiny_model("gemma3n_text", True).checkpoint
    has_table = [
        any("embed_tokens_per_layer" in name for name in stack._carved.model.state_dict())
        for stack in load_cut(checkpoint, THREE)
    ]
    assert has_table == [True, False, False]


def test_weights_that_layers_share_are_loaded_once_wherever_they_are_needed(
    tiny_model: Get,
) -> None:
    checkpoint = tiny_model("zamba", True).checkpoint
    stack = load_stack(checkpoint, 5, BLOCKS)  # block 2 has them on disk
    layers = stack._carved.parts.layers
    ours, lent = layers[5].shared_transf, layers[2].shared_transf
    assert list(ours.parameters())
    for one, other in zip(ours.parameters(), lent.parameters(), strict=True):
        assert one is other
        assert not one.is_meta
    rest = {name for name, _ in layers[2].named_parameters()} - {
        f"shared_transf.{name}" for name, _ in lent.named_parameters()
    }
    assert rest == set()


def test_gradients_run_where_no_side_has_one_and_are_refused_elsewhere(tiny_model: Get) -> None:
    ids = some_ids(5)
    model = tiny_model("deepseek_v4", False)
    hidden, sides = given_to(model, 2, ids)
    stack = load_stack(model.checkpoint, 2, 4)
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    ours = stack.backward(hidden, grad, sides=sides)
    step = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)) * 1e-2
    risen, fallen = (stack.run(hidden + way * step, sides=dict(sides)) for way in (1, -1))
    measured = ((risen - fallen) / 2 * grad).sum()
    torch.testing.assert_close((ours * step).sum(), measured, rtol=2e-2, atol=0)

    model = tiny_model("gemma4_text", False)
    for start, named in ((1, "per_layer"), (4, "per_layer")):
        hidden, sides = given_to(model, start, ids)
        stack = load_stack(model.checkpoint, start, start + 1)
        with pytest.raises(BlocksError, match=f'gradients through "{named}"'):
            stack.backward(hidden, hidden, sides=sides)


@pytest.mark.parametrize("family", [name for name in WITH_SIDES if name != "zaya"])
def test_a_sample_to_measure_with_runs(tiny_model: Get, family: str) -> None:
    stack = load_stack(tiny_model(family, True).checkpoint, 4, BLOCKS)
    hidden, sides = stack.sample(3)
    assert stack.run(hidden, cache=stack.new_cache(), sides=sides).shape == hidden.shape
