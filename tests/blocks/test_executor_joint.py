"""Decode steps of many sessions share a pass, and each comes to what it comes to alone."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_executor import PATIENCE_SECONDS, collected, done, ids_job
from test_executor_passes import alone, held_up, passes, replay, together
from tiny_models import BLOCKS, VOCABULARY, TinyModel, some_ids

from blocks.codec import Payload, from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Bounds, Done, Executor, FreeJob, StepJob
from blocks.load import load_stack
from blocks.returns import Returns
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
WHOLE = (0, BLOCKS)
PROMPTS = {"a": 9, "b": 4, "c": 6, "d": 1}  # positions; gemma3's window is between them
STEPS = 3


def session(
    model: TinyModel, thread: ComputeThread, span: tuple[int, int], key: str, **changes: Any
) -> list[StepJob]:
    """A session's steps for the blocks of a span: its prompt, then one position each."""
    prompt = PROMPTS[key]
    text = some_ids(prompt + STEPS, seed=ord(key))
    payloads: list[Payload] = [{"ids": to_raw(text[:, :prompt])}]
    payloads += [{"ids": to_raw(text[:, [prompt + step]])} for step in range(STEPS)]
    starts = [0, *range(prompt, prompt + STEPS)]
    if span[0]:
        with closing(Executor(load_stack(model.checkpoint, 0, span[0]), thread)) as before:
            sent = alone(before, _jobs(key, (0, span[0]), starts, payloads))
        payloads = [done.output for done in sent]
    return _jobs(key, span, starts, payloads, **changes)


def _jobs(
    key: str, span: tuple[int, int], starts: list[int], payloads: list[Payload], **changes: Any
) -> list[StepJob]:
    return [
        StepJob(
            key=key,
            serial=number,
            start=start,
            first=span[0],
            stop=span[1],
            payload=payload,
            **changes,
        )
        for number, (start, payload) in enumerate(zip(starts, payloads, strict=True))
    ]


def all_sessions(
    model: TinyModel, thread: ComputeThread, span: tuple[int, int] = WHOLE, **changes: Any
) -> dict[str, list[StepJob]]:
    return {key: session(model, thread, span, key, **changes) for key in PROMPTS}


def expected(
    model: TinyModel, thread: ComputeThread, sessions: dict[str, list[StepJob]]
) -> dict[tuple[str, int], Done]:
    """What each step comes to where every session has an executor to itself."""
    found = {}
    for key, jobs in sessions.items():
        stack = load_stack(model.checkpoint, jobs[0].first, jobs[0].stop)
        with closing(Executor(stack, thread)) as executor:
            found |= {(key, done.serial): done for done in alone(executor, jobs)}
    return found


