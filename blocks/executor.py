"""Steps in, results out: how the network's side asks for computation without touching torch.

Messages only, so that the computing could move to a process of its own. All torch work of a
process happens in one `ComputeThread`; several executors may share it.

1. One pass over the weights runs at a time. Legs take turns, and steps of one that wait and follow
   each other share a pass (`blocks.batching`).
2. Every StepJob gets exactly one Done, those of a leg in order, whatever happens in it; after
   `close` none.
3. A step that fails by its sender's fault leaves the leg as it was, but for a rollback it asked
   for. After any other failure the leg can only go on from position 0.
4. `fileno()` is readable whenever `collect` would return something.
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
from blocks.cache import StackCache
from blocks.codec import Payload, RawTensor, from_raw, to_raw
from blocks.ends import CandidateWish, candidates
from blocks.errors import StepError
from blocks.sides import Sides
from blocks.stack import Stack
from blocks.thread import Bell, ComputeThread

logger = logging.getLogger(__name__)

# A replay comes as the steps that it replays, one position each. Computed one by one they cost as
# many passes over the weights; together, one. A larger pass would hold up other legs.
MOST_JOINED = 256
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
    """One run through blocks, and perhaps the head."""

    positions: int
    blocks: int
    has_head: bool
    seconds: float


@dataclass(slots=True)
class _Leg:
    stack: Stack
    cache: StackCache


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A job in the queue."""

    job: StepJob | FreeJob
    at: float
    shape: Shape | None

    @property
    def key(self) -> Hashable:
        return self.job.key


class Executor:
    """Runs the steps of one stack's legs in a ComputeThread and keeps the legs' caches.

    `submit` may be called from any thread; `collect` from the one that waits on `fileno`.
    """

    def __init__(self, stack: Stack, thread: ComputeThread) -> None:
        self._stack = stack
        self._thread = thread
        self._legs: dict[Hashable, _Leg] = {}  # touched by the compute thread only
        most = MOST_LOGIT_BYTES // (4 * stack.vocabulary_size) if stack.holds_head else MOST_JOINED
        self._queue: StepQueue[_Submitted] = StepQueue(max(1, min(most, MOST_JOINED)))
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
            taken = self._queue.take()
        steps = [(each.job, each.at) for each in taken if isinstance(each.job, StepJob)]
        if steps:
            self._steps(steps)
        elif taken:
            self._legs.pop(taken[0].key, None)

    def _steps(self, taken: Sequence[tuple[StepJob, float]]) -> None:
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
            error = f"{type(failed).__name__}: {failed}"
        seconds = time.perf_counter() - started
        run = None if error else self._pass_of([job for job, _ in taken], seconds)
        for (job, submitted), output in zip(taken, outputs, strict=True):
            self._tell(job, output, seconds / len(taken), started - submitted, run, error, fault)
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
            self._legs.pop(job.key, None)
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
        leg = self._leg(first)
        stack = leg.stack
        inputs, mask, sides = _joined([_inputs(job.payload, stack.needs) for job in jobs])
        asks = _asks_candidates(first, stack)
        if asks and len(inputs) != 1:
            raise StepError(f"candidates are for one row, not for {len(inputs)}")
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
        parts = [slice(job.start - first.start, _end(job) - first.start) for job in jobs]
        return [
            _output(job, stack, values[:, part], {name: of[:, part] for name, of in sides.items()})
            for job, part in zip(jobs, parts, strict=True)
        ]

    def _leg(self, job: StepJob) -> _Leg:
        """The job's leg. StepError if its blocks are not held, or are not those it began with."""
        leg = self._legs.get(job.key)
        if leg is None:
            stack = self._stack.part(job.first, job.stop)
            leg = self._legs[job.key] = _Leg(stack, stack.new_cache())
        elif (leg.stack.start, leg.stack.stop) != (job.first, job.stop):
            raise StepError(
                f"a leg of blocks {leg.stack.start}:{leg.stack.stop} cannot go on with "
                f"{job.first}:{job.stop}"
            )
        return leg


def _asks_candidates(job: StepJob, stack: Stack) -> bool:
    return stack.holds_head and job.outputs != "none" and job.candidates is not None


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


def _end(job: StepJob) -> int:
    """The position after the step's last."""
    tensor = job.payload.get("hidden") or job.payload.get("ids")
    return job.start + (tensor[1][1] if tensor is not None and len(tensor[1]) > 1 else 0)


def _shape_of(job: StepJob) -> Shape | None:
    """What the step can share a pass with; None for one that has it to itself."""
    if job.release or "mask" in job.payload or _end(job) == job.start:
        return None
    layout = {name: (raw[0], raw[1][:1], raw[1][2:]) for name, raw in job.payload.items()}
    kind = (job.first, job.stop, job.outputs, job.candidates is None, *sorted(layout.items()))
    return Shape(job.start, _end(job) - job.start, kind)


def _joined(
    parts: "Sequence[tuple[torch.Tensor, torch.Tensor | None, Sides]]",
) -> tuple[torch.Tensor, torch.Tensor | None, Sides]:
    """The inputs of steps that follow each other, as those of one."""
    if len(parts) == 1:
        return parts[0]
    sides = {name: torch.cat([beside[name] for _, _, beside in parts], 1) for name in parts[0][2]}
    return torch.cat([inputs for inputs, _, _ in parts], 1), None, sides


def _inputs(
    payload: Payload, needs: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor | None, Sides]:
    """Ids or hidden states, the mask if there is one, and what is needed beside hidden states."""
    has_hidden = "hidden" in payload
    if has_hidden == ("ids" in payload) and not (has_hidden and "ids" in needs):
        raise StepError('a payload holds either "ids" or "hidden"')
    name = "hidden" if has_hidden else "ids"
    inputs = from_raw(payload[name])
    if inputs.is_floating_point() != has_hidden:
        raise StepError(f"{name} cannot be {inputs.dtype}")
    mask = from_raw(payload["mask"]) if "mask" in payload else None
    beside = [one for one in needs if has_hidden and one in payload]
    return inputs, mask, {one: from_raw(payload[one]) for one in beside}
