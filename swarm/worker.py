"""Whose turn it is on the executor: steps go in, results come out on the trio thread.

1. The trio thread never waits for compute: one task wakes when results are there.
2. Results of one leg come in the order its steps went in.
"""

from collections.abc import Callable
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
    """Turns steps into jobs of the executor, and hands its results back."""

    def __init__(self, executor: Executor, on_done: "Callable[[Done], None]") -> None:
        self._executor = executor
        self._on_done = on_done

    def compute(self, leg: int, span: range, step: Step) -> None:
        """Queue a step for the blocks of `span`, on the cache of this leg."""
        from blocks.ends import CandidateWish
        from blocks.executor import StepJob

        wish = None
        if step.wish is not None:
            asked = step.wish
            wish = CandidateWish(asked.count, asked.penalised, asked.bias, asked.allowed)
        self._executor.submit(
            StepJob(
                key=leg,
                serial=step.serial,
                start=step.start,
                first=span.start,
                stop=span.stop,
                payload=step.payload,
                outputs=step.wanted,
                candidates=wish,
            )
        )

    def forget(self, leg: int) -> None:
        """Free the cache of this leg."""
        from blocks.executor import FreeJob

        self._executor.submit(FreeJob(leg))

    async def run(self) -> None:
        """Hand over results until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._executor.fileno())
            for done in self._executor.collect():
                self._on_done(done)


def payload_of(output: "dict[str, RawTensor]") -> Payload:
    """The executor's raw tensors as the wire's."""
    return {name: Tensor(*raw) for name, raw in output.items()}
