"""Chunks of steps through the blocks: the one place where an executor calls its stack.

1. Before anything is computed all is checked that can be: a StepError has changed nothing, but for
   a rollback that the step asked for.
2. When a pass returns it is done: on a device what it came to is brought back in one piece, the one
   time that it is waited for.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from blocks.codec import RawTensor
from blocks.ends import NO_NUMBERS, CandidateWish, candidates, check_wish, chosen
from blocks.errors import BlocksError, StepError
from blocks.jobs import Pass, StepJob
from blocks.legs import Legs
from blocks.payloads import as_one
from blocks.sides import Sides
from blocks.stack import Stack
from blocks.steps import Chunk, Output
from blocks.transfer import brought, wait_for

logger = logging.getLogger(__name__)

_HAS_NUMBERS = "has_numbers"  # beside candidates until they have landed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a chunk came to: the output of its step if it is the last one's, or an error."""

    output: dict[str, RawTensor] = field(default_factory=dict)
    error: str | None = None
    fault: bool = False  # the error is the sender's


def told(failed: Exception) -> str:
    """An error as a sentence for the sender."""
    return f"{type(failed).__name__}: {failed}"


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
def run_alone(legs: Legs, chunks: Sequence[Chunk]) -> list[Outcome]:
    """Run chunks of one leg that follow each other in one pass.

    StepError, and nothing is changed but for a rollback, if any cannot be computed as sent. After
    any other error the cache is torn.
    """
    first, job = chunks[0], chunks[0].step.job
    leg = legs.opened(job.key, (job.first, job.stop))
    stack, cache = leg.stack, leg.cache
    inputs, mask, sides = as_one([chunk.tensors(stack.needs) for chunk in chunks])
    if _asks(job, stack) and len(inputs) != 1:
        raise StepError(f"candidates are for one row, not for {len(inputs)}")
    _check_wishes([chunk.step.job for chunk in chunks], stack)
    start = first.shape.start
    if cache.is_torn or start < cache.length:
        cache.rollback(start)
    wanted = _logits_wanted(chunks, stack)
    values = stack.run(
        inputs,
        cache=cache,
        start=start,
        mask=mask,
        logits_for=wanted,
        sides=sides,
        sequence_length=_sequence_length(chunks, mask, stack),
    )
    given = []
    for chunk in chunks:
        place = slice(chunk.shape.start - start, chunk.shape.start - start + chunk.shape.positions)
        if len(chunks) > 1:
            beside = {name: side[:, place] for name, side in sides.items()}
            given.append(_given(chunk, stack, values[:, place], beside))
        else:
            given.append(_given(chunk, stack, values, sides))
    landed = _landed(given, stack.device)
    return [_outcome(chunk, output) for chunk, output in zip(chunks, landed, strict=True)]


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
def run_jointly(legs: Legs, chunks: Sequence[Chunk]) -> list[Outcome]:
    """Run decode steps of several legs in one pass; one may fail though the pass did not.

    StepError, and nothing is changed, if any cannot be computed as sent. After any other error the
    caches are torn.
    """
    jobs = [chunk.step.job for chunk in chunks]
    theirs = [legs[job.key] for job in jobs]
    parts = []
    for chunk, leg in zip(chunks, theirs, strict=True):
        _check_wishes([chunk.step.job], leg.stack)
        parts.append(chunk.tensors(leg.stack.needs))
    sides = [beside for _, _, beside in parts]
    values = legs.stack.run_joined(
        [inputs for inputs, _, _ in parts],
        [leg.cache for leg in theirs],
        wants_logits=[_asks(job, leg.stack) for job, leg in zip(jobs, theirs, strict=True)],
        sides=sides,
        sequence_lengths=[chunk.step.sequence_length for chunk in chunks],
    )
    stacks = [leg.stack for leg in theirs]
    together = _choose_together(chunks, stacks, values)
    given: list[Output] = []
    failures: dict[int, Outcome] = {}
    for number, (chunk, stack) in enumerate(zip(chunks, stacks, strict=True)):
        try:
            output = together.get(number) or _given(chunk, stack, values[number], sides[number])
        except Exception as failed:  # noqa: BLE001  # it is in this row alone
            failures[number], output = _failure(chunk, failed), {}
        given.append(output)
    outcomes = []
    landed = _landed(given, legs.stack.device)
    for number, (chunk, output) in enumerate(zip(chunks, landed, strict=True)):
        try:
            outcomes.append(failures.get(number) or _outcome(chunk, output))
        except Exception as failed:  # noqa: BLE001  # as above, such as what is no number
            outcomes.append(_failure(chunk, failed))
    return outcomes


def pass_of(legs: Legs, chunks: Sequence[Chunk], seconds: float) -> Pass:
    """The pass that these chunks were in."""
    jobs = [chunk.step.job for chunk in chunks]
    stacks = [legs[job.key].stack for job in jobs]
    blocks = {number for job in jobs for number in range(job.first, job.stop)}
    has_head = _logits_wanted(chunks, stacks[0]) is not None or any(
        _asks(job, stack) for job, stack in zip(jobs[1:], stacks[1:], strict=True)
    )
    return Pass(sum(chunk.shape.positions for chunk in chunks), len(blocks), has_head, seconds)


