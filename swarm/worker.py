"""Whose turn it is on the executor: steps go in, results come out on the trio thread.

1. The trio thread never waits for compute: one task wakes when results are there.
2. Results of one leg come in the order its steps went in; of a leg that was forgotten none.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Protocol

import trio

from swarm.chain import Payload
from swarm.messages import Step
from swarm.wire import Tensor

if TYPE_CHECKING:
    from blocks.codec import RawTensor
    from blocks.executor import Done


class Executor(Protocol):
    """The message interface of `blocks.executor.Executor`."""

    def submit(self, job: Any) -> None:
        """Take a job; never waits."""

    def collect(self) -> "list[Done]":
        """Return what is finished."""

    def fileno(self) -> int:
        """A file that is readable when results wait."""


class Worker:
    """Turns steps into jobs of the executor, and hands its results back.

    `waiting_bytes` and `waiting_steps` count what was given to the executor and did not come back:
    the memory that it takes here.
    """

    def __init__(self, executor: Executor, on_done: "Callable[[Done], None]") -> None:
        self._executor = executor
        self._on_done = on_done
        self._sizes: dict[Hashable, deque[int]] = {}  # of each leg's steps that wait, in order
        self._forgotten: Counter[Hashable] = Counter()  # how many of these nobody wants any more
        self._forked: set[Hashable] = set()  # legs that began as others'
        self.waiting_bytes = 0

    @property
    def waiting_steps(self) -> int:
        """How many steps wait, or are computed."""
        return sum(map(len, self._sizes.values()))

    def compute(self, leg: int, span: range, step: Step, client: Hashable = None) -> None:
        """Queue a step for the blocks of `span`, on the cache of this leg, in its client's turn."""
        from blocks.backlog import bytes_of
        from blocks.ends import CandidateWish
        from blocks.executor import StepJob

        wish = None
        if step.wish is not None:
            asked = step.wish
            wish = CandidateWish(asked.count, asked.penalised, asked.bias, asked.allowed)
        job = StepJob(
            key=leg,
            serial=step.serial,
            start=step.start,
            first=span.start,
            stop=span.stop,
            payload=step.payload,
            outputs=step.wanted,
            candidates=wish,
            client=client,
            sequence_length=step.sequence_length,
        )
        size = bytes_of(job.payload)
        self._sizes.setdefault(leg, deque()).append(size)
        self.waiting_bytes += size
        self._executor.submit(job)

    def fork(self, leg: int, of: int, length: int) -> None:
        """Let the cache of this leg begin with the first positions of another's. Only if that fails
        a result comes of it, of serial 0.
        """
        from blocks.executor import ForkJob

        self._forked.add(leg)
        self._executor.submit(ForkJob(leg, of, length))

    def forget(self, leg: int) -> None:
        """Free the cache of this leg; its results that come yet are not handed over."""
        from blocks.executor import FreeJob

        self._forked.discard(leg)
        if leg in self._sizes:
            self._forgotten[leg] = len(self._sizes[leg])
        self._executor.submit(FreeJob(leg))

    async def run(self) -> None:
        """Hand over results until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._executor.fileno())
            for done in self._executor.collect():
                is_step = done.serial > 0
                if self._is_wanted(done.key) if is_step else done.key in self._forked:
                    self._on_done(done)

    def _is_wanted(self, leg: Hashable) -> bool:
        """Count the oldest step of the leg as done. Does anybody want its result?"""
        sizes = self._sizes.get(leg)
        if sizes is None:
            return False  # of the executor's life before this worker
        self.waiting_bytes -= sizes.popleft()
        if not sizes:
            del self._sizes[leg]
        is_wanted = not self._forgotten[leg]
        self._forgotten[leg] -= not is_wanted
        if not self._forgotten[leg]:
            del self._forgotten[leg]
        return is_wanted


def payload_of(output: "dict[str, RawTensor]") -> Payload:
    """The executor's raw tensors as the wire's."""
    return {name: Tensor(*raw) for name, raw in output.items()}
