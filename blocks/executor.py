"""Steps in, results out: how the network's side asks for computation without touching torch.

Messages only, so that the computing could move to a process of its own. All torch work of a
process happens in one `ComputeThread`; several executors may share it.

1. One pass over the weights runs at a time. Legs take turns; steps of one that wait and follow
   each other share a pass, and so do decode steps of several legs (`blocks.batching`).
2. Every StepJob gets exactly one Done, those of a leg in order, whatever happens in it; after
   `close` none.
3. A step that fails by its sender's fault leaves the leg as it was, but for a rollback it asked
   for. After any other failure the leg can only go on from position 0.
4. A step that fails in a pass with other legs' harms none of these: the pass is undone and repeated
   in halves, so that in the end it fails alone.
5. `fileno()` is readable whenever `collect` would return something.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from blocks.batching import Shape, StepQueue
from blocks.codec import Payload, RawTensor, to_raw
from blocks.ends import CandidateWish, candidates
from blocks.errors import BlocksError, StepError
from blocks.legs import Legs
from blocks.payloads import as_one, extent, layout, tensors
from blocks.savepoint import Savepoint
from blocks.sides import Sides
from blocks.stack import Stack
from blocks.thread import Bell, ComputeThread

logger = logging.getLogger(__name__)

# A replay comes as the steps that it replays, one position each. Computed one by one they cost as
# many passes over the weights; together, one. A larger pass would hold up other legs.
MOST_JOINED = 256
# Legs in a joint pass: enough to share the reading of the weights, few enough that a pass of long
# pasts does not become a wait for everyone.
MOST_JOINT = 32
# The logits of all positions of a pass lie in memory at once.
MOST_LOGIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJob:
    """Run one step of a leg: positions from `start` on through the blocks `first:stop`.

    `key` names the leg; its cache is made by its first step and keeps to the same blocks. The
    payload holds "ids" [B, S] or "hidden" [B, S, ...], with "hidden" what some families need beside
    it (see `blocks.sides`), and "mask" [B, start + S] if padded. `outputs` and `candidates` matter
    on a leg that ends at the last block only.
    """

    key: Hashable
    serial: int
    start: int
    first: int
    stop: int
    payload: Payload
    outputs: Literal["none", "last", "all"] = "all"
    candidates: CandidateWish | None = None
    release: bool = False  # free the leg when the step is done


@dataclass(frozen=True, slots=True)
class FreeJob:
    """Free a leg's cache, after all steps submitted before. Unknown legs are none's fault."""

    key: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a StepJob.

    `output` is what the next hop or the client needs: between hops {"hidden"} and what its family
    needs beside it; from the last block {"tokens", "logits", "named", "left"} with candidates,
    {"hidden"} (before the final norm) without, {} where no output is wanted or the step failed.
    """

    key: Hashable
    serial: int
    output: dict[str, RawTensor] = field(default_factory=dict)
    seconds: float  # computing: the step's share of a pass
    waited: float  # from submit to the start of computing, in seconds
    length: int  # positions the leg holds now
    cache_bytes: int  # memory the leg takes now
    run: "Pass | None" = None  # what it was computed in; told by the first step of it only
    error: str | None = None
    fault: bool = False  # the error is the sender's


