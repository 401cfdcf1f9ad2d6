#!/usr/bin/env python3
"""Measure what the scheduler's settings rest on. Run it on a quiet machine; ratios hold on others.

    python scripts/queue_bench.py passes [--dtype bfloat16] [--layers 10] [--hidden 1024]
    python scripts/queue_bench.py take [--legs 256]
    python scripts/queue_bench.py window [--passes 36.7,36.1,46.9,68.5,185,376]
    python scripts/queue_bench.py waits [--dtype bfloat16] [--layers 10] [--hidden 1024]

passes  seconds of the thread for prefills in chunks of several sizes, and for joint passes of 1 to
        32 legs: why `Bounds.chunk_positions` and `joint_legs` are what they are
take    microseconds that the queue itself costs for each pass, with so many legs waiting
window  tokens per second and time between tokens if a joint pass waits a while for legs whose
        answer is just out, always so long or as `blocks.returns` says, against one that never
        waits: a simulation, seeded, with pass times such as `passes` prints
waits   the same on a real executor, one thread, for clients that come back within milliseconds:
        both ways in turn, medians of the ratios
"""

import argparse
import heapq
import random
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from blocks.batching import Service, Shape, StepQueue
from blocks.returns import Returns

CHUNKS = (64, 128, 256, 512, 1024)
LEGS = (1, 2, 4, 8, 16, 32)
PREFILL = 1024
VOCABULARY = 4096
DECODE_SECONDS = 4.0
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, run in (("passes", run_passes), ("waits", run_waits)):
        command = commands.add_parser(name)
        command.add_argument("--dtype", default="float32")
        command.add_argument("--layers", type=int, default=10)
        command.add_argument("--hidden", type=int, default=1024)
        command.set_defaults(run=lambda told, run=run: run(llama(told)))
    take = commands.add_parser("take")
    take.add_argument("--legs", type=int, default=256)
    take.set_defaults(run=lambda told: run_take(told.legs))
    window = commands.add_parser("window")
    window.add_argument("--passes", default="36.7,36.1,46.9,68.5,185,376")
    window.set_defaults(run=lambda told: run_window([float(ms) for ms in told.passes.split(",")]))
    told = parser.parse_args()
    told.run(told)


def llama(told: argparse.Namespace) -> Any:
    """A stack of a random model of that size; torch keeps to one thread."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from blocks.stack import Stack

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=told.layers,
        hidden_size=told.hidden,
        intermediate_size=told.hidden * 11 // 4 // 64 * 64,
        num_attention_heads=told.hidden // 64,
        num_key_value_heads=told.hidden // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, told.dtype)).eval()
    return Stack.of(model, 0, told.layers)


def run_passes(stack: Any) -> None:
    """Print what chunks and joint passes take on one thread."""
    import torch

    ids = torch.randint(0, VOCABULARY, (1, PREFILL))

    def prefill(size: int) -> None:
        cache = stack.new_cache()
        for start in range(0, PREFILL, size):
            stack.run(ids[:, start : start + size], cache=cache, start=start)

    for size, seconds in timed({size: lambda size=size: prefill(size) for size in CHUNKS}).items():
        each, one = seconds / PREFILL, seconds * size / PREFILL
        print(f"chunk {size:5d}: {1e3 * each:7.3f} ms a position, {1e3 * one:6.0f} ms a pass")
    caches = [stack.new_cache() for _ in range(LEGS[-1])]
    for number, cache in enumerate(caches):
        stack.run(ids[:, : 40 + 37 * number % 360], cache=cache)

    def joint(count: int) -> None:
        inputs = [ids[:, [number]] for number in range(count)]
        stack.run_joined(inputs, caches[:count], wants_logits=[True] * count)

    for count, seconds in timed({n: lambda n=n: joint(n) for n in LEGS}).items():
        print(f"joint {count:5d}: {1e3 * seconds:7.1f} ms a pass")


def run_waits(stack: Any) -> None:
    """Print what waiting wins on a real executor."""
    from blocks.executor import Executor
    from blocks.thread import ComputeThread

    with ComputeThread(1) as thread:
        for milliseconds in (0.5, 3.0):
            for legs in (2, 4, 8, 16):
                ratios, sizes = [], []
                for _ in range(ROUNDS):
                    speeds = []
                    for waits in (False, True):
                        executor = Executor(stack, thread)
                        if not waits:
                            executor._returns.worth_waiting = lambda now, seconds: 0.0
                        speed, size = decoded(executor, legs, milliseconds / 1e3)
                        speeds.append(speed)
                        sizes.append(size)
                        executor.close()
                    ratios.append(speeds[1] / speeds[0])
                print(
                    f"back in {milliseconds:g} ms, {legs:2d} legs: {median(ratios):.2f} x, "
                    f"{median(sizes[::2]):.1f} -> {median(sizes[1::2]):.1f} legs a pass"
                )


def decoded(executor: Any, legs: int, away: float) -> tuple[float, float]:
    """Tokens per second, and legs per pass, of legs that decode for some seconds."""
    import torch

    from blocks.codec import to_raw
    from blocks.ends import CandidateWish
    from blocks.executor import StepJob

    def step(leg: int, start: int, count: int) -> StepJob:
        ids = torch.full((1, count), leg, dtype=torch.int32)
        return StepJob(
            key=leg,
            serial=start,
            start=start,
            first=0,
            stop=executor._legs.stack.stop,
            payload={"ids": to_raw(ids)},
            outputs="last",
            candidates=CandidateWish(1),
        )

    lots = random.Random(legs)
    coming = [(time.perf_counter() + 0.05 * leg, leg, 0, 40) for leg in range(legs)]
    heapq.heapify(coming)
    tokens = passes = 0
    began = 0.0
    while not began or time.perf_counter() - began < DECODE_SECONDS:
        while coming and coming[0][0] <= time.perf_counter():
            _, leg, start, count = heapq.heappop(coming)
            executor.submit(step(leg, start, count))
        left = max(0.0, coming[0][0] - time.perf_counter()) if coming else 1.0
        select.select([executor.fileno()], [], [], left)
        for done in executor.collect():
            later = time.perf_counter() + away * lots.uniform(0.5, 1.5)
            heapq.heappush(coming, (later, done.key, done.length, 1))
            if done.length == 44 and not began:  # the first is at work; count from here
                began = time.perf_counter()
            tokens += began > 0
            passes += began > 0 and done.run is not None
    return tokens / (time.perf_counter() - began), tokens / max(passes, 1)


def timed(ways: dict[int, Callable[[], None]]) -> dict[int, float]:
    """Median seconds of the thread for each way, taken in turn."""
    found: dict[int, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            found[name].append(time.thread_time() - began)
    return {name: median(seconds) for name, seconds in found.items()}


@dataclass(frozen=True)
class Job:
    """A job for the queue alone."""

    key: int
    client: int
    shape: Shape


def run_take(legs: int) -> None:
    """Print what a pass costs the queue, its steps' coming included."""
    for name, clients in (("one client each", legs), ("four clients", 4)):
        for kind, shape in (
            ("joint", Shape(100, 1, "plain", 256, is_decode=True, service=Service.DECODE)),
            ("fill", Shape(0, 256, "plain", 256)),
        ):
            queue: StepQueue[Job] = StepQueue(32)
            for key in range(legs):
                queue.add(Job(key, key % clients, shape))
            costs = []
            for _ in range(2000):
                began = time.perf_counter()
                taken = queue.take(lambda job: True)
                for job in taken:
                    queue.add(job)
                costs.append(time.perf_counter() - began)
            per_pass = 1e6 * median(costs)
            print(f"{legs} legs, {name}, {kind}: {per_pass:.0f} us for a pass of {len(taken)}")


