"""Many texts at once on one executor, each equal to the one that its session writes alone."""

import select
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_executor import PATIENCE_SECONDS
from tiny_models import BLOCKS, TinyModel, some_ids

from blocks.checkpoint import open_checkpoint
from blocks.codec import Payload, from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Bounds, Done, Executor, StepJob
from blocks.load import load_stack
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
TOKENS = 12
# Of 17 sessions: prompts of one position and of many chunks, and all between.
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 11, 13, 17, 19, 23, 29, 31, 37, 41, 60]
SMALL = Bounds(chunk_positions=16, joint_legs=16)  # so that prompts are cut, and passes overflow


@dataclass
class Writer:
    """A session that writes greedily, by way of legs that may all be on one executor."""

    name: str
    prompt: list[int]
    cuts: tuple[int, ...]  # where its legs' spans meet, ends included
    text: list[int] = field(default_factory=list)
    serial: int = 0
    length: int = 0

    def begin(self) -> StepJob:
        return self._step(self.prompt)

    def told(self, done: Done) -> StepJob | None:
        """What it sends when a leg is done: on to the next, or its next word; None at the end."""
        assert done.error is None, done.error
        hop = int(str(done.key).rpartition("/")[2])
        if hop + 2 < len(self.cuts):
            return self._job(hop + 1, done.output)
        self.text.append(int(from_raw(done.output["tokens"])[0, 0]))
        return self._step(self.text[-1:]) if len(self.text) < TOKENS else None

    def _step(self, ids: Sequence[int]) -> StepJob:
        self.serial += 1
        self.start, self.length = self.length, self.length + len(ids)
        return self._job(0, {"ids": to_raw(torch.tensor([list(ids)], dtype=torch.int32))})

    def _job(self, hop: int, payload: Payload) -> StepJob:
        first, stop = list(pairwise(self.cuts))[hop]
        return StepJob(
            key=f"{self.name}/{hop}",
            serial=self.serial,
            start=self.start,
            first=first,
            stop=stop,
            payload=payload,
            outputs="last",
            candidates=CandidateWish(2),
            client=self.name[0],
        )


def write(executor: Executor, writers: Sequence[Writer]) -> list[Done]:
    """Let all write at once, each going on as soon as it can. Returns all results."""
    by_name = {writer.name: writer for writer in writers}
    waiting = [writer.begin() for writer in writers]
    results: list[Done] = []
    count = 0
    while waiting or count:
        for job in waiting:
            executor.submit(job)
        count += len(waiting)
        ready, _, _ = select.select([executor.fileno()], [], [], PATIENCE_SECONDS)
        assert ready, "nothing is computed any more"
        fresh = executor.collect()
        count -= len(fresh)
        results += fresh
        told = [by_name[str(done.key).rpartition("/")[0]].told(done) for done in fresh]
        waiting = [job for job in told if job is not None]
    return results


def assert_all_write_as_alone(
    stack: Stack, thread: ComputeThread, sessions: Sequence[tuple[str, list[int], tuple[int, ...]]]
) -> list[Done]:
    """Returns the results of the sessions that wrote together."""
    together = [Writer(*session) for session in sessions]
    with closing(Executor(stack, thread, SMALL)) as executor:
        results = write(executor, together)
    for session, ours in zip(sessions, together, strict=True):
        alone = Writer(*session)
        with closing(Executor(stack, thread)) as executor:
            write(executor, [alone])
        assert ours.text == alone.text, ours.name
        assert len(ours.text) == TOKENS
    return results


def joint_passes(results: Sequence[Done]) -> list[int]:
    """Of the passes of decode steps that several legs shared: how many legs."""
    return [done.run.positions for done in results if done.run and done.serial > 1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_seventeen_sessions_of_mixed_prompts_write_what_each_writes_alone(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    sessions = [
        (f"{'abc'[number % 3]}{number}", some_ids(length, seed=number)[0].tolist(), (0, BLOCKS))
        for number, length in enumerate(LENGTHS)
    ]
    results = assert_all_write_as_alone(stack, thread, sessions)
    assert max(joint_passes(results)) >= 4  # how many were ready is the clock's to say


def test_seventeen_stories_are_told_as_each_is_told_alone(
    shared_data: Path, thread: ComputeThread
) -> None:
    stack = load_stack(open_checkpoint(shared_data / "stories260K"), 0, 5)
    sessions = [
        (f"{'abc'[number % 3]}{number}", [1, *some_ids(length, seed=number)[0].tolist()], (0, 5))
        for number, length in enumerate(LENGTHS)
    ]
    results = assert_all_write_as_alone(stack, thread, sessions)
    assert max(joint_passes(results)) >= 4


ROUTES = [
    (0, BLOCKS),
    (0, 2, BLOCKS),
    (0, 4, BLOCKS),
    (0, 2, 4, BLOCKS),
    (0, 3, BLOCKS),
    (0, 1, 5, BLOCKS),
]


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_sessions_that_enter_and_leave_at_different_blocks_share_passes_and_write_as_alone(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    sessions = [
        (f"{number}", some_ids(LENGTHS[number], seed=number)[0].tolist(), route)
        for number, route in enumerate([*ROUTES, *ROUTES])
    ]
    results = assert_all_write_as_alone(stack, thread, sessions)
    legs = sum(len(route) - 1 for _, _, route in sessions)
    steps = legs * (TOKENS - 1)
    assert sum(joint_passes(results)) == steps
    assert len(joint_passes(results)) < steps / 2