@dataclass(frozen=True, slots=True)
class Pass:
    """One run through blocks, and perhaps the head.

    `positions`: of all steps in it, each computed once; of a joint pass as many as its legs. So a
    pass of a few positions took what one position takes, whosever they are.
    """

    positions: int
    blocks: int
    has_head: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A job in the queue."""

    job: StepJob | FreeJob
    at: float  # when it came
    shape: Shape | None

    @property
    def key(self) -> Hashable:
        return self.job.key


_Taken = tuple[StepJob, float]  # and when it came
_Outcome = tuple[dict[str, RawTensor], str | None]  # what it gives, or what went wrong


class Executor:
    """Runs the steps of one stack's legs in a ComputeThread and keeps the legs' caches.

    `submit` may be called from any thread; `collect` from the one that waits on `fileno`.
    """

    def __init__(self, stack: Stack, thread: ComputeThread) -> None:
        self._thread = thread
        self._legs = Legs(stack)  # touched by the compute thread only
        most = MOST_LOGIT_BYTES // (4 * stack.vocabulary_size) if stack.holds_head else MOST_JOINED
        most = max(1, min(most, MOST_JOINED))
        self._queue: StepQueue[_Submitted] = StepQueue(most, min(most, MOST_JOINT))
        self._lock = threading.Lock()  # of the queue
        self._done: deque[Done] = deque()
        self._bell = Bell()
        self._is_closed = False

    def submit(self, job: StepJob | FreeJob) -> None:
        """Queue a job. Returns at once; nothing happens after `close`."""
        shape = _shape_of(job) if isinstance(job, StepJob) else None
        with self._lock:
            self._queue.add(_Submitted(job, time.perf_counter(), shape))
        self._thread.submit(self._next)

    def collect(self) -> list[Done]:
        """Take the results that have come since the last call; never waits."""
        self._bell.silence()  # first: what comes from here on rings again
        done: list[Done] = []
        while self._done and not self._is_closed:
            done.append(self._done.popleft())
        return done

    def fileno(self) -> int:
        """The descriptor to wait on, valid until `close`."""
        return self._bell.fileno()

    def close(self) -> None:
        """Forget all legs and queued jobs; the thread goes on for others. May be repeated."""
        self._is_closed = True
        self._bell.close()
        self._thread.submit(self._legs.clear)

    def _next(self) -> None:
        """Do what is next, if it was not done with what came before. In the compute thread."""
        with self._lock:
            if self._is_closed:
                self._queue.clear()
            taken = self._queue.take(self._can_join)
        steps = [(each.job, each.at) for each in taken if isinstance(each.job, StepJob)]
        if steps and steps[0][0].key != steps[-1][0].key:
            self._jointly(steps)
        elif steps:
            self._steps(steps)
            if leg := self._legs.get(taken[0].key):
                leg.look()
        elif taken:
            self._legs.forget(taken[0].key)

    def _can_join(self, waiting: _Submitted) -> bool:
        """Whether a leg's next step, one that decodes, may run with those of others."""
        leg, job = self._legs.get(waiting.key), waiting.job
        if leg is None or not isinstance(job, StepJob):
            return False
        return leg.can_join((job.first, job.stop), job.start)

    def _steps(self, taken: Sequence[_Taken]) -> None:
        """Run steps of one leg that follow each other in one pass and tell what came of them."""
        started = time.perf_counter()
        outputs: list[dict[str, RawTensor]] = [{} for _ in taken]
        error, fault = None, False
        try:
            outputs = self._computed([job for job, _ in taken])
        except StepError as refused:
            if len(taken) > 1:  # nothing was computed: each shall answer for itself
                for one in taken:
                    self._steps([one])
                return
            error, fault = str(refused), True
        except Exception as failed:  # whatever a family's code raises belongs to these steps alone
            logger.exception("steps from %s of %s failed", taken[0][0].serial, taken[0][0].key)
            error = _told(failed)
        seconds = time.perf_counter() - started
        run = None if error else self._pass_of([job for job, _ in taken], seconds)
        for (job, submitted), output in zip(taken, outputs, strict=True):
            self._tell(job, output, seconds / len(taken), started - submitted, run, error, fault)
            run = None

    def _jointly(self, taken: Sequence[_Taken]) -> None:
        """Run one decode step of each of several legs in one pass and tell what came of them."""
        started = time.perf_counter()
        jobs = [job for job, _ in taken]
        part = self._legs[jobs[0].key].part
        if len(taken) == 1 or not part.joins:
            for one in taken:
                self._steps([one])
            return
        saved = [Savepoint(self._legs[job.key].cache) for job in jobs]
        outcomes: list[_Outcome] | None = None
        try:
            outcomes = self._computed_jointly(jobs)
        except StepError:
            pass  # nothing was computed; whose fault it is shows below
        except Exception as failed:  # as above; alone, these steps may well succeed
            logger.exception("a joint pass of %s legs failed", len(jobs))
            if isinstance(failed, BlocksError):
                part.joins = False  # the family cannot, after all
        if outcomes is None:
            for point in saved:
                point.restore()
            half = len(taken) // 2
            self._jointly(taken[:half])
            self._jointly(taken[half:])
            return
        seconds = time.perf_counter() - started
        blocks, has_head = part.stack.stop - part.stack.start, _asks_candidates(jobs[0], part.stack)
        run: Pass | None = Pass(len(jobs), blocks, has_head, seconds)
        for (job, submitted), (output, error) in zip(taken, outcomes, strict=True):
            self._tell(job, output, seconds / len(jobs), started - submitted, run, error, False)
            run = None

    def _tell(
        self,
        job: StepJob,
        output: dict[str, RawTensor],
        seconds: float,
        waited: float,
        run: Pass | None,
        error: str | None,
        fault: bool,
    ) -> None:
        leg = self._legs.get(job.key)
        done = Done(
            key=job.key,
            serial=job.serial,
            output=output,
            seconds=seconds,
            waited=waited,
            length=leg.cache.length if leg else 0,
            cache_bytes=0 if leg is None or job.release else leg.cache.byte_count,
            run=run,
            error=error,
            fault=fault,
        )
        if job.release or done.length == 0:  # a leg that holds nothing is not kept
            self._legs.forget(job.key)
        self._done.append(done)
        self._bell.ring()

    def _pass_of(self, jobs: Sequence[StepJob], seconds: float) -> Pass:
        leg, first = self._legs[jobs[0].key], jobs[0]
        positions = leg.cache.length - first.start
        has_head = _asks_candidates(first, leg.stack)
        return Pass(positions, first.stop - first.first, has_head, seconds)

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
    def _computed(self, jobs: Sequence[StepJob]) -> list[dict[str, RawTensor]]:
        """What each step comes to, in one pass. StepError, and nothing is changed but for a
        rollback, if any cannot be computed as sent.
        """
        first = jobs[0]
        leg = self._legs.opened(first.key, (first.first, first.stop))
        stack = leg.stack
        inputs, mask, sides = as_one([tensors(job.payload, stack.needs) for job in jobs])
        asks = _asks_candidates(first, stack)
        if asks and len(inputs) != 1:
            raise StepError(f"candidates are for one row, not for {len(inputs)}")
        _check_wishes(jobs, stack)
        if leg.cache.is_torn or first.start < leg.cache.length:
            leg.cache.rollback(first.start)
        of_last = len(jobs) == 1 and first.outputs == "last"
        values = stack.run(
            inputs,
            cache=leg.cache,
            start=first.start,
            mask=mask,
            logits_for=(1 if of_last else 0) if asks else None,
            sides=sides,
        )
        if len(jobs) == 1:
            return [_output(first, stack, values, sides)]
        ends = [job.start - first.start + extent(job.payload)[1] for job in jobs]
        parts = [slice(job.start - first.start, end) for job, end in zip(jobs, ends, strict=True)]
        return [
            _output(job, stack, values[:, part], {name: of[:, part] for name, of in sides.items()})
            for job, part in zip(jobs, parts, strict=True)
        ]

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
    def _computed_jointly(self, jobs: Sequence[StepJob]) -> list[_Outcome]:
        """What each step comes to, or why it fails though the pass did not.

        StepError, and nothing is changed, if any cannot be computed as sent. After any other error
        the caches are torn.
        """
        legs = [self._legs[job.key] for job in jobs]
        stack = legs[0].stack
        _check_wishes(jobs, stack)
        parts = [tensors(job.payload, stack.needs) for job in jobs]
        sides = [beside for _, _, beside in parts]
        values = stack.run_joined(
            [inputs for inputs, _, _ in parts],
            [leg.cache for leg in legs],
            logits_for=1 if _asks_candidates(jobs[0], stack) else None,
            sides=sides,
        )
        outcomes: list[_Outcome] = []
        for job, row, beside in zip(jobs, values.split(1), sides, strict=True):
            try:
                outcomes.append((_output(job, stack, row, beside), None))
            except Exception as failed:  # such as what is no number: it is in this row alone
                logger.exception("step %s of %s failed", job.serial, job.key)
                outcomes.append(({}, _told(failed)))
        return outcomes