def undo(legs: Legs, chunk: Chunk) -> None:
    """Take back what chunks before this one, which cannot be computed as sent, left in its leg.

    Where the family cannot go back so far, the leg can go on from position 0 only.
    """
    leg, start = legs.get(chunk.key), chunk.step.job.start
    if chunk.offset and leg is not None and not leg.cache.is_torn:
        if leg.cache.can_roll_back(start):
            leg.cache.rollback(start)
        else:
            leg.cache.is_torn = True


def _sequence_length(
    chunks: Sequence[Chunk], mask: torch.Tensor | None, stack: Stack
) -> int | None:
    """How many positions the forward has that a run is a part of; padding has none."""
    if mask is None:
        return max(chunk.step.sequence_length for chunk in chunks)
    _, whole, _ = chunks[0].step.tensors(stack.needs)
    return None if whole is None else int(whole.ne(0).sum(1).max())


def _asks(job: StepJob, stack: Stack) -> bool:
    """Is it for candidates that the step asks?"""
    return stack.holds_head and job.outputs != "none" and job.candidates is not None


def _logits_wanted(chunks: Sequence[Chunk], stack: Stack) -> int | None:
    """Of how many of the last positions of a run logits are needed: 0 for all, None for none."""
    first = chunks[0]
    if not _asks(first.step.job, stack):
        return None
    if len(chunks) > 1 or first.step.job.outputs == "all":
        return 0
    return 1 if first.is_last else None


def _check_wishes(jobs: Sequence[StepJob], stack: Stack) -> None:
    """StepError for a wish that cannot be met, before anything is computed."""
    for job in jobs:
        if _asks(job, stack) and job.candidates is not None:
            check_wish(job.candidates, stack.vocabulary_size)


def _choose_together(
    chunks: Sequence[Chunk], stacks: Sequence[Stack], values: Sequence[torch.Tensor]
) -> dict[int, Output]:
    """What steps that want the same candidates get of their logits, by place: of many at once it
    takes hardly longer than of one. Left out is who asks alone, or with one that has no numbers.
    """
    asking: dict[CandidateWish, list[int]] = {}
    for number, (chunk, stack) in enumerate(zip(chunks, stacks, strict=True)):
        wish = chunk.step.job.candidates
        if wish is not None and _asks(chunk.step.job, stack):
            asking.setdefault(wish, []).append(number)
    together: dict[int, Output] = {}
    for wish, numbers in asking.items():
        if len(numbers) < 2:
            continue
        try:
            found = _picked(torch.cat([values[number][0] for number in numbers]), wish)
        except BlocksError:  # it is not said of whom
            continue
        for row, number in enumerate(numbers):
            together[number] = {name: part[row : row + 1] for name, part in found.items()}
    return together


def _picked(logits: torch.Tensor, wish: CandidateWish) -> Output:
    """The candidates of some positions; BlocksError here, or when they land, if there are none."""
    if logits.device.type == "cpu":
        return candidates(logits, wish)
    found, has_numbers = chosen(logits, wish)
    return {**found, _HAS_NUMBERS: has_numbers}


def _landed(given: Sequence[Output], device: torch.device) -> list[Output]:
    """What chunks came to, in this process's memory. All that was asked of the device is done."""
    if device.type == "cpu":
        return list(given)
    tensors = [tensor for output in given for tensor in output.values()]
    if not tensors:
        wait_for(device)
    ours = iter(brought(tensors))
    return [{name: next(ours) for name in output} for output in given]


def _failure(chunk: Chunk, failed: Exception) -> Outcome:
    logger.error("step %s of %s failed", chunk.step.job.serial, chunk.key, exc_info=failed)
    return Outcome(error=told(failed))


def _outcome(chunk: Chunk, given: Output) -> Outcome:
    """Put what a chunk came to into its step; what the step came to, with its last one."""
    has_numbers = given.pop(_HAS_NUMBERS, None)
    if has_numbers is not None and not bool(has_numbers.all()):
        raise BlocksError(NO_NUMBERS)
    chunk.step.put(given)
    return Outcome(chunk.step.output() if chunk.is_last else {})


def _given(chunk: Chunk, stack: Stack, values: torch.Tensor, sides: Sides) -> Output:
    """What a chunk came to. `values` are logits where the step asks for candidates and this chunk
    has some to give.
    """
    job = chunk.step.job
    if stack.holds_head and job.outputs == "none":
        return {}
    if stack.holds_head and job.outputs == "last":
        if not chunk.is_last:
            return {}
        values = values[:, -1:]
    if _asks(job, stack) and job.candidates is not None:
        return _picked(values[0], job.candidates)
    return {"hidden": values, **sides}
