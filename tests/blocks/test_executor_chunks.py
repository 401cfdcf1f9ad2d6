"""A long step is computed in chunks, and nobody but those who wait beside it can tell."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_executor import collected, done, ids_job
from test_executor_joint import session
from test_executor_passes import alone, held_up, passes, replay, together
from tiny_models import BLOCKS, VOCABULARY, TinyModel, some_ids

from blocks.codec import Payload, from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Bounds, Done, Executor, FreeJob, StepJob
from blocks.load import load_stack
from blocks.stack import Stack
from blocks.steps import Output
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
LONG = 23  # positions: in chunks of 6 these are four, of 5 and 6
CHUNKED = Bounds(chunk_positions=6)
WISH = CandidateWish(4, (7,))


def long_steps(
    model: TinyModel, thread: ComputeThread, span: tuple[int, int], **changes: Any
) -> list[StepJob]:
    """Three steps of one session for the blocks of a span: two long ones, and a last position."""
    ids = some_ids(2 * LONG + 1, seed=5)
    cuts = [(0, LONG), (LONG, 2 * LONG), (2 * LONG, 2 * LONG + 1)]
    payloads: list[Payload] = [{"ids": to_raw(ids[:, start:stop])} for start, stop in cuts]
    if span[0]:
        with closing(Executor(load_stack(model.checkpoint, 0, span[0]), thread)) as before:
            sent = alone(before, _jobs((0, span[0]), payloads))
        payloads = [done.output for done in sent]
    return _jobs(span, payloads, **changes)


def _jobs(span: tuple[int, int], payloads: list[Payload], **changes: Any) -> list[StepJob]:
    return [
        StepJob(
            key="long",
            serial=number,
            start=number * LONG,
            first=span[0],
            stop=span[1],
            payload=payload,
            **changes,
        )
        for number, payload in enumerate(payloads)
    ]


def assert_alike(ours: list[Done], theirs: list[Done]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.error, mine.length, mine.serial) == (None, other.length, other.serial)
        assert mine.output.keys() == other.output.keys()
        one, two = (
            {name: from_raw(values) for name, values in done.output.items()}
            for done in (mine, other)
        )
        torch.testing.assert_close(_by_token(one), _by_token(two), rtol=1e-5, atol=2e-5)


def _by_token(output: Output) -> Output:
    """With each candidate's logit at its token: two may tie but for rounding, in either order."""
    if "tokens" not in output:
        return output
    tokens, logits = output["tokens"].long(), output["logits"]
    placed = torch.full((len(tokens), VOCABULARY), -torch.inf).scatter(1, tokens, logits)
    return {name: values for name, values in output.items() if name != "tokens"} | {"at": placed}


@contextmanager
def passes_of(stack: Stack) -> Iterator[list[tuple[int, int]]]:
    """Rows and positions of each pass through the stack's first block, as they are computed."""
    seen: list[tuple[int, int]] = []

    def look(_layer: Any, args: Any, named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        seen.append((hidden.shape[0], hidden.shape[1]))

    layer = stack._carved.parts.layers[stack.start]
    with layer.register_forward_pre_hook(look, with_kwargs=True):
        yield seen


@pytest.mark.parametrize(
    ("span", "outputs"),
    [((0, 2), "all"), ((2, 5), "last"), ((4, BLOCKS), "last"), ((0, BLOCKS), "all")],
)
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3_text", "bloom", "qwen3_next", "gemma4_text", "zamba2", "hy_v4", "zaya"],
)
def test_a_step_in_chunks_comes_to_what_it_comes_to_in_one(
    tiny_model: Get, thread: ComputeThread, family: str, span: tuple[int, int], outputs: str
) -> None:
    model = tiny_model(family, False)
    wish = WISH if span[1] == BLOCKS else None
    jobs = long_steps(model, thread, span, outputs=outputs, candidates=wish)
    stack = load_stack(model.checkpoint, *span)
    with closing(Executor(stack, thread)) as executor:
        theirs = alone(executor, jobs)
    with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
        ours = together(executor, thread, jobs)
    assert seen == [(1, 5), (1, 6), (1, 6), (1, 6)] * 2 + [(1, 1)]
    assert_alike(ours, theirs)
    assert passes(ours) == [LONG, LONG, 1]  # the passes of a step are told as one