def _asks_candidates(job: StepJob, stack: Stack) -> bool:
    return stack.holds_head and job.outputs != "none" and job.candidates is not None


def _check_wishes(jobs: Sequence[StepJob], stack: Stack) -> None:
    """StepError for a wish that cannot be met, before anything is computed."""
    for job in jobs:
        if _asks_candidates(job, stack) and job.candidates is not None:
            candidates(torch.empty(0, stack.vocabulary_size), job.candidates)  # of no position


def _told(failed: Exception) -> str:
    return f"{type(failed).__name__}: {failed}"


def _output(job: StepJob, stack: Stack, values: torch.Tensor, sides: Sides) -> dict[str, RawTensor]:
    """What a step gives on: `values` are logits if it asks for candidates, else hidden states."""
    if stack.holds_head and job.outputs == "none":
        return {}
    if stack.holds_head and job.outputs == "last":
        values = values[:, -1:]
    if _asks_candidates(job, stack) and job.candidates is not None:
        found = candidates(values[0], job.candidates)
        return {name: to_raw(value) for name, value in found.items()}
    return {name: to_raw(value) for name, value in {"hidden": values, **sides}.items()}


def _shape_of(job: StepJob) -> Shape | None:
    """What the step can share a pass with; None for one that has it to itself."""
    rows, positions = extent(job.payload)
    if job.release or "mask" in job.payload or not positions:
        return None
    kind = (job.first, job.stop, job.outputs, job.candidates is None, *layout(job.payload))
    return Shape(job.start, positions, kind, is_decode=(rows, positions) == (1, 1))
