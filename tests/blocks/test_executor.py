"""Steps go in, results come out in order, and nothing that happens in one harms another."""

import logging
import select
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, CUTS, TinyModel, assert_same, load_cut, some_ids, whole_logits
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from blocks.checkpoint import open_checkpoint
from blocks.codec import from_raw, to_raw
from blocks.ends import CandidateWish
from blocks.executor import Done, Executor, FreeJob, StepJob
from blocks.load import load_stack
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
PATIENCE_SECONDS = 20.0


def ids_job(serial: int, start: int, ids: torch.Tensor, **changes: Any) -> StepJob:
    settings = {"key": "leg", "first": 0, "stop": BLOCKS, "payload": {"ids": to_raw(ids)}}
    return StepJob(serial=serial, start=start, **{**settings, **changes})


def collected(executor: Executor, count: int) -> list[Done]:
    """Wait on the descriptor, as a loop would, until there are `count` results."""
    found: list[Done] = []
    while len(found) < count:
        ready, _, _ = select.select([executor.fileno()], [], [], PATIENCE_SECONDS)
        assert ready, f"only {len(found)} of {count} results came"
        found += executor.collect()
    assert len(found) == count
    return found


def done(executor: Executor, job: StepJob) -> Done:
    executor.submit(job)
    return collected(executor, 1)[0]


def greedy_through(
    executors: Sequence[tuple[Executor, Stack]], prompt: Sequence[int], count: int
) -> list[int]:
    """Generate by sending ids through the executors and taking the first candidate."""
    ids, fresh = list(prompt), list(prompt)
    for serial in range(1, count + 1):
        payload = {"ids": to_raw(torch.tensor([fresh], dtype=torch.int32))}
        for executor, stack in executors:
            job = StepJob(
                key="text",
                serial=serial,
                start=len(ids) - len(fresh),
                first=stack.start,
                stop=stack.stop,
                payload=payload,
                outputs="last",
                candidates=CandidateWish(4),
            )
            result = done(executor, job)
            assert result.error is None
            payload = result.output
        fresh = [int(from_raw(payload["tokens"])[0, 0])]
        ids += fresh
    return ids[len(prompt) :]