def test_the_choices_of_an_indexer_fit_together_though_early_chunks_have_fewer(
    tiny_model: Get, thread: ComputeThread
) -> None:
    model = tiny_model("hy_v4", False)
    job = long_steps(model, thread, (0, 2))[0]
    found: list[Done] = []
    for bounds in (Bounds(), Bounds(chunk_positions=3)):  # the indexer chooses four positions
        with closing(Executor(load_stack(model.checkpoint, 0, 2), thread, bounds)) as first:
            sent = done(first, job)
        width = dict(sent.output)["carried"][1][-1]
        after = replace(job, first=2, stop=BLOCKS, payload=sent.output, candidates=WISH)
        with closing(Executor(load_stack(model.checkpoint, 2, BLOCKS), thread, bounds)) as second:
            found.append(done(second, after))
        assert width == 4
    assert_alike(found[1:], found[:1])


@pytest.mark.parametrize("outputs", ["none", "last", "all"])
def test_hidden_states_of_the_last_block_come_whole_from_chunks(
    llama: TinyModel, thread: ComputeThread, outputs: str
) -> None:
    jobs = long_steps(llama, thread, (2, BLOCKS), outputs=outputs)
    stack = load_stack(llama.checkpoint, 2, BLOCKS)
    with closing(Executor(stack, thread)) as executor:
        theirs = alone(executor, jobs)
    with closing(Executor(stack, thread, CHUNKED)) as executor:
        assert_alike(together(executor, thread, jobs), theirs)


def test_decode_steps_of_others_are_computed_after_each_chunk(
    llama: TinyModel, thread: ComputeThread
) -> None:
    span = (0, BLOCKS)
    stack = load_stack(llama.checkpoint, *span)
    others = {key: session(llama, thread, span, key) for key in "abcd"}
    with closing(Executor(stack, thread, Bounds(chunk_positions=6, joint_legs=1))) as executor:
        alone(executor, [jobs[0] for jobs in others.values()])
        waiting = [long_steps(llama, thread, span)[0], *(jobs[1] for jobs in others.values())]
        with passes_of(stack) as seen:
            results = together(executor, thread, waiting)
    assert seen in (
        [(1, 1), (1, 5), (1, 1), (1, 6), (1, 1), (1, 6), (1, 1), (1, 6)],
        [(1, 5), (1, 1), (1, 6), (1, 1), (1, 6), (1, 1), (1, 6), (1, 1)],
    )
    assert {done.error for done in results} == {None}


def test_a_prompt_of_another_client_is_not_held_up_by_many_prompts_of_one(
    llama: TinyModel, thread: ComputeThread
) -> None:
    ids = some_ids(LONG)
    many = [ids_job(1, 0, ids, key=f"many{number}", client="many") for number in range(5)]
    one = ids_job(1, 0, ids, key="one", client="one")
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    with closing(Executor(stack, thread, CHUNKED)) as executor:
        results = together(executor, thread, [*many, one])
    # chunk for chunk in turn with one leg of the other after the other: before any of them is done
    assert [done.key for done in results].index("one") == 0


def test_a_step_to_be_released_is_cut_and_leaves_nothing(
    llama: TinyModel, thread: ComputeThread
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
        result = done(executor, ids_job(1, 0, some_ids(LONG), release=True))
        assert (result.length, result.cache_bytes, result.error) == (LONG, 0, None)
        assert len(seen) == 4
        assert not executor._legs


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 4), ("gemma3_text", 4), ("qwen3_next", 1), ("falcon_mamba", 1)]
)
def test_a_padded_step_is_cut_where_no_layer_is_recurrent(
    tiny_model: Get, thread: ComputeThread, family: str, count: int
) -> None:
    padding = 8  # more than a chunk
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, :padding] = 0
    job = ids_job(1, 0, some_ids(LONG, rows=2), payload={})
    payload = {"ids": to_raw(some_ids(LONG, rows=2)), "mask": to_raw(mask)}
    job = replace(job, payload=payload)
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    with closing(Executor(stack, thread)) as executor:
        theirs = from_raw(done(executor, job).output["hidden"])
    with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
        ours = from_raw(done(executor, job).output["hidden"])
    assert len(seen) == count
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours[1, padding:], theirs[1, padding:], rtol=1e-5, atol=2e-5)


