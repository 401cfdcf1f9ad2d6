"""The users' rows of `bench.py`: one server, many clients, and what its stack alone would give.

Clients are sessions of this process; prompts of 5 to 100 tokens, others each time. The stack alone
is a process with the same blocks in one thread, driven through its executor with all steps ready
when a pass begins (`blocks.bench`), with pasts of the same lengths. Each round takes every count of
users both ways; ratios are made within a round, figures are medians over the rounds.

users_N_over_one        tokens per second of N clients together / of one
stack_N_over_one        the same of the stack alone
users_N_over_stack      N clients together / the stack alone with N sessions
users_N_slowest         the slowest of N clients / their median
users_N_tokens_per_second, stack_N_tokens_per_second
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import trio
from processes import ServerProcess, environment

from swarm.bench.rows import mixed_lengths, slowest_over_median
from swarm.bench.speaker import random_ids
from swarm.bench.users import crowd
from swarm.client import Client
from swarm.identity import Identity

USERS = (1, 4, 16)
PROMPTS = (5, 100)

AskStack = Callable[[Sequence[int], int], float]
"""(pasts, tokens) -> seconds for each session to decode so many tokens."""
Enter = Callable[[list[ServerProcess], Path], AbstractAsyncContextManager[tuple[Client, Identity]]]

STACK = """
import json, sys
from contextlib import closing
from pathlib import Path
from blocks.bench import StackBench
from blocks.checkpoint import open_checkpoint
from blocks.load import load_stack
from blocks.thread import ComputeThread
checkpoint = open_checkpoint(Path(sys.argv[1]))
stack = load_stack(checkpoint, 0, int(sys.argv[2]), dtype="bfloat16")
with ComputeThread(1) as thread, closing(StackBench(stack, thread)) as bench:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        made = bench.decode(asked["pasts"], asked["tokens"])
        print(json.dumps({"seconds": made.seconds}), flush=True)
"""


async def users_figures(
    enter: Enter, server: ServerProcess, model: Path, home: Path, rounds: int, tokens: int
) -> dict[str, Any]:
    """Measure, and return the figures by name."""
    ways = {f"{way}_{users}": [] for way in ("users", "stack") for users in USERS}
    slowest: dict[int, list[float]] = {users: [] for users in USERS}
    random = Random(0)
    with stack_alone(model, server.span, home) as ask_stack:
        async with enter([server], home) as (client, _):
            for number in range(rounds + 1):
                for users in USERS:
                    lengths = mixed_lengths(*PROMPTS, users)
                    prompts = [random_ids(client, random, length) for length in lengths]
                    made = await crowd(client, prompts, tokens)
                    seconds = await trio.to_thread.run_sync(ask_stack, lengths, tokens)
                    if made.failovers:
                        raise SystemExit("a route failed while it was measured")
                    if number == 0:
                        continue  # the first round warms up
                    ways[f"users_{users}"].append(sum(made.speeds))
                    ways[f"stack_{users}"].append(users * tokens / seconds)
                    slowest[users].append(slowest_over_median(made.speeds))
    return figures(ways, slowest)


def figures(ways: dict[str, list[float]], slowest: dict[int, list[float]]) -> dict[str, float]:
    """Return the medians of tokens per second by way, and of the ratios within a round."""
    found: dict[str, float] = {}
    for users in USERS:
        if users > 1:
            for way in ("users", "stack"):
                found[f"{way}_{users}_over_one"] = ratio(ways[f"{way}_{users}"], ways[f"{way}_1"])
            found[f"users_{users}_slowest"] = median(slowest[users])
        found[f"users_{users}_over_stack"] = ratio(ways[f"users_{users}"], ways[f"stack_{users}"])
    return found | {f"{way}_tokens_per_second": median(speeds) for way, speeds in ways.items()}


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return median(mine / theirs for mine, theirs in zip(one, other, strict=True))


@contextmanager
def stack_alone(model: Path, span: str, home: Path) -> Iterator[AskStack]:
    """Run a process with the same blocks and no network; give a function to ask it."""
    blocks = span.partition(":")[2]
    process = subprocess.Popen(
        [sys.executable, "-c", STACK, str(model), blocks],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(home),
    )
    asking, answering = process.stdin, process.stdout
    if asking is None or answering is None:
        raise RuntimeError("the stack has no pipes")

    def ask(pasts: Sequence[int], tokens: int) -> float:
        asking.write(json.dumps({"pasts": list(pasts), "tokens": tokens}) + "\n")
        asking.flush()
        return float(json.loads(answering.readline())["seconds"])

    try:
        if answering.readline().strip() != "ready":
            raise RuntimeError("the stack alone did not load")
        yield ask
    finally:
        process.kill()
        process.wait(10)