def generated(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_text_through_three_executors_on_one_thread_equals_generate(
    tiny_model: Get, thread: ComputeThread, family: str
) -> None:
    model = tiny_model(family, True)
    stacks = load_cut(model.checkpoint, CUTS[0])
    executors = [(Executor(stack, thread), stack) for stack in stacks]
    prompt = some_ids(7)[0].tolist()
    model.whole.generation_config.eos_token_id = None
    assert greedy_through(executors, prompt, 30) == generated(model.whole, prompt, 30)
    for executor, _ in executors:
        executor.close()


def test_a_trained_llama_tells_the_story_that_transformers_tells(
    shared_data: Path, thread: ComputeThread
) -> None:
    folder = shared_data / "stories260K"
    checkpoint = open_checkpoint(folder)
    stacks = load_cut(checkpoint, (range(2), range(2, 4), range(4, 5)))
    executors = [(Executor(stack, thread), stack) for stack in stacks]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = [1, *tokenizer.encode("Once upon a time", add_special_tokens=False).ids]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = greedy_through(executors, prompt, 60)
    assert ours == generated(whole, prompt, 60)
    assert tokenizer.decode(prompt + ours).startswith(
        "Once upon a time, there was a little girl named Lily."
    )
    for executor, _ in executors:
        executor.close()


def test_every_hop_but_the_last_passes_on_all_positions(
    llama: TinyModel, whole: Executor, thread: ComputeThread
) -> None:
    wish = CandidateWish(2)
    first = done(whole, ids_job(1, 0, some_ids(5), stop=4, outputs="none", candidates=wish))
    assert list(first.output) == ["hidden"]
    assert first.output["hidden"][:2] == ("float32", (1, 5, 32))
    assert (first.length, first.error, first.fault) == (5, None, False)
    assert first.cache_bytes == 4 * 2 * 2 * 8 * 4 * 64
    assert first.seconds > 0
    assert first.waited >= 0
    second = ids_job(1, 0, some_ids(1), key="b", first=4, payload=first.output, candidates=wish)
    assert from_raw(done(whole, second).output["tokens"]).tolist() == (
        whole_logits(llama, some_ids(5))[0].topk(2).indices.tolist()
    )


@pytest.mark.parametrize(
    ("outputs", "wish", "shapes"),
    [
        ("none", None, {}),
        ("none", CandidateWish(3), {}),
        ("last", None, {"hidden": (1, 1, 32)}),
        ("all", None, {"hidden": (1, 4, 32)}),
        (
            "last",
            CandidateWish(3),
            {"tokens": (1, 3), "logits": (1, 3), "named": (1, 0), "left": (1,)},
        ),
        (
            "all",
            CandidateWish(3, (7,)),
            {"tokens": (4, 3), "logits": (4, 3), "named": (4, 1), "left": (4,)},
        ),
    ],
)
def test_the_last_block_answers_with_what_was_wanted(
    whole: Executor, outputs: Any, wish: CandidateWish | None, shapes: dict[str, tuple[int, ...]]
) -> None:
    result = done(whole, ids_job(1, 0, some_ids(4), outputs=outputs, candidates=wish))
    assert {name: raw[1] for name, raw in result.output.items()} == shapes
    assert (result.length, result.error) == (4, None)


def test_final_hidden_states_are_those_before_norm_and_head(
    llama: TinyModel, whole: Executor
) -> None:
    hidden = from_raw(done(whole, ids_job(1, 0, some_ids(4))).output["hidden"])
    with torch.inference_mode():
        ours = llama.whole.lm_head(llama.whole.model.norm(hidden))
    assert_same(ours, whole_logits(llama, some_ids(4)))


def test_a_start_below_the_length_rolls_back(llama: TinyModel, whole: Executor) -> None:
    ids = some_ids(8)
    done(whole, ids_job(1, 0, some_ids(8, seed=3)))
    done(whole, ids_job(2, 0, ids[:, :5]))  # from the beginning
    done(whole, ids_job(3, 5, some_ids(2, seed=4)))  # a draft
    result = done(whole, ids_job(4, 5, ids[:, 5:], candidates=CandidateWish(0)))
    assert result.length == 8
    ours = from_raw(result.output["logits"])
    assert_same(ours, whole_logits(llama, ids)[0, 5:].sort(descending=True).values)


def test_a_start_beyond_the_length_is_the_senders_fault_and_harms_nothing(
    llama: TinyModel, whole: Executor
) -> None:
    done(whole, ids_job(1, 0, some_ids(3)))
    refused = done(whole, ids_job(2, 4, some_ids(1)))
    assert refused.fault
    assert refused.error == "the step starts at position 4, but 3 are held"
    assert (refused.output, refused.length) == ({}, 3)
    assert done(whole, ids_job(3, 3, some_ids(1))).error is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"payload": {}}, 'either "ids" or "hidden"'),
        ({"payload": {"ids": to_raw(torch.ones(1, 2))}}, "ids cannot be torch.float32"),
        ({"payload": {"hidden": to_raw(some_ids(2))}}, "hidden cannot be torch.int64"),
        ({"payload": {"ids": ("int32", (1, 2), b"short")}}, "5 bytes are no int32 tensor"),
        ({"payload": {"ids": to_raw(some_ids(2)), "mask": to_raw(some_ids(3))}}, "a mask is"),
        ({"stop": BLOCKS + 1}, "not within 0:6"),
        ({"candidates": CandidateWish(1, (96,))}, "not below the vocabulary"),
        (
            {"payload": {"ids": to_raw(some_ids(2, rows=2))}, "candidates": CandidateWish(1)},
            "candidates are for one row, not for 2",
        ),
    ],
)
def test_a_step_that_cannot_be_computed_is_the_senders_fault(
    whole: Executor, changes: dict[str, Any], reason: str
) -> None:
    refused = done(whole, ids_job(1, 0, some_ids(2), **changes))
    assert refused.fault
    assert reason in (refused.error or "")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (CandidateWish(1, (96,)), "not below the vocabulary"),
        (CandidateWish(1, allowed=()), "allows no id"),
    ],
)
def test_a_wish_that_cannot_be_met_leaves_the_leg_as_it_was(
    whole: Executor, wish: CandidateWish, reason: str
) -> None:
    done(whole, ids_job(1, 0, some_ids(3)))
    refused = done(whole, ids_job(2, 3, some_ids(1), candidates=wish))
    assert refused.fault
    assert reason in (refused.error or "")
    assert refused.length == 3


