"""Steps in, results out: how the network's side asks for computation without touching torch.

Messages only, so that the computing could move to a process of its own. All torch work of a
process happens in one `ComputeThread`; several executors may share it.

1. Jobs of all executors on a thread run one at a time, in the order they were submitted.
2. Every StepJob gets exactly one Done, in order, whatever happens in it; after `close` none.
3. A step that fails by its sender's fault leaves the leg as it was, but for a rollback it asked
   for. After any other failure the leg can only go on from position 0.
4. `fileno()` is readable whenever `collect` would return something.
"""

import logging
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal

import torch

from blocks.cache import StackCache
from blocks.codec import Payload, RawTensor, from_raw, to_raw
from blocks.ends import CandidateWish, candidates
from blocks.errors import StepError
from blocks.stack import Stack

logger = logging.getLogger(__name__)

# The thread that talks to the network must get the interpreter's lock soon while torch is busy
# with small operations: ten times sooner than by default.
_SWITCH_SECONDS = 0.0005

# Longer than any sensible step; a thread that is stuck in torch cannot be ended at all.
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJob:
    """Run one step of a leg: positions from `start` on through the blocks `first:stop`.

    `key` names the leg; its cache is made by its first step and keeps to the same blocks. The
    payload holds "ids" [B, S] or "hidden" [B, S, ...], and "mask" [B, start + S] if padded.
    `outputs` and `candidates` matter on a leg that ends at the last block only.
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

    `output` is what the next hop or the client needs: {"hidden"} between hops; from the last block
    {"tokens", "logits", "named", "left"} with candidates, {"hidden"} (before the final norm)
    without, {} where no output is wanted or the step failed.
    """

    key: Hashable
    serial: int
    output: dict[str, RawTensor] = field(default_factory=dict)
    seconds: float  # computing
    waited: float  # from submit to the start of computing, in seconds
    length: int  # positions the leg holds now
    cache_bytes: int  # memory the leg takes now
    positions: int = 0  # of the step; 0 if it failed
    blocks: int = 0  # that it went through
    has_head: bool = False  # and through the head
    error: str | None = None
    fault: bool = False  # the error is the sender's