def test_a_mask_of_another_length_is_refused_before_any_chunk_is_computed(
    llama: TinyModel, thread: ComputeThread
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    for length in (LONG - 1, LONG + 1):
        mask = torch.ones(1, length, dtype=torch.long)
        payload = {"ids": to_raw(some_ids(LONG)), "mask": to_raw(mask)}
        with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
            refused = done(executor, ids_job(1, 0, some_ids(1), payload=payload))
        assert refused.fault
        assert "a mask of 23 positions cannot have shape" in (refused.error or "")
        assert not seen


def test_logits_of_all_positions_are_never_more_at_once_than_they_may_be(
    llama: TinyModel, thread: ComputeThread
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    job = ids_job(1, 0, some_ids(LONG), outputs="all", candidates=WISH)
    with closing(Executor(stack, thread)) as executor:
        theirs = [done(executor, job)]
    few_logits = Bounds(logit_bytes=6 * 4 * VOCABULARY)
    with closing(Executor(stack, thread, few_logits)) as executor, passes_of(stack) as seen:
        assert_alike([done(executor, job)], theirs)
        assert max(positions for _, positions in seen) == 6
        seen.clear()
        assert done(executor, replace(job, outputs="last", key="other")).error is None
        assert seen == [(1, LONG)]  # it takes the logits of one position


@pytest.mark.parametrize(("family", "goes_back"), [("llama", True), ("qwen3_next", False)])
@pytest.mark.parametrize("before", [0, 3])
def test_nothing_of_a_step_remains_when_a_later_chunk_is_not_computed_as_sent(
    tiny_model: Get, thread: ComputeThread, family: str, goes_back: bool, before: int
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    good = some_ids(before + LONG, seed=2)
    bad = good.clone()
    bad[0, before + LONG - 3] = VOCABULARY
    with closing(Executor(stack, thread)) as executor:
        theirs = done(executor, ids_job(1, 0, good))
    with closing(Executor(stack, thread, CHUNKED)) as executor:
        if before:
            done(executor, ids_job(1, 0, good[:, :before]))
        broken = ids_job(2, before, bad[:, before:])
        behind = ids_job(3, before + LONG, good[:, :1])
        with passes_of(stack) as seen:
            first, second = together(executor, thread, [broken, behind])
        assert len(seen) == 3  # the bad one is in the fourth chunk; what waits behind is not run
        assert [(one.serial, one.fault) for one in (first, second)] == [
            (2, True),
            (3, goes_back or not before),
        ]
        assert "ids must be below" in (first.error or "")
        again = done(executor, ids_job(4, before, good[:, before:]))
        if goes_back or not before:
            assert first.length == before
        else:
            assert "cannot go back" in (second.error or "")
            assert "cannot go back" in (again.error or "")
            again = done(executor, ids_job(5, 0, good))
        ours = from_raw(again.output["hidden"])
        torch.testing.assert_close(
            ours, from_raw(theirs.output["hidden"])[:, -ours.shape[1] :], rtol=1e-5, atol=2e-5
        )


def test_after_our_own_failure_in_a_chunk_the_rest_of_the_step_is_not_computed(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)

    def stumble(_layer: Any, _args: Any, _output: Any) -> None:
        if len(seen) == 2:
            raise RuntimeError("out of memory")

    layer = stack._carved.parts.layers[3]
    with (
        closing(Executor(stack, thread, CHUNKED)) as executor,
        passes_of(stack) as seen,
        caplog.at_level(logging.CRITICAL),
    ):
        with layer.register_forward_hook(stumble):
            (broken,) = together(executor, thread, [ids_job(1, 0, some_ids(LONG))])
        assert (broken.error, broken.fault) == ("RuntimeError: out of memory", False)
        assert len(seen) == 2
        assert executor.waiting_steps == 0
        assert done(executor, ids_job(2, 0, some_ids(LONG))).error is None


def test_a_leg_freed_among_its_chunks_is_computed_no_further(
    llama: TinyModel, thread: ComputeThread
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)

    def leave(_layer: Any, _args: Any) -> None:
        if len(seen) == 2:
            executor.submit(FreeJob("leg"))

    layer = stack._carved.parts.layers[3]
    with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
        with layer.register_forward_pre_hook(leave):
            freed, other = together(
                executor, thread, [ids_job(1, 0, some_ids(LONG)), ids_job(2, LONG, some_ids(1))]
            )
        assert len(seen) == 2
        assert [(one.serial, one.fault, one.length) for one in (freed, other)] == [
            (1, False, 11),
            (2, False, 11),
        ]
        assert "freed before" in (freed.error or "")
        assert done(executor, ids_job(1, 0, some_ids(1))).length == 1


def test_a_leg_freed_while_a_chunk_of_its_fails_is_told_so_once(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)

    def leave_and_fail(_layer: Any, _args: Any) -> None:
        if len(seen) == 2:
            executor.submit(FreeJob("leg"))
            raise RuntimeError("out of memory")

    layer = stack._carved.parts.layers[3]
    with closing(Executor(stack, thread, CHUNKED)) as executor, passes_of(stack) as seen:
        with layer.register_forward_pre_hook(leave_and_fail), caplog.at_level(logging.CRITICAL):
            executor.submit(ids_job(1, 0, some_ids(LONG)))
            (failed,) = collected(executor, 1)
        assert failed.error == "RuntimeError: out of memory"
        assert done(executor, ids_job(2, 0, some_ids(1))).serial == 2  # and not the first again
        assert (executor.waiting_steps, executor.waiting_bytes) == (0, 0)


def test_a_step_in_chunks_may_begin_with_a_rollback(
    llama: TinyModel, thread: ComputeThread
) -> None:
    ids = some_ids(LONG + 4)
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    with closing(Executor(stack, thread)) as executor:
        theirs = [done(executor, ids_job(1, 0, ids))]
    with closing(Executor(stack, thread, CHUNKED)) as executor:
        done(executor, ids_job(1, 0, torch.cat([ids[:, :4], some_ids(LONG, seed=9)], 1)))
        ours = done(executor, ids_job(2, 4, ids[:, 4:]))
    assert ours.length == LONG + 4
    mine, other = (from_raw(one.output["hidden"]) for one in (ours, theirs[0]))
    torch.testing.assert_close(mine, other[:, 4:], rtol=1e-5, atol=2e-5)


def test_what_waits_is_counted_until_it_is_done_and_what_is_too_much_fails_in_its_turn(
    llama: TinyModel, thread: ComputeThread
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    jobs = replay(0, BLOCKS)
    with closing(Executor(stack, thread, Bounds(leg_waiting_bytes=5000))) as executor:
        with held_up(thread):
            for job in jobs:
                executor.submit(job)
            executor.submit(replace(jobs[0], key="other"))
            assert executor.waiting_steps == len(jobs) + 1
        results = collected(executor, len(jobs) + 1)
        assert (executor.waiting_steps, executor.waiting_bytes) == (0, 0)
    theirs = [one for one in results if one.key == "leg"]
    assert [one.serial for one in theirs] == [job.serial for job in jobs]
    assert [one.error is None for one in theirs] == [True] * 3 + [False] * 7
    assert "wait already" in (theirs[3].error or "")
    assert all(one.fault for one in theirs[3:])
    assert [one.error for one in results if one.key == "other"] == [None]
