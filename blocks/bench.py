"""How fast loaded blocks are by themselves: steps through their executor, and no network.

What a swarm of these blocks can hope for. Steps are what a server would get: prompts in chunks as
clients send them, decode steps that ask for candidates where the stack has the head.

1. When a pass of several sessions begins the steps of all of them are ready: the passes are as few
   as they can be. Waiting for users is what a bench of a swarm shows, not this one.
2. Everything but random inputs is real, and they are the same every time.
3. A leg that was begun is freed, whatever happens.
"""

import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count

import torch

from blocks.codec import RawTensor, to_raw
from blocks.ends import CandidateWish
from blocks.errors import BlocksError
from blocks.executor import Done, Executor, FreeJob, StepJob
from blocks.stack import Stack
from blocks.thread import ComputeThread

CHUNK_TOKENS = 256  # as clients send their prompts
CANDIDATES = 256  # what a client without a wish of its own asks for
PATIENCE_SECONDS = 600.0  # for one step
WARM_STEPS = 2  # before decoding is timed: a family's first joint pass is like no other


@dataclass(frozen=True, slots=True)
class Decoding:
    """What it took several sessions to decode as many tokens each."""

    seconds: float
    passes: int  # over the weights; as many as tokens where all sessions share each


class StackBench:
    """Times steps of one stack in a compute thread. Close it when done.

    Everything raises BlocksError if a step fails, or does not end in PATIENCE_SECONDS.
    """

    def __init__(self, stack: Stack, thread: ComputeThread) -> None:
        """The thread runs; it may have other work, which will show."""
        self._stack = stack
        self._thread = thread
        self._executor = Executor(stack, thread)
        self._keys = count()
        self._inputs = _Inputs(stack)

    def close(self) -> None:
        """Forget the executor; the stack stays."""
        self._executor.close()

    def prefill(self, tokens: int) -> float:
        """Return the seconds that a prompt of so many tokens takes a session that has none."""
        with self._legs([0]) as (leg,):
            began = time.perf_counter()
            self._send(leg, tokens)
            return time.perf_counter() - began

    def decode(self, pasts: Sequence[int], tokens: int) -> Decoding:
        """Return what it takes for each of several sessions to decode so many tokens.

        `pasts`: how many positions each has before the first of WARM_STEPS untimed ones, at least
        one each.
        """
        with self._legs(pasts) as legs:
            for _ in range(WARM_STEPS):
                self._step(legs)
            began = time.perf_counter()
            passes = sum(self._step(legs) for _ in range(tokens))
            return Decoding(time.perf_counter() - began, passes)

    @contextmanager
    def _legs(self, pasts: Sequence[int]) -> Iterator[list["_Leg"]]:
        legs = [_Leg(next(self._keys)) for _ in pasts]
        try:
            for leg, past in zip(legs, pasts, strict=True):
                if past:
                    self._send(leg, past)
            yield legs
        finally:
            for leg in legs:
                self._executor.submit(FreeJob(leg.key))

    def _send(self, leg: "_Leg", tokens: int) -> None:
        """Run a prompt of so many tokens."""
        starts = range(0, tokens, CHUNK_TOKENS)
        for start in starts:
            size = min(CHUNK_TOKENS, tokens - start)
            self._submit(leg, size, is_wanted=start + size == tokens)
        self._wait(len(starts))

    def _step(self, legs: Sequence["_Leg"]) -> int:
        """Run the next step of each leg, of as many in one pass as can share it; count passes."""
        with self._thread_held() if len(legs) > 1 else nullcontext():
            for leg in legs:
                self._submit(leg, 1, is_wanted=True)
        return self._wait(len(legs))

    @contextmanager
    def _thread_held(self) -> Iterator[None]:
        """Keep the compute thread from taking up anything: it would begin with the first step."""
        is_held, is_free = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            is_free.wait(PATIENCE_SECONDS)

        self._thread.submit(hold)
        try:
            if not is_held.wait(PATIENCE_SECONDS):  # calls for work already done may wait before it
                raise BlocksError(f"the thread was busy for {PATIENCE_SECONDS:g} seconds")
            yield
        finally:
            is_free.set()

    def _submit(self, leg: "_Leg", tokens: int, *, is_wanted: bool) -> None:
        stack = self._stack
        leg.serial += 1
        job = StepJob(
            key=leg.key,
            serial=leg.serial,
            start=leg.length,
            first=stack.start,
            stop=stack.stop,
            payload=self._inputs.payload(leg.length, tokens),
            outputs=("last" if is_wanted else "none") if stack.holds_head else "all",
            candidates=CandidateWish(CANDIDATES) if stack.holds_head else None,
        )
        leg.length += tokens
        self._executor.submit(job)

    def _wait(self, steps: int) -> int:
        """Return when so many steps have their results: in how many passes they were computed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        done: list[Done] = []
        while len(done) < steps:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._executor.fileno()], [], [], left)[0]:
                raise BlocksError(f"a step did not end within {PATIENCE_SECONDS:g} seconds")
            done += self._executor.collect()
        for one in done:
            if one.error is not None:
                raise BlocksError(f"a step of the bench failed: {one.error}")
        return sum(one.run is not None for one in done)


class _Leg:
    """A session of the bench, as far as it has come."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.serial = 0
        self.length = 0


class _Inputs:
    """Random ids, or hidden states and what the family needs beside them."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._made: dict[int, Mapping[str, RawTensor]] = {}  # hidden states, by their positions
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(
            stack.vocabulary_size, (stack.context_length,), generator=generator, dtype=torch.int32
        )

    def payload(self, start: int, tokens: int) -> Mapping[str, RawTensor]:
        """The inputs of positions from `start` on."""
        if self._stack.holds_embedding:
            return {"ids": to_raw(self._ids[None, start : start + tokens])}
        if tokens not in self._made:
            hidden, sides = self._stack.sample(tokens)
            named = {"hidden": hidden, **sides}
            self._made[tokens] = {name: to_raw(value) for name, value in named.items()}
        return self._made[tokens]
