"""An executor of a stack whose sessions have their keys in pages, and whose steps are recorded."""

from collections.abc import Callable, Sequence
from contextlib import closing

import pytest
import torch
from test_decoding import decoder_of, stacks_of
from test_executor_texts import LENGTHS, SMALL, TOKENS, Writer, joint_passes, write
from tiny_models import BLOCKS, TinyModel, some_ids

from blocks.executor import Executor
from blocks.recorder import Recorder, TraceRecorder
from blocks.stack import Stack
from blocks.thread import ComputeThread

Get = Callable[[str, bool], TinyModel]
Session = tuple[str, list[int], tuple[int, ...]]


def texts(stack: Stack, thread: ComputeThread, writers: Sequence[Writer]) -> list[list[int]]:
    """What they write at once."""
    with closing(Executor(stack, thread, SMALL)) as executor:
        results = write(executor, writers)
    assert len(writers) == 1 or max(joint_passes(results)) >= min(4, len(writers))
    return [writer.text for writer in writers]


def of_each_alone(
    stack: Stack, thread: ComputeThread, sessions: Sequence[Session]
) -> list[list[int]]:
    return [texts(stack, thread, [Writer(*session)])[0] for session in sessions]


@pytest.mark.parametrize(
    ("family", "count", "recorder"),
    [("llama", 5, TraceRecorder()), ("llama", 17, None), ("gemma3_text", 17, None)],
)
def test_sessions_of_mixed_prompts_write_what_each_writes_alone_without_pages(
    tiny_model: Get, thread: ComputeThread, family: str, count: int, recorder: Recorder | None
) -> None:
    plain, paged = stacks_of(tiny_model(family, False), recorder=recorder)
    sessions: list[Session] = [
        (f"{'abc'[number % 3]}{number}", some_ids(length, seed=number)[0].tolist(), (0, BLOCKS))
        for number, length in enumerate(LENGTHS[:count])
    ]
    ours = texts(paged, thread, [Writer(*session) for session in sessions])
    assert ours == of_each_alone(plain, thread, sessions)
    assert {len(text) for text in ours} == {TOKENS}
    decoder = decoder_of(paged)
    assert (decoder.repeated > 0) == (recorder is not None)
    assert sum(pool.held for pool in decoder.pools) == 0  # the executor has forgotten its legs


def test_a_joint_pass_that_breaks_costs_no_session_its_pages(
    llama: TinyModel, thread: ComputeThread
) -> None:
    plain, paged = stacks_of(llama, recorder=None)
    sessions: list[Session] = [
        (f"{number}", some_ids(3 + number, seed=number)[0].tolist(), (0, BLOCKS))
        for number in range(4)
    ]
    expected = of_each_alone(plain, thread, sessions)
    left = [3]

    def fail(layer: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1 and left[0]:
            left[0] -= 1
            raise RuntimeError("a moment's lack of memory")

    with paged._carved.parts.layers[3].register_forward_pre_hook(fail):
        ours = texts(paged, thread, [Writer(*session) for session in sessions])
    assert left == [0]
    assert ours == expected
