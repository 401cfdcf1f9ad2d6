"""Steps of a leg that wait share passes over the weights, and come to what they come to alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_executor import collected
from tiny_models import BLOCKS, VOCABULARY, TinyModel, some_ids

from blocks.codec import from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Bounds, Done, Executor, FreeJob, StepJob
from blocks.load import load_stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
STEPS = 10


@contextmanager
def held_up(thread: ComputeThread) -> Iterator[None]:
    """Within, nothing is computed; at its end all that was submitted waits."""
    gate = threading.Event()
    thread.submit(gate.wait)
    try:
        yield
    finally:
        gate.set()


def replay(start: int, stop: int, **changes: object) -> list[StepJob]:
    """One step for each position, for the blocks `start:stop`."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, STEPS, 32, generator=generator)
    ids = some_ids(STEPS, seed=3)
    jobs = []
    for place in range(STEPS):
        one = slice(place, place + 1)
        payload = {"ids": to_raw(ids[:, one])} if start == 0 else {"hidden": to_raw(hidden[:, one])}
        settings = {"key": "leg", "first": start, "stop": stop, "payload": payload, **changes}
        jobs.append(StepJob(serial=place + 1, start=place, **settings))
    return jobs


def alone(executor: Executor, jobs: Sequence[StepJob]) -> list[Done]:
    results = []
    for job in jobs:
        executor.submit(job)
        results += collected(executor, 1)
    return results


def together(executor: Executor, thread: ComputeThread, jobs: Sequence[StepJob]) -> list[Done]:
    with held_up(thread):
        for job in jobs:
            executor.submit(job)
    return collected(executor, len(jobs))


def passes(results: Sequence[Done]) -> list[int]:
    return [done.run.positions for done in results if done.run is not None]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "qwen3_next", "gemma4_text"])
@pytest.mark.parametrize("span", [(0, 2), (2, 5), (4, BLOCKS), (0, BLOCKS)])
@pytest.mark.parametrize("outputs", ["last", "all"])
def test_a_replay_takes_one_pass_and_comes_to_the_same(
    tiny_model: Get, thread: ComputeThread, family: str, span: tuple[int, int], outputs: str
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, *span)
    executor = Executor(stack, thread)
    wish = CandidateWish(4) if stack.holds_head else None
    jobs = replay(*span, outputs=outputs, candidates=wish)
    if span[0] and stack.needs:
        jobs = _with_sides(tiny_model, family, thread, jobs, span)
    one_by_one = alone(executor, jobs)
    assert passes(one_by_one) == [1] * STEPS
    executor.submit(FreeJob("leg"))
    joined = together(executor, thread, jobs)
    assert passes(joined) == [STEPS]
    assert [done.serial for done in joined] == list(range(1, STEPS + 1))
    for ours, theirs in zip(joined, one_by_one, strict=True):
        assert ours.output.keys() == theirs.output.keys()
        for name in ours.output:
            mine, other = from_raw(ours.output[name]), from_raw(theirs.output[name])
            assert mine.shape == other.shape
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    executor.close()


def _with_sides(
    tiny_model: Get, family: str, thread: ComputeThread, jobs: list[StepJob], span: tuple[int, int]
) -> list[StepJob]:
    """The same steps as the stack before sends them."""
    before = Executor(load_stack(tiny_model(family, False).checkpoint, 0, span[0]), thread)
    sent = alone(before, replay(0, span[0]))
    before.close()
    first = jobs[0]
    return [
        StepJob(
            key=first.key,
            serial=done.serial,
            start=done.serial - 1,
            first=first.first,
            stop=first.stop,
            payload=done.output,
            outputs=first.outputs,
            candidates=first.candidates,
        )
        for done in sent
    ]


def test_a_large_replay_takes_passes_of_bounded_size(
    llama: TinyModel, thread: ComputeThread
) -> None:
    executor = Executor(load_stack(llama.checkpoint, 0, 2), thread, Bounds(chunk_positions=4))
    assert passes(together(executor, thread, replay(0, 2))) == [4, 4, 2]
    executor.close()


def test_the_logits_of_a_pass_are_bounded_too(llama: TinyModel, thread: ComputeThread) -> None:
    bounds = Bounds(logit_bytes=5 * 4 * VOCABULARY)
    executor = Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread, bounds)
    jobs = replay(0, BLOCKS, candidates=CandidateWish(4))
    assert passes(together(executor, thread, jobs)) == [5, 5]
    silent = replay(0, BLOCKS, candidates=CandidateWish(4), outputs="none", key="silent")
    assert passes(together(executor, thread, silent)) == [STEPS]  # it asks for no logits
    executor.close()


def test_one_that_cannot_be_computed_spoils_none_before_it(
    llama: TinyModel, thread: ComputeThread
) -> None:
    executor = Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread)
    jobs = replay(0, BLOCKS)
    bad = {"ids": to_raw(torch.tensor([[VOCABULARY]]))}
    jobs[4] = StepJob(key="leg", serial=5, start=4, first=0, stop=BLOCKS, payload=bad)
    results = together(executor, thread, jobs)
    assert [done.error is None for done in results] == [True] * 4 + [False] * (STEPS - 4)
    assert all(done.fault for done in results[4:])
    assert results[-1].length == 4
    executor.close()


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])  # the latter cannot roll back
def test_a_wish_that_cannot_be_met_spoils_none_before_it(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    executor = Executor(load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS), thread)
    jobs = replay(0, BLOCKS, candidates=CandidateWish(4))
    jobs[4] = replace(jobs[4], candidates=CandidateWish(4, (VOCABULARY,)))
    results = together(executor, thread, jobs)
    assert [done.error is None for done in results] == [True] * 4 + [False] * (STEPS - 4)
    assert all(done.fault for done in results[4:])
    assert results[-1].length == 4
    executor.close()


def test_a_rollback_may_begin_a_pass(llama: TinyModel, thread: ComputeThread) -> None:
    executor = Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread)
    plain = alone(executor, replay(0, BLOCKS))
    again = together(executor, thread, replay(0, BLOCKS)[3:])
    assert passes(again) == [STEPS - 3]
    for ours, theirs in zip(again, plain[3:], strict=True):
        mine, other = (from_raw(done.output["hidden"]) for done in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)
    executor.close()


def test_padded_steps_share_no_pass(llama: TinyModel, thread: ComputeThread) -> None:
    executor = Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread)
    jobs = replay(0, BLOCKS)
    for place, job in enumerate(jobs):
        job.payload["mask"] = to_raw(torch.ones(1, place + 1, dtype=torch.long))
    assert passes(together(executor, thread, jobs)) == [1] * STEPS
    executor.close()


def test_the_steps_of_a_leg_that_is_freed_are_not_computed_and_it_begins_again(
    llama: TinyModel, thread: ComputeThread
) -> None:
    executor = Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread)
    jobs = replay(0, BLOCKS)
    with held_up(thread):
        for job in jobs[:3]:
            executor.submit(job)
        executor.submit(FreeJob("leg"))
        for job in jobs[:2]:
            executor.submit(job)
    results = collected(executor, 5)
    assert [done.serial for done in results] == [1, 2, 3, 1, 2]
    assert [done.error is None for done in results] == [False] * 3 + [True] * 2
    assert not any(done.fault for done in results)
    assert passes(results) == [2]
    assert results[-1].length == 2
    executor.close()