@dataclass
class Times:
    """How long passes take, by their number of legs."""

    seconds: Sequence[float]

    def of(self, legs: int) -> float:
        """Between the measured ones on a straight line."""
        for low, high, before, after in zip(
            LEGS, LEGS[1:], self.seconds, self.seconds[1:], strict=False
        ):
            if legs <= high:
                return before + (after - before) * max(0, legs - low) / (high - low)
        return self.seconds[-1]


@dataclass
class Simulated:
    """What one run of the simulation came to."""

    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


Window = Callable[[Returns, float, float], float]
"""(returns, now, seconds of a pass) -> how long a pass waits, at most, from when it could begin"""

WINDOWS: dict[str, Window] = {
    "0 ms": lambda returns, now, seconds: 0.0,
    "1 ms": lambda returns, now, seconds: 1e-3,
    "3 ms": lambda returns, now, seconds: 3e-3,
    "10 ms": lambda returns, now, seconds: 10e-3,
    "as usual": Returns.worth_waiting,
}
LINKS = {"loopback": (0.5, 0.3), "house": (3.0, 1.0), "city": (15.0, 4.0), "far": (60.0, 15.0)}


def simulate(
    times: Times, away: Sequence[tuple[float, float]], window: Window, seconds: float
) -> Simulated:
    """Decode for so long: each leg's next step comes a while after its answer is out.

    `away` tells for each leg how many milliseconds that takes, and their deviation. A pass begins
    when the stack is free and a step waits, or when its window is over or all are there.
    """
    lots = random.Random(7)
    found, returns = Simulated(), Returns()
    coming = [(lots.random() * times.of(1), leg) for leg in range(len(away))]
    heapq.heapify(coming)
    last: dict[int, float] = {}
    ready: list[int] = []
    now, lasted = 0.0, 0.0

    def arrive(until: float) -> None:
        while coming and coming[0][0] <= until:
            at, leg = heapq.heappop(coming)
            returns.came(leg, at)
            ready.append(leg)

    while now < seconds:
        now = now if ready else max(now, coming[0][0])
        arrive(now)
        wait = window(returns, now, lasted)
        end = now + wait
        while len(ready) < min(LEGS[-1], len(away)) and wait > 0:
            if not coming or coming[0][0] > end:
                now = end
                break
            now = coming[0][0]
            arrive(now)
            if window is Returns.worth_waiting:
                end = min(end, now + window(returns, now, lasted))
        taken, ready = ready[: LEGS[-1]], ready[LEGS[-1] :]
        lasted = times.of(len(taken))
        now += lasted
        found.sizes.append(len(taken))
        for leg in taken:
            if leg in last:
                found.gaps.append(now - last[leg])
            last[leg] = now
            returns.went(leg, now)
            middle, spread = away[leg]
            heapq.heappush(coming, (now + max(0.1, lots.gauss(middle, spread)) / 1e3, leg))
        found.tokens += len(taken)
    return found


def run_window(milliseconds: Sequence[float]) -> None:
    """Print what windows win or lose, for clients on this machine, in the house, and far away."""
    times = Times([ms / 1e3 for ms in milliseconds])
    homes = {**{name: [link] for name, link in LINKS.items()}, "all of these": [*LINKS.values()]}
    for home, links in homes.items():
        for legs in (2, 4, 8, 16, 32):
            away = [links[number % len(links)] for number in range(legs)]
            found = {name: simulate(times, away, one, 60.0) for name, one in WINDOWS.items()}
            base = found["0 ms"].tokens
            told = ", ".join(
                f"{name}: {one.tokens / base:.2f} x ({sum(one.sizes) / len(one.sizes):.1f} a pass)"
                for name, one in found.items()
            )
            print(f"{home:12s} {legs:2d} legs  {told}")


if __name__ == "__main__":
    main()
