"""Legs that begin with what another has computed."""

import select
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, VOCABULARY, TinyModel, some_ids, whole_logits

from blocks.codec import from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Done, Executor, ForkJob, FreeJob, StepJob
from blocks.load import load_stack
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
PATIENCE_SECONDS = 20.0
WISH = CandidateWish(VOCABULARY)


def step(key: str, serial: int, start: int, ids: torch.Tensor, **changes: Any) -> StepJob:
    settings: dict[str, Any] = {
        "first": 0,
        "stop": BLOCKS,
        "payload": {"ids": to_raw(ids.int())},
        "outputs": "last",
        "candidates": WISH,
    }
    return StepJob(key=key, serial=serial, start=start, **{**settings, **changes})


def collected(executor: Executor, count: int) -> dict[tuple[object, int], Done]:
    found: list[Done] = []
    while len(found) < count:
        ready, _, _ = select.select([executor.fileno()], [], [], PATIENCE_SECONDS)
        assert ready, f"only {len(found)} of {count} results came"
        found += executor.collect()
    assert len(found) == count
    return {(done.key, done.serial): done for done in found}


def best(done: Done) -> int:
    assert done.error is None
    return int(from_raw(done.output["tokens"])[0, 0])


def greedy(model: TinyModel, ids: torch.Tensor) -> int:
    return int(whole_logits(model, ids)[0, -1].argmax())


class Held:
    """Holds the compute thread, so that what is submitted meanwhile waits."""

    def __init__(self, thread: ComputeThread) -> None:
        self._may_go = threading.Event()
        thread.submit(lambda: self._may_go.wait(PATIENCE_SECONDS))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._may_go.set()


def test_a_fork_goes_on_from_the_positions_it_shares(llama: TinyModel, whole: Executor) -> None:
    ids = some_ids(12)
    whole.submit(step("donor", 1, 0, ids))
    whole.submit(step("donor", 2, 12, some_ids(3, seed=1)))
    collected(whole, 2)
    whole.submit(ForkJob("fork", "donor", 8))
    more = some_ids(4, seed=2)
    whole.submit(step("fork", 3, 8, more))
    done = collected(whole, 1)["fork", 3]
    assert done.length == 12
    assert best(done) == greedy(llama, torch.cat([ids[:, :8], more], dim=1))


def test_a_fork_is_done_before_what_was_submitted_after_it(
    llama: TinyModel, whole: Executor, thread: ComputeThread
) -> None:
    ids = some_ids(12)
    whole.submit(step("donor", 1, 0, ids))
    whole.submit(step("other", 1, 0, ids))
    collected(whole, 2)
    with Held(thread):
        whole.submit(step("other", 2, 12, some_ids(1)))
        whole.submit(ForkJob("fork", "donor", 12))
        whole.submit(step("donor", 2, 4, some_ids(8, seed=3)))  # rolls back what is shared
        whole.submit(ForkJob("second", "other", 6))
        whole.submit(FreeJob("other"))
        whole.submit(step("fork", 2, 12, some_ids(1, seed=4)))
        whole.submit(step("second", 2, 6, some_ids(1, seed=4)))
    done = collected(whole, 4)
    forked = torch.cat([ids, some_ids(1, seed=4)], dim=1)
    assert best(done["fork", 2]) == greedy(llama, forked)
    second = torch.cat([ids[:, :6], some_ids(1, seed=4)], dim=1)
    assert best(done["second", 2]) == greedy(llama, second)
    rolled = torch.cat([ids[:, :4], some_ids(8, seed=3)], dim=1)
    assert best(done["donor", 2]) == greedy(llama, rolled)


def test_forks_of_one_donor_share_passes_and_say_each_its_own(
    llama: TinyModel, whole: Executor, thread: ComputeThread
) -> None:
    ids = some_ids(20)
    whole.submit(step("donor", 1, 0, ids))
    collected(whole, 1)
    for number in range(6):
        whole.submit(ForkJob(f"fork {number}", "donor", 10 + number))
    for turn in range(3):
        with Held(thread):
            for number in range(6):
                at = 10 + number + turn
                whole.submit(step(f"fork {number}", 2 + turn, at, some_ids(1, seed=number + turn)))
        done = collected(whole, 6)
        for number in range(6):
            own = [some_ids(1, seed=number + before) for before in range(turn + 1)]
            text = torch.cat([ids[:, : 10 + number], *own], dim=1)
            assert best(done[f"fork {number}", 2 + turn]) == greedy(llama, text)


def test_a_fork_that_fails_is_told_and_harms_nobody(llama: TinyModel, whole: Executor) -> None:
    ids = some_ids(5)
    whole.submit(step("donor", 1, 0, ids))
    collected(whole, 1)
    whole.submit(ForkJob("fork", "nobody", 3))
    whole.submit(ForkJob("other", "donor", 9))
    failures = collected(whole, 2)
    assert failures["fork", 0].error is not None
    assert "5 are held" in str(failures["other", 0].error)
    whole.submit(step("donor", 2, 5, some_ids(1)))
    text = torch.cat([ids, some_ids(1)], dim=1)
    assert best(collected(whole, 1)["donor", 2]) == greedy(llama, text)


def test_blocks_that_keep_a_state_of_their_own_have_no_forks(
    whole: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stack, "keeps_state", property(lambda self: True))
    whole.submit(step("donor", 1, 0, some_ids(5)))
    assert collected(whole, 1)["donor", 1].shortest_fork is None
    whole.submit(ForkJob("fork", "donor", 5))
    assert "cannot begin" in str(collected(whole, 1)["fork", 0].error)


@pytest.mark.parametrize(
    ("family", "shortest"),
    [
        ("llama", 1),
        ("gemma3_text", 1),
        ("qwen3_next", None),
        ("recurrent_gemma", None),  # its state is no part of a cache
    ],
)
def test_a_result_tells_how_short_a_fork_could_be(
    tiny_model: Get, thread: ComputeThread, family: str, shortest: int | None
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 0, BLOCKS)
    with closing(Executor(stack, thread)) as executor:
        executor.submit(step("leg", 1, 0, some_ids(9)))
        assert collected(executor, 1)["leg", 1].shortest_fork == shortest