def test_a_leg_keeps_to_the_blocks_it_began_with(whole: Executor) -> None:
    done(whole, ids_job(1, 0, some_ids(3), stop=4))
    refused = done(whole, ids_job(2, 3, some_ids(1), stop=5))
    assert refused.fault
    assert refused.error == "a leg of blocks 0:4 cannot go on with 0:5"


def test_our_own_failure_blames_nobody_and_the_leg_goes_on_from_the_start(
    llama: TinyModel, thread: ComputeThread, caplog: pytest.LogCaptureFixture
) -> None:
    stack = load_stack(llama.checkpoint, 0, BLOCKS)
    executor = Executor(stack, thread)
    done(executor, ids_job(1, 0, some_ids(3)))
    weight = stack._carved.parts.layers[3].self_attn.o_proj.weight
    kept, weight.data = weight.data, torch.zeros(3, 3)
    with caplog.at_level(logging.CRITICAL):
        broken = [done(executor, ids_job(2, 3, some_ids(1)))]
        weight.data = kept
        broken += [done(executor, ids_job(serial, serial, some_ids(1))) for serial in (3, 4)]
    assert [one.fault for one in broken] == [False] * 3
    assert "RuntimeError" in (broken[0].error or "")
    assert done(executor, ids_job(5, 0, some_ids(2))).error is None
    executor.close()


def test_legs_are_independent_and_results_of_each_come_in_the_order_of_its_jobs(
    whole: Executor,
) -> None:
    for serial in range(4):
        for key in ("a", "b"):
            whole.submit(ids_job(serial, serial, some_ids(1, seed=serial), key=key))
    results = collected(whole, 8)
    for key in ("a", "b"):
        assert [one.serial for one in results if one.key == key] == list(range(4))
    assert [one.error for one in results] == [None] * 8
    assert {one.key: one.length for one in results} == {"a": 4, "b": 4}


def test_a_freed_leg_and_a_released_one_hold_nothing(whole: Executor) -> None:
    done(whole, ids_job(1, 0, some_ids(3)))
    whole.submit(FreeJob("leg"))
    whole.submit(FreeJob("never heard of"))
    assert done(whole, ids_job(2, 3, some_ids(1))).error == (
        "the step starts at position 3, but 0 are held"
    )
    last = done(whole, ids_job(1, 0, some_ids(3), release=True))
    assert (last.length, last.cache_bytes, last.error) == (3, 0, None)
    assert done(whole, ids_job(2, 3, some_ids(1))).fault
    assert not whole._legs  # not even empty ones of refused steps


def test_the_descriptor_is_silent_once_all_is_collected(whole: Executor) -> None:
    done(whole, ids_job(1, 0, some_ids(1)))
    assert select.select([whole.fileno()], [], [], 0) == ([], [], [])
    assert whole.collect() == []


def test_a_closed_executor_computes_nothing_and_leaves_the_thread_to_others(
    llama: TinyModel, thread: ComputeThread, whole: Executor
) -> None:
    other = Executor(load_stack(llama.checkpoint, 0, 1), thread)
    hold = threading.Event()
    thread.submit(hold.wait)
    other.submit(ids_job(1, 0, some_ids(1), stop=1))
    other.close()
    other.close()
    hold.set()
    assert done(whole, ids_job(1, 0, some_ids(1))).error is None
    assert other.collect() == []


def test_work_that_fails_does_not_stop_the_thread(
    thread: ComputeThread, whole: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL):
        thread.submit(lambda: 1 / 0)
        assert done(whole, ids_job(1, 0, some_ids(1))).error is None


def test_stopping_waits_only_so_long_and_drops_what_is_queued(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran: list[int] = []
    begun, hold = threading.Event(), threading.Event()
    thread = ComputeThread()
    thread.start()
    thread.submit(lambda: (begun.set(), hold.wait()))
    thread.submit(lambda: ran.append(1))
    assert begun.wait(PATIENCE_SECONDS)
    thread.stop(timeout_seconds=0.01)
    assert "still busy" in caplog.text
    hold.set()
    thread.stop(PATIENCE_SECONDS)
    assert not thread._thread.is_alive()
    assert not ran


def test_the_thread_computes_with_the_threads_asked_for_and_yields_the_interpreter_soon(
    thread: ComputeThread,
) -> None:
    seen: list[int] = []
    ready = threading.Event()
    thread.submit(lambda: (seen.append(torch.get_num_threads()), ready.set()))
    assert ready.wait(PATIENCE_SECONDS)
    assert seen == [1]
    assert sys.getswitchinterval() == pytest.approx(0.0005)