def assert_as_alone(results: Sequence[Done], theirs: dict[tuple[str, int], Done]) -> None:
    assert results
    for ours in results:
        other = theirs[str(ours.key), ours.serial]
        assert (ours.error, ours.length) == (None, other.length)
        assert ours.output.keys() == other.output.keys()
        for name in ours.output:
            mine, his = from_raw(ours.output[name]), from_raw(other.output[name])
            assert mine.shape == his.shape, name
            # relative too: hidden states of some families are not of order one
            torch.testing.assert_close(mine, his, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("span", "outputs"),
    [((0, 2), "all"), ((2, 5), "last"), ((4, BLOCKS), "last"), (WHOLE, "all"), (WHOLE, "none")],
)
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "bloom", "qwen3_next", "gemma4_text", "zamba2"]
)
def test_sessions_of_different_lengths_decode_in_one_pass_as_they_do_alone(
    tiny_model: Get, thread: ComputeThread, family: str, span: tuple[int, int], outputs: str
) -> None:
    model = tiny_model(family, True)
    wish = CandidateWish(4, (7,)) if outputs != "none" and span[1] == BLOCKS else None
    sessions = all_sessions(model, thread, span, outputs=outputs, candidates=wish)
    theirs = expected(model, thread, sessions)
    with closing(Executor(load_stack(model.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        for step in range(1, STEPS + 1):
            results = together(executor, thread, [jobs[step] for jobs in sessions.values()])
            assert passes(results) == [len(PROMPTS)]
            assert [done.run is None for done in results] == [False, True, True, True]
            assert_as_alone(results, theirs)


@pytest.mark.parametrize(("family", "later"), [("llama", [[4], [4]]), ("bloom", [[3, 1], [3, 1]])])
def test_a_long_past_keeps_to_itself_only_where_others_would_be_padded_to_it(
    tiny_model: Get,
    thread: ComputeThread,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    later: list[list[int]],
) -> None:
    monkeypatch.setattr("blocks.batching.SPARE_PLACES", 0)
    monkeypatch.setitem(PROMPTS, "d", 40)
    model = tiny_model(family, True)
    sessions = all_sessions(model, thread)
    with closing(Executor(load_stack(model.checkpoint, *WHOLE), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        seen = [
            passes(together(executor, thread, [jobs[step] for jobs in sessions.values()]))
            for step in range(1, STEPS + 1)
        ]
    assert seen == [[3, 1], *later], "the first pass shows whether pasts are padded"


def test_final_hidden_states_come_from_a_joint_pass_too(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    results = together(whole, thread, [jobs[1] for jobs in sessions.values()])
    assert passes(results) == [len(PROMPTS)]
    assert all(list(done.output) == ["hidden"] for done in results)
    assert_as_alone(results, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_sessions_enter_and_leave_between_passes(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    model = tiny_model(family, False)
    sessions = all_sessions(model, thread)
    theirs = expected(model, thread, sessions)
    with closing(Executor(load_stack(model.checkpoint, *WHOLE), thread)) as executor:
        alone(executor, [sessions[key][0] for key in "abc"])
        for steps, sizes in (
            ({"a": 1, "b": 1, "c": 1}, [3]),
            ({"a": 2, "d": 0}, [1, 1]),  # a prompt of one position has no past to join with
            ({"b": 2, "d": 1}, [2]),
            ({"a": 3, "b": 3, "c": 2, "d": 2}, [4]),
            ({"c": 3, "d": 3}, [2]),
        ):
            waiting = [sessions[key][step] for key, step in steps.items()]
            results = together(executor, thread, waiting)
            assert passes(results) == sizes
            assert_as_alone(results, theirs)


def test_a_session_that_rolls_back_has_its_turn_to_itself(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [job for key in PROMPTS for job in sessions[key][:2]])
    jobs = [sessions[key][1 if key == "b" else 2] for key in PROMPTS]
    results = together(whole, thread, jobs)
    assert sorted(passes(results)) == [1, 3]
    assert_as_alone(results, theirs)
    assert_as_alone(together(whole, thread, [sessions["b"][2], sessions["a"][3]]), theirs)


def test_a_session_freed_before_its_step_or_after_it_disturbs_no_other(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    waiting = [FreeJob("b"), *(sessions[key][1] for key in "abcd"), FreeJob("c"), sessions["c"][2]]
    with held_up(thread):
        for job in waiting:
            whole.submit(job)
    for_all = collected(whole, 5)
    results = {(done.key, done.serial): done for done in for_all}
    assert sorted(passes(for_all)) == [2]
    assert_as_alone([results[key, 1] for key in "ad"], theirs)
    assert "but 0 are held" in (results["b", 1].error or "")
    assert "was freed before" in (results["c", 1].error or "")
    assert "but 0 are held" in (results["c", 2].error or "")
    assert len(whole._legs) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"release": True},
        {"payload": {"ids": to_raw(some_ids(1)), "mask": to_raw(torch.ones(1, 10).long())}},
        {"payload": {"ids": to_raw(some_ids(2))}},
    ],
)
def test_a_step_that_is_released_padded_or_longer_is_not_joined(
    llama: TinyModel, thread: ComputeThread, whole: Executor, changes: dict[str, Any]
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    jobs = [replace(sessions["a"][1], **changes), *(sessions[key][1] for key in "bcd")]
    results = together(whole, thread, jobs)
    assert sorted(passes(results))[-1] == 3
    assert len(passes(results)) == 2
    assert_as_alone([done for done in results if done.key != "a"], theirs)
    (odd,) = [done for done in results if done.key == "a"]
    assert odd.error is None


def test_rows_side_by_side_in_one_session_are_not_joined(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    for key in "ab":
        done(whole, ids_job(0, 0, some_ids(3, rows=2), key=key))
    jobs = [ids_job(1, 3, some_ids(1, rows=2), key=key) for key in "ab"]
    results = together(whole, thread, jobs)
    assert passes(results) == [1, 1]
    assert [result.error for result in results] == [None, None]


@pytest.mark.parametrize(
    ("family", "span"), [("zaya", (2, 5)), ("bart", (0, 3)), ("deepseek_v4", (2, 5))]
)
def test_sessions_of_a_family_that_cannot_join_run_one_by_one(
    tiny_model: Get, thread: ComputeThread, family: str, span: tuple[int, int]
) -> None:
    model = tiny_model(family, True)
    sessions = {key: session(model, thread, span, key) for key in "ab"}
    theirs = expected(model, thread, sessions)
    with closing(Executor(load_stack(model.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        results = together(executor, thread, [jobs[1] for jobs in sessions.values()])
        assert passes(results) == [1, 1]
        assert_as_alone(results, theirs)


def test_a_replay_and_the_steps_of_others_take_turns(
    llama: TinyModel, thread: ComputeThread
) -> None:
    bounds = Bounds(chunk_positions=4, joint_legs=2)
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    with closing(Executor(load_stack(llama.checkpoint, *WHOLE), thread, bounds)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        decodes = [jobs[1] for jobs in sessions.values()]
        results = together(executor, thread, [*replay(*WHOLE, key="leg"), *decodes])
        order = [(done.key, done.run.positions) for done in results if done.run is not None]
        assert order == [("a", 2), ("leg", 4), ("c", 2), ("leg", 4), ("leg", 2)]
        assert_as_alone([done for done in results if done.key != "leg"], theirs)


def test_the_legs_of_a_joint_pass_are_bounded_by_their_logits_too(
    llama: TinyModel, thread: ComputeThread
) -> None:
    bounds = Bounds(logit_bytes=3 * 4 * VOCABULARY)
    sessions = all_sessions(llama, thread, candidates=CandidateWish(2))
    with closing(Executor(load_stack(llama.checkpoint, *WHOLE), thread, bounds)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        results = together(executor, thread, [jobs[1] for jobs in sessions.values()])
        assert passes(results) == [3, 1]


def test_sessions_that_cannot_join_decode_in_the_order_of_their_turns(
    tiny_model: Get, thread: ComputeThread
) -> None:
    model, span = tiny_model("deepseek_v4", True), (2, 5)
    sessions = {key: session(model, thread, span, key) for key in "abc"}
    with closing(Executor(load_stack(model.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        waiting = [sessions["a"][1], *sessions["c"][1:], sessions["b"][1]]
        results = together(executor, thread, waiting)
        order = [(done.key, done.run.positions) for done in results if done.run is not None]
        assert order == [("c", STEPS), ("a", 1), ("b", 1)]  # the one before was no replay


class Patient(Returns):
    """Waits for whoever comes, and tells that the compute thread does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.is_asked = threading.Event()
        self.seconds = seconds

    def worth_waiting(self, now: float, pass_seconds: float) -> float:
        if threading.current_thread() is not threading.main_thread():
            self.is_asked.set()
        return self.seconds


def test_a_joint_pass_waits_for_those_who_are_about_to_come(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    whole._returns = patient = Patient(PATIENCE_SECONDS)
    whole.submit(sessions["a"][1])
    assert patient.is_asked.wait(PATIENCE_SECONDS)
    patient.seconds = 0.0  # all are here that were waited for
    whole.submit(sessions["b"][1])
    results = collected(whole, 2)
    assert passes(results) == [2]
    assert_as_alone(results, theirs)


def test_a_pass_that_waits_is_woken_when_the_last_has_come_and_not_for_each(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    whole._returns = patient = Patient(PATIENCE_SECONDS)
    woken, notify = [], whole._lock.notify
    whole._lock.notify = lambda: (woken.append(key), notify())  # type: ignore[assignment]
    for key in "abcd":
        patient.seconds = 0.0 if key == "d" else PATIENCE_SECONDS
        whole.submit(sessions[key][1])
        assert patient.is_asked.wait(PATIENCE_SECONDS)
    assert passes(collected(whole, 4)) == [4]
    assert woken == ["d"]


def test_nobody_who_does_not_come_holds_up_a_pass_for_long(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    whole._returns = patient = Patient(0.001)
    whole.submit(sessions["a"][1])  # and the others never come
    assert passes(collected(whole, 1)) == [1]
    assert patient.is_asked.is_set()
