"""The bench of a stack runs what a server would, and as few passes as there can be."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, TinyModel

from blocks.bench import CHUNK_TOKENS, WARM_STEPS, StackBench
from blocks.errors import BlocksError
from blocks.executor import Done, FreeJob, StepJob
from blocks.load import load_stack
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]


class Recording:
    """An executor, and what it was asked for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.jobs: list[Any] = []

    def submit(self, job: Any) -> None:
        self.jobs.append(job)
        self._inner.submit(job)

    def collect(self) -> list[Done]:
        found: list[Done] = self._inner.collect()
        return found

    def fileno(self) -> int:
        return int(self._inner.fileno())

    def close(self) -> None:
        self._inner.close()

    @property
    def steps(self) -> list[StepJob]:
        return [job for job in self.jobs if not isinstance(job, FreeJob)]

    @property
    def left(self) -> set[object]:
        """The legs that were begun and not freed."""
        freed = {job.key for job in self.jobs if isinstance(job, FreeJob)}
        return {job.key for job in self.steps} - freed


Open = Callable[[Stack], tuple[StackBench, Recording]]


@pytest.fixture
def opened(thread: ComputeThread) -> Iterator[Open]:
    """A function that opens a bench of a stack, watched."""
    benches: list[StackBench] = []

    def get(stack: Stack) -> tuple[StackBench, Recording]:
        bench = StackBench(stack, thread)
        benches.append(bench)
        recording = Recording(bench._executor)
        bench._executor = recording  # type: ignore[assignment]
        return bench, recording

    yield get
    for bench in benches:
        bench.close()


def test_sessions_of_mixed_pasts_share_every_pass_however_slowly_they_are_handed_in(
    llama: TinyModel, opened: Open, thread: ComputeThread
) -> None:
    bench, asked = opened(load_stack(llama.checkpoint, 0, BLOCKS))
    submit = asked.submit

    def slowly(job: Any) -> None:
        """Hand in a job and wait until the thread is through with all it may do by then."""
        submit(job)
        is_through = threading.Event()
        thread.submit(is_through.set)
        is_through.wait(0.02)

    asked.submit = slowly  # type: ignore[method-assign]
    assert bench.decode([1, 9, 30, 4, 2], 6).passes == 6


def test_sessions_of_a_family_that_cannot_join_take_a_pass_each(
    tiny_model: Get, opened: Open
) -> None:
    bench, _ = opened(load_stack(tiny_model("recurrent_gemma", False).checkpoint, 0, BLOCKS))
    assert bench.decode([1, 5, 3], 4).passes == 3 * 4


def test_decoding_goes_on_from_each_sessions_own_past(llama: TinyModel, opened: Open) -> None:
    bench, asked = opened(load_stack(llama.checkpoint, 0, BLOCKS))
    bench.decode([2, 7], 3)
    starts: dict[object, list[int]] = {}
    for job in asked.steps:
        starts.setdefault(job.key, []).append(job.start)
    steps = range(WARM_STEPS + 3)
    assert [*starts.values()] == [[0, *(2 + n for n in steps)], [0, *(7 + n for n in steps)]]
    assert {job.outputs for job in asked.steps} == {"last"}
    assert all(job.candidates is not None for job in asked.steps)


def test_a_prompt_goes_in_chunks_of_which_only_the_last_wants_an_output(
    tiny_model: Get, opened: Open
) -> None:
    bench, asked = opened(load_stack(tiny_model("bloom", False).checkpoint, 0, BLOCKS))
    assert bench.prefill(CHUNK_TOKENS + 9) > 0
    seen = [(job.start, job.payload["ids"][1][1], job.outputs) for job in asked.steps]
    assert seen == [(0, CHUNK_TOKENS, "none"), (CHUNK_TOKENS, 9, "last")]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v32"])
def test_blocks_without_ends_are_measured_with_hidden_states(
    family: str, tiny_model: Get, opened: Open
) -> None:
    bench, asked = opened(load_stack(tiny_model(family, False).checkpoint, 2, 4))
    assert bench.prefill(12) > 0
    assert bench.decode([3, 3], 2).seconds > 0
    assert all("hidden" in job.payload and job.outputs == "all" for job in asked.steps)


def test_a_bench_leaves_no_leg_behind(llama: TinyModel, opened: Open) -> None:
    bench, asked = opened(load_stack(llama.checkpoint, 0, BLOCKS))
    bench.prefill(5)
    bench.decode([1, 2, 3], 2)
    assert len({job.key for job in asked.steps}) == 4
    assert asked.left == set()


def test_a_step_that_fails_ends_the_bench_with_its_reason_and_leaves_no_leg(
    llama: TinyModel, opened: Open
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    with torch.inference_mode():
        stack._carved.model.get_output_embeddings().weight.fill_(float("nan"))
    bench, asked = opened(stack)
    with pytest.raises(BlocksError, match="not numbers"):
        bench.decode([1, 2], 3)
    assert asked.left == set()


def test_what_is_asked_is_the_same_every_time(llama: TinyModel, opened: Open) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    asked = []
    for _ in range(2):
        bench, recording = opened(stack)
        with closing(bench):
            bench.decode([4], 2)
        asked.append([(job.start, dict(job.payload)) for job in recording.steps])
    assert asked[0] == asked[1]
