"""Steps in, results out: how the network's side asks for computation without touching torch.

Messages only (`blocks.jobs`), so that the computing could move to a process of its own. All torch
work of a process happens in one `ComputeThread`; several executors may share it.

1. One pass over the weights runs at a time. Clients take turns, and so do their legs; steps of one
   that wait and follow each other share a pass, and so do decode steps of several legs, and long
   steps are computed in chunks, between which others are (`blocks.batching`, `blocks.steps`).
2. Every StepJob gets exactly one Done, those of a leg in order, whatever happens in it; after
   `close` none.
3. A step that fails by its sender's fault leaves the leg as it was, but for a rollback it asked
   for. After any other failure the leg can only go on from position 0; so it is where the fault
   shows in a later chunk of a step, and the family cannot go back to where the step began.
4. A step that fails in a pass with other legs' harms none of these: the pass is undone and repeated
   in halves, so that in the end it fails alone.
5. No more waits than `Bounds` allows: a step beyond that fails, in its turn, and nothing else does.
6. `fileno()` is readable whenever `collect` would return something.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial

from blocks.backlog import Backlog
from blocks.batching import StepQueue
from blocks.errors import BlocksError, StepError
from blocks.jobs import Done, ForkJob, FreeJob, Pass, StepJob, failed_fork
from blocks.legs import Legs
from blocks.passes import Outcome, pass_of, run_alone, run_jointly, told, undo
from blocks.payloads import layout
from blocks.returns import Returns
from blocks.savepoint import Savepoint
from blocks.stack import Stack
from blocks.steps import Bounds, Chunk, Cutter, Errand, Step
from blocks.thread import Bell, ComputeThread

__all__ = ["Bounds", "Done", "Executor", "ForkJob", "FreeJob", "Pass", "StepJob"]

logger = logging.getLogger(__name__)

_BOUNDS = Bounds()
_FREED = Outcome(error="its session was freed before it was computed")


class Executor:
    """Runs the steps of one stack's legs in a ComputeThread and keeps the legs' caches.

    `submit` may be called from any thread; `collect` from the one that waits on `fileno`.
    """

    def __init__(self, stack: Stack, thread: ComputeThread, bounds: Bounds = _BOUNDS) -> None:
        self._thread = thread
        self._legs = Legs(stack)  # touched by the compute thread only
        self._cutter = Cutter(stack, bounds)
        self._lock = threading.Condition(threading.Lock())  # of the next five
        self._queue: StepQueue[Chunk | Errand] = StepQueue(bounds.joint_legs)
        self._backlog = Backlog(bounds.waiting_bytes, bounds.leg_waiting_bytes)
        self._forks: deque[ForkJob] = deque()
        self._returns = Returns()
        self._is_at_work = False  # the thread will look at the queue, or is looking
        self._most_joint = bounds.joint_legs
        self._decode_seconds = 0.0  # of the last pass of decode steps
        self._done: deque[Done] = deque()
        self._bell = Bell()
        self._is_closed = False

    @property
    def waiting_bytes(self) -> int:
        """Memory of the steps submitted and not done. From any thread."""
        return self._backlog.bytes

    @property
    def waiting_steps(self) -> int:
        """How many steps were submitted and are not done. From any thread."""
        return self._backlog.steps

    def submit(self, job: StepJob | ForkJob | FreeJob) -> None:
        """Queue a job. Returns at once; nothing happens after `close`."""
        is_awaited = False
        with self._lock:
            if isinstance(job, StepJob):
                is_awaited = self._add(job) and self._is_worth_waiting()
            elif isinstance(job, ForkJob):
                self._forks.append(job)
            else:
                self._queue.change(job.key, self._freed)
                self._queue.add(Errand(job.key, partial(self._forget, job.key)))
            if not is_awaited:  # else the others shall not each wake it
                self._lock.notify()
            if not self._is_at_work:
                self._is_at_work = True
                self._thread.submit(self._work)

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

    def _add(self, job: StepJob) -> bool:
        """Queue a step in chunks, or its refusal; whether it decodes. Holding the lock."""
        self._returns.came(job.key, time.perf_counter())
        step, is_decode = Step(job), False
        refused = self._backlog.refusal(job.key, step.byte_count)
        if refused is not None:
            step = Step(replace(job, payload={}))  # what it held is not kept
            self._queue.add(self._failing(step, Outcome(error=refused[0], fault=refused[1])))
        else:
            for chunk in self._cutter.chunks(step):
                self._queue.add(chunk)
                is_decode = chunk.shape.is_decode
        self._backlog.add(job.key, step.byte_count)
        return is_decode

    def _is_worth_waiting(self) -> bool:
        """Are others about to come who could join the next pass? Holding the lock."""
        now = time.perf_counter()
        has_room = len(self._queue) < self._most_joint
        return has_room and self._returns.worth_waiting(now, self._decode_seconds) > 0

    def _failing(self, step: Step, outcome: Outcome) -> Errand:
        return Errand(step.job.key, partial(self._finish_all, [(step, outcome)]))

    def _freed(self, waiting: Chunk | Errand) -> Chunk | Errand | None:
        """What becomes of what waits of a leg that is freed."""
        if isinstance(waiting, Errand):
            return waiting
        return self._failing(waiting.step, _FREED) if waiting.is_last else None

    def _work(self) -> None:
        """Run the errands that are next, and one pass. In the compute thread."""
        try:
            taken = self._taken()
            while taken and isinstance(taken[0], Errand):
                taken[0].work()
                taken = self._taken()
            chunks = [each for each in taken if isinstance(each, Chunk)]
            if chunks and chunks[0].key != chunks[-1].key:
                self._jointly(chunks)
            elif chunks:
                self._run(chunks)
        finally:
            with self._lock:  # other executors of the thread have their turn before the next pass
                self._is_at_work = len(self._queue) + len(self._forks) > 0
                if self._is_at_work:
                    self._thread.submit(self._work)

    def _taken(self) -> list[Chunk | Errand]:
        while True:
            with self._lock:
                self._await_others()
                if self._is_closed:
                    self._queue.clear()
                    self._forks.clear()
                forks = list(self._forks)
                self._forks.clear()
                if not forks:
                    return self._queue.take(self._can_join)
            # before whatever was submitted after them: a donor may be freed, or rolled back
            for job in forks:
                self._fork(job)

    def _await_others(self) -> None:
        """Before a joint pass, wait for those that are about to come. Holding the lock."""
        end = None
        while 0 < self._queue.ready(self._can_join) < self._most_joint:
            now = time.perf_counter()
            left = self._returns.worth_waiting(now, self._decode_seconds)
            end = now + left if end is None else end  # whoever comes, it gets no later
            if min(left, end - now) <= 0:
                return
            self._lock.wait(min(left, end - now))

    def _fork(self, job: ForkJob) -> None:
        try:
            self._legs.fork(job.key, job.of, job.length)
        except (BlocksError, StepError) as failed:  # the donor has failed since it was asked for
            logger.warning("no fork of %s: %s", job.of, failed)
            self._done.append(failed_fork(job.key, str(failed)))
            self._bell.ring()

    def _can_join(self, waiting: Chunk | Errand) -> bool:
        """Whether a leg's next step, one that decodes, may run with those of others."""
        leg = self._legs.get(waiting.key)
        if leg is None or isinstance(waiting, Errand):
            return False
        job = waiting.step.job
        return leg.can_join((job.first, job.stop), job.start, layout(job.payload))

    def _run(self, chunks: Sequence[Chunk]) -> None:
        """Run chunks of one leg that follow each other in one pass and tell what came of them."""
        chunks = [chunk for chunk in chunks if not chunk.step.is_over]  # an earlier chunk failed
        if not chunks:
            return
        started, run = time.perf_counter(), None
        try:
            outcomes = run_alone(self._legs, chunks)
            run = pass_of(self._legs, chunks, time.perf_counter() - started)
            self._legs[chunks[0].key].look(layout(chunks[0].step.job.payload))
        except StepError as refused:
            if len(chunks) > 1:  # nothing was computed: each shall answer for itself
                for one in chunks:
                    self._run([one])
                return
            undo(self._legs, chunks[0])
            outcomes = [Outcome(error=str(refused), fault=True)]
        except Exception as failed:  # whatever a family's code raises belongs to these steps alone
            job = chunks[0].step.job
            logger.exception("steps from %s of %s failed", job.serial, job.key)
            outcomes = [Outcome(error=told(failed)) for _ in chunks]
        self._tell(chunks, outcomes, time.perf_counter() - started, run)

    def _jointly(self, chunks: Sequence[Chunk]) -> None:
        """Run one decode step of each of several legs in one pass and tell what came of them."""
        parts = {id(leg.part): leg.part for leg in (self._legs[chunk.key] for chunk in chunks)}
        if len(chunks) == 1 or not all(part.joins for part in parts.values()):
            for chunk in chunks:
                self._run([chunk])
            return
        saved = [Savepoint(self._legs[chunk.key].cache) for chunk in chunks]
        started = time.perf_counter()
        try:
            outcomes = run_jointly(self._legs, chunks)
        except Exception as failed:  # whose fault it is shows below: alone, most may well succeed
            if not isinstance(failed, StepError):
                logger.exception("a joint pass of %s legs failed", len(chunks))
            if isinstance(failed, BlocksError):
                for part in parts.values():
                    part.look_again()  # the family cannot, after all
            for point in saved:
                point.restore()
            half = len(chunks) // 2
            self._jointly(chunks[:half])
            self._jointly(chunks[half:])
            return
        seconds = time.perf_counter() - started
        self._tell(chunks, outcomes, seconds, pass_of(self._legs, chunks, seconds))
        self._queue.pads = not self._legs.stack.joins_by_rows

    def _tell(
        self, chunks: Sequence[Chunk], outcomes: Sequence[Outcome], seconds: float, run: Pass | None
    ) -> None:
        """Note a pass, and tell what came of the steps that end with it."""
        if chunks[0].shape.is_decode:
            self._decode_seconds = seconds
        ended: list[tuple[Step, Outcome]] = []
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            chunk.step.was_in(seconds, len(chunks), run)
            run = None  # the first tells of it
            if outcome.error is not None or chunk.is_last:
                ended.append((chunk.step, outcome))
        self._finish_all(ended)

    def _finish_all(self, ended: Sequence[tuple[Step, Outcome]]) -> None:
        """Tell what came of some steps, all at once: whoever hears of one takes the interpreter."""
        try:
            for step, outcome in ended:
                self._finish(step, outcome)
        finally:
            self._bell.ring()

    def _finish(self, step: Step, outcome: Outcome) -> None:
        """Put down what came of a step, once: it may fail as its leg is freed."""
        if step.is_over:
            return
        job, leg = step.job, self._legs.get(step.job.key)
        step.is_over = True
        with self._lock:
            self._backlog.remove(job.key, step.byte_count)
            self._returns.went(job.key, time.perf_counter())
        done = Done(
            key=job.key,
            serial=job.serial,
            output=outcome.output,
            seconds=step.seconds,
            waited=step.waited,
            length=leg.cache.length if leg else 0,
            cache_bytes=0 if leg is None or job.release else leg.cache.byte_count,
            shortest_fork=leg.shortest_fork if leg else None,
            run=step.run,
            error=outcome.error,
            fault=outcome.fault,
        )
        if job.release or done.length == 0:  # a leg that holds nothing is not kept
            self._forget(job.key)
        self._done.append(done)

    def _forget(self, key: Hashable) -> None:
        """Free a leg."""
        self._legs.forget(key)
        with self._lock:
            self._returns.forget(key)
