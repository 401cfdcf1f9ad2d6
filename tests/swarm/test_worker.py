"""What is given to the executor is counted until it comes back, and wanted unless forgotten."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from blocks.backlog import STEP_BYTES
from blocks.executor import Done, FreeJob, StepJob
from blocks.jobs import failed_fork
from swarm.messages import Step
from swarm.wire import Tensor
from swarm.worker import Worker


class Patient:
    """An executor that finishes steps when it is told to, those of a leg in order."""

    def __init__(self) -> None:
        self.jobs: list[StepJob] = []
        self.freed: list[object] = []
        self._done: list[Done] = []
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)

    def submit(self, job: object) -> None:
        if isinstance(job, StepJob):
            self.jobs.append(job)
        elif isinstance(job, FreeJob):
            self.freed.append(job.key)

    def finish(self, leg: int) -> bool:
        """Finish the oldest step of this leg; False if there is none."""
        job = next((job for job in self.jobs if job.key == leg), None)
        if job is not None:
            self.jobs.remove(job)
            done = Done(
                key=leg, serial=job.serial, seconds=0.0, waited=0.0, length=1, cache_bytes=0
            )
            self._done.append(done)
            os.eventfd_write(self._bell, 1)
        return job is not None

    def refuse(self, leg: int) -> None:
        """Say that the fork of this leg failed."""
        self._done.append(failed_fork(leg, "no such fork"))
        os.eventfd_write(self._bell, 1)

    def collect(self) -> list[Done]:
        os.eventfd_read(self._bell)
        done, self._done = self._done, []
        return done

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        os.close(self._bell)


@contextmanager
def patient() -> Iterator[Patient]:
    executor = Patient()
    try:
        yield executor
    finally:
        executor.close()


def step(serial: int, size: int = 1) -> Step:
    payload = {"ids": Tensor("int32", (1, size), bytes(4 * size))}
    return Step(serial=serial, after=serial - 1, start=serial, wanted="last", payload=payload)


async def handed_over(worker: Worker) -> None:
    """Let the worker run until it has nothing to do."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


def test_a_job_tells_whose_leg_it_is() -> None:
    with patient() as executor:
        worker = Worker(executor, lambda done: None)
        worker.compute(7, range(2, 5), step(1), "somebody")
        (job,) = executor.jobs
        assert (job.key, job.client, job.first, job.stop, job.serial) == (7, "somebody", 2, 5, 1)


def test_results_of_a_forgotten_leg_are_handed_to_nobody_but_those_of_later_steps() -> None:
    async def carried_out() -> None:
        results: list[Done] = []
        with patient() as executor:
            worker = Worker(executor, results.append)
            for serial in (1, 2):
                worker.compute(7, range(2), step(serial))
            worker.compute(8, range(2), step(1))
            worker.forget(7)
            worker.forget(9)
            worker.compute(7, range(2), step(3))
            assert executor.freed == [7, 9]
            for leg in (7, 7, 7, 8):
                assert executor.finish(leg)
            await handed_over(worker)
        assert [(done.key, done.serial) for done in results] == [(7, 3), (8, 1)]

    trio.run(carried_out)


def test_a_fork_that_failed_is_told_once_and_of_no_leg_that_was_forgotten() -> None:
    async def carried_out() -> None:
        results: list[Done] = []
        with patient() as executor:
            worker = Worker(executor, results.append)
            for leg in (7, 8):
                worker.fork(leg, 1, 64)
                worker.compute(leg, range(2), step(2))
            worker.forget(8)
            executor.refuse(7)
            executor.refuse(8)
            executor.refuse(9)  # of the executor's life before this worker
            executor.finish(7)
            await handed_over(worker)
            assert [(done.key, done.serial) for done in results] == [(7, 0), (7, 2)]
            assert worker.waiting_steps == 1

    trio.run(carried_out)


events = st.lists(
    st.tuples(
        st.sampled_from(["compute", "compute", "finish", "forget"]),
        st.integers(1, 3),
        st.integers(1, 50),
    ),
    max_size=30,
)


@given(events)
def test_what_waits_is_counted_exactly(events: list[tuple[str, int, int]]) -> None:
    async def carried_out() -> None:
        results: list[Done] = []
        waiting: dict[int, list[tuple[int, int, bool]]] = {1: [], 2: [], 3: []}
        wanted: list[tuple[object, int]] = []
        with patient() as executor:
            worker = Worker(executor, results.append)
            for serial, (event, leg, size) in enumerate(events, 1):
                if event == "compute":
                    worker.compute(leg, range(2), step(serial, size))
                    waiting[leg].append((serial, size, True))
                elif event == "forget":
                    worker.forget(leg)
                    waiting[leg] = [(serial, size, False) for serial, size, _ in waiting[leg]]
                elif executor.finish(leg):
                    serial, _, is_wanted = waiting[leg].pop(0)
                    if is_wanted:
                        wanted.append((leg, serial))
                    await handed_over(worker)
                sizes = [size for steps in waiting.values() for _, size, _ in steps]
                assert worker.waiting_steps == len(sizes)
                assert worker.waiting_bytes == sum(4 * size + STEP_BYTES for size in sizes)
        assert [(done.key, done.serial) for done in results] == wanted

    trio.run(carried_out)
