"""What goes wrong in a pass of many sessions goes wrong for the session it belongs to, alone."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_executor_joint import PROMPTS, WHOLE, all_sessions, assert_as_alone, expected, session
from test_executor_passes import alone, passes, together
from tiny_models import BLOCKS, VOCABULARY, TinyModel, some_ids

from blocks.codec import to_raw
from blocks.ends import CandidateWish
from blocks.executor import Executor
from blocks.load import load_stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]


def test_a_bad_id_spoils_no_other_sessions_step_nor_its_own_session(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    jobs = [sessions[key][1] for key in PROMPTS]
    bad = {"ids": to_raw(torch.tensor([[VOCABULARY]]))}
    results = together(whole, thread, [jobs[0], replace(jobs[1], payload=bad), *jobs[2:]])
    assert [(done.error is None, done.fault) for done in results] == [
        (True, False),
        (False, True),
        (True, False),
        (True, False),
    ]
    assert results[1].length == PROMPTS["b"]
    assert passes(results) == [1, 2]  # halves: its neighbour is alone with it, the others joined
    assert_as_alone([results[0], *results[2:]], theirs)
    again = together(whole, thread, [jobs[1], sessions["c"][2]])
    assert passes(again) == [2]
    assert_as_alone(again, theirs)


def test_a_wish_that_cannot_be_met_spoils_no_other_sessions_step(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread, candidates=CandidateWish(3))
    theirs = expected(llama, thread, sessions)
    alone(whole, [jobs[0] for jobs in sessions.values()])
    jobs = [sessions[key][1] for key in PROMPTS]
    wrong = replace(jobs[3], candidates=CandidateWish(3, (VOCABULARY,)))
    results = together(whole, thread, [*jobs[:3], wrong])
    assert_as_alone(results[:3], theirs)
    assert (results[3].fault, results[3].length) == (True, PROMPTS["d"])


def test_hidden_states_that_are_no_numbers_fail_in_their_own_row(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    span = (4, BLOCKS)
    sessions = all_sessions(llama, thread, span, candidates=CandidateWish(3))
    theirs = expected(llama, thread, sessions)
    with closing(Executor(load_stack(llama.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        jobs = [sessions[key][1] for key in PROMPTS]
        jobs[0] = replace(jobs[0], payload={"hidden": to_raw(torch.full((1, 1, 32), torch.nan))})
        with caplog.at_level(logging.CRITICAL):
            results = together(executor, thread, jobs)
        assert "the logits are not numbers" in (results[0].error or "")
        assert not results[0].fault
        assert passes(results) == [4]
        assert_as_alone(results[1:], theirs)


def test_a_family_found_out_in_a_joint_pass_is_never_joined_again(
    tiny_model: Get, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    model, span = tiny_model("deepseek_v4", True), (2, 5)
    sessions = {key: session(model, thread, span, key) for key in "abc"}
    theirs = expected(model, thread, sessions)
    with closing(Executor(load_stack(model.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        executor._legs["a"].part.joins = True  # as if its layers had not shown it
        with caplog.at_level(logging.CRITICAL):
            results = together(executor, thread, [jobs[1] for jobs in sessions.values()])
        assert passes(results) == [1, 1, 1]
        assert_as_alone(results, theirs)
        assert executor._legs["a"].part.joins is False


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v32", "gemma4_text", "falcon_mamba"]
)
def test_a_joint_pass_that_breaks_half_way_is_undone_and_repeated_in_halves(
    tiny_model: Get, thread: ComputeThread, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    model = tiny_model(family, False)
    sessions = all_sessions(model, thread)
    theirs = expected(model, thread, sessions)
    stack = load_stack(model.checkpoint, *WHOLE)

    def lack_memory(_layer: Any, args: Any, named: dict[str, Any]) -> None:
        hidden = args[0] if args else named["hidden_states"]
        if len(hidden) > 2:
            raise RuntimeError("out of memory")

    with closing(Executor(stack, thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        layer = stack._carved.parts.layers[BLOCKS - 1]
        with (
            layer.register_forward_pre_hook(lack_memory, with_kwargs=True),
            caplog.at_level(logging.CRITICAL),
        ):
            results = together(executor, thread, [jobs[1] for jobs in sessions.values()])
        assert passes(results) == [2, 2]
        assert_as_alone(results, theirs)
        for step in (2, 3):
            results = together(executor, thread, [jobs[step] for jobs in sessions.values()])
            assert passes(results) == [4]
            assert_as_alone(results, theirs)


def test_what_breaks_for_one_session_breaks_for_it_alone(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    span = (2, BLOCKS)
    sessions = all_sessions(llama, thread, span)
    theirs = expected(llama, thread, sessions)
    stack = load_stack(llama.checkpoint, *span)

    def stumble(_layer: Any, args: Any) -> None:
        if bool(args[0].isnan().any()):
            raise RuntimeError("no numbers")

    with closing(Executor(stack, thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        jobs = [sessions[key][1] for key in PROMPTS]
        jobs[2] = replace(jobs[2], payload={"hidden": to_raw(torch.full((1, 1, 32), torch.nan))})
        layer = stack._carved.parts.layers[4]
        with layer.register_forward_pre_hook(stumble), caplog.at_level(logging.CRITICAL):
            results = together(executor, thread, jobs)
        assert results[2].error == "RuntimeError: no numbers"
        assert passes(results) == [2, 1]
        assert_as_alone([*results[:2], results[3]], theirs)


def test_a_torn_session_keeps_no_other_from_joining(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    stack = load_stack(llama.checkpoint, *WHOLE)
    with closing(Executor(stack, thread)) as executor, caplog.at_level(logging.CRITICAL):
        alone(executor, [jobs[0] for jobs in sessions.values()])
        weight = stack._carved.parts.layers[3].self_attn.o_proj.weight
        kept, weight.data = weight.data, torch.zeros(3, 3)
        (broken,) = alone(executor, [sessions["a"][1]])
        weight.data = kept
        assert "RuntimeError" in (broken.error or "")
        for step, sizes in ((1, [3]), (2, [3])):
            results = together(executor, thread, [jobs[step] for jobs in sessions.values()])
            assert passes(results) == sizes
            assert_as_alone([done for done in results if done.key != "a"], theirs)
            assert [done.error is None for done in results if done.key == "a"] == [False]
        assert_as_alone(alone(executor, [sessions["a"][0]]), theirs)
        results = together(executor, thread, [sessions["a"][1], sessions["b"][3]])
        assert passes(results) == [2]
        assert_as_alone(results, theirs)


def test_a_step_for_other_blocks_than_its_session_began_with_keeps_no_other_from_joining(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    alone(whole, [replace(sessions["a"][0], stop=4), *(sessions[key][0] for key in "bcd")])
    for step in (1, 2):
        results = together(whole, thread, [jobs[step] for jobs in sessions.values()])
        assert passes(results) == [3]
        assert_as_alone([done for done in results if done.key != "a"], theirs)
        (refused,) = [done for done in results if done.key == "a"]
        assert refused.fault
        assert refused.error == "a leg of blocks 0:4 cannot go on with 0:6"


def test_a_step_of_other_rows_than_its_session_is_refused_without_halving_the_pass(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    sessions = all_sessions(llama, thread)
    theirs = expected(llama, thread, sessions)
    two_rows = {"ids": to_raw(some_ids(PROMPTS["b"], rows=2))}
    alone(whole, [replace(sessions["b"][0], payload=two_rows)])
    alone(whole, [sessions[key][0] for key in "acd"])
    results = together(whole, thread, [jobs[1] for jobs in sessions.values()])
    assert passes(results) == [3]
    assert_as_alone([done for done in results if done.key != "b"], theirs)
    assert [done.fault for done in results if done.key == "b"] == [True]


def test_hidden_states_of_another_size_are_refused_without_halving_the_pass(
    llama: TinyModel, thread: ComputeThread
) -> None:
    span = (2, 5)
    sessions = all_sessions(llama, thread, span)
    theirs = expected(llama, thread, sessions)
    with closing(Executor(load_stack(llama.checkpoint, *span), thread)) as executor:
        alone(executor, [jobs[0] for jobs in sessions.values()])
        jobs = [sessions[key][1] for key in PROMPTS]
        jobs[1] = replace(jobs[1], payload={"hidden": to_raw(torch.zeros(1, 1, 31))})
        results = together(executor, thread, jobs)
        assert passes(results) == [3]
        assert_as_alone([done for done in results if done.key != "b"], theirs)
        assert [done.fault for done in results if done.key == "b"] == [True]