class ComputeThread:
    """The one thread of a process in which torch computes. A context manager: start, then stop.

    Sets two things for the whole process as it starts: the interpreter's switch interval and, with
    `torch_threads`, how many threads torch computes with.
    """

    def __init__(self, torch_threads: int | None = None) -> None:
        self._torch_threads = torch_threads
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._is_stopping = False
        # a daemon: a thread stuck in torch must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Start computing. At most once."""
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread.start()

    def stop(self, timeout_seconds: float = _STOP_SECONDS) -> None:
        """Finish the job at hand, drop the others, and wait that long at most for the end."""
        self._is_stopping = True
        self._work.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("the compute thread is still busy after %s s", timeout_seconds)

    def __enter__(self) -> "ComputeThread":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` in the thread, after what was submitted before. From any thread."""
        self._work.put(work)

    def _run(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        while (work := self._work.get()) is not None and not self._is_stopping:
            try:
                work()
            except Exception:  # one executor's trouble must not stop the others' computing
                logger.exception("work in the compute thread failed")
            del work  # or the last job's tensors would live until the next one comes


class _Bell:
    """A file descriptor that is readable between `ring` and `silence`. Safe between two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a closed descriptor's number may be another's by now
        self._is_closed = False
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        if sys.platform == "linux":
            self._reading = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._sockets = socket.socketpair()
            for one in self._sockets:
                one.setblocking(False)
            self._reading = self._sockets[0].fileno()

    def fileno(self) -> int:
        return self._reading

    def ring(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            try:
                if sys.platform == "linux":
                    os.eventfd_write(self._reading, 1)
                elif self._sockets is not None:
                    self._sockets[1].send(b"!")
            except BlockingIOError:
                pass  # it is ringing as loud as it can

    def silence(self) -> None:
        with self._lock:
            try:
                if not self._is_closed:
                    os.read(self._reading, 4096)
            except BlockingIOError:
                pass  # it was silent

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._sockets is None:
                os.close(self._reading)
            else:
                for one in self._sockets:
                    one.close()


@dataclass(slots=True)
class _Leg:
    stack: Stack
    cache: StackCache


class Executor:
    """Runs the steps of one stack's legs in a ComputeThread and keeps the legs' caches.

    `submit` may be called from any thread; `collect` from the one that waits on `fileno`.
    """

    def __init__(self, stack: Stack, thread: ComputeThread) -> None:
        self._stack = stack
        self._thread = thread
        self._legs: dict[Hashable, _Leg] = {}  # touched by the compute thread only
        self._done: deque[Done] = deque()
        self._bell = _Bell()
        self._is_closed = False

    def submit(self, job: StepJob | FreeJob) -> None:
        """Queue a job. Returns at once; nothing happens after `close`."""
        if isinstance(job, FreeJob):
            self._thread.submit(partial(self._legs.pop, job.key, None))
        else:
            self._thread.submit(partial(self._step, job, time.perf_counter()))

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

    def _step(self, job: StepJob, submitted: float) -> None:
        """Runs in the compute thread."""
        if self._is_closed:
            return
        started = time.perf_counter()
        output: dict[str, RawTensor] = {}
        error, fault = None, False
        try:
            output = self._computed(job)
        except StepError as refused:
            error, fault = str(refused), True
        except Exception as failed:  # whatever a family's code raises belongs to this step alone
            logger.exception("step %s of %s failed", job.serial, job.key)
            error = f"{type(failed).__name__}: {failed}"
        leg = self._legs.get(job.key)
        done = Done(
            key=job.key,
            serial=job.serial,
            output=output,
            seconds=time.perf_counter() - started,
            waited=started - submitted,
            length=leg.cache.length if leg else 0,
            cache_bytes=0 if leg is None or job.release else leg.cache.byte_count,
            positions=0 if leg is None or error else leg.cache.length - job.start,
            blocks=job.stop - job.first,
            has_head=leg is not None and _asks_candidates(job, leg.stack),
            error=error,
            fault=fault,
        )
        if job.release or done.length == 0:  # a leg that holds nothing is not kept
            self._legs.pop(job.key, None)
        self._done.append(done)
        self._bell.ring()

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not followed
    def _computed(self, job: StepJob) -> dict[str, RawTensor]:
        inputs, mask = _inputs(job.payload)
        leg = self._leg(job)
        if leg.cache.is_torn or job.start < leg.cache.length:
            leg.cache.rollback(job.start)
        stack = leg.stack
        wish = job.candidates if _asks_candidates(job, stack) else None
        if wish is not None and len(inputs) != 1:
            raise StepError(f"candidates are for one row, not for {len(inputs)}")
        positions = None if wish is None else (1 if job.outputs == "last" else 0)
        values = stack.run(
            inputs, cache=leg.cache, start=job.start, mask=mask, logits_for=positions
        )
        if wish is not None:
            return {name: to_raw(value) for name, value in candidates(values[0], wish).items()}
        if stack.holds_head and job.outputs == "none":
            return {}
        if stack.holds_head and job.outputs == "last":
            values = values[:, -1:]
        return {"hidden": to_raw(values)}

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


def _inputs(payload: Payload) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids or hidden states, and the mask if there is one."""
    if ("ids" in payload) == ("hidden" in payload):
        raise StepError('a payload holds either "ids" or "hidden"')
    name = "ids" if "ids" in payload else "hidden"
    inputs = from_raw(payload[name])
    if inputs.is_floating_point() == (name == "ids"):
        raise StepError(f"{name} cannot be {inputs.dtype}")
    return inputs, from_raw(payload["mask"]) if "mask" in payload else None
