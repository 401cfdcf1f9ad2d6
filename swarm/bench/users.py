"""`swarm bench users`: what a running swarm gives to many who ask at once.

1. Prompts are random ids, others each time: no server can have met them before.
2. Users share one client, as the users of one gateway would. They begin to decode together, and
   are counted until the first of them has all its tokens: nobody gains by others' having ended.
3. All counts of users are tried in turn; a first round of each warms up and counts for nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import trio

from swarm.bench.rows import (
    Row,
    TokenTimes,
    mixed_lengths,
    percentile,
    slowest_over_median,
    speed_text,
    table_of,
)
from swarm.bench.speaker import (
    Speaker,
    check_room,
    model_name,
    open_bench_client,
    open_speaker,
    random_ids,
)
from swarm.client import Client
from swarm.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersSettings:
    """Who asks, and what: so many users at a time, with prompts of mixed lengths."""

    users: tuple[int, ...] = (1, 4, 16)
    prompt_lengths: tuple[int, int] = (5, 200)
    tokens: int = 64
    repetitions: int = 5
    seed: int = 0
    patience_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What users at the same time got. `times`: of each user's tokens, while all were there."""

    seconds: float
    times: tuple[tuple[TokenTimes, ...], ...]
    failovers: int

    @property
    def speeds(self) -> list[float]:
        """Each user's tokens per second."""
        return [len(tokens) / self.seconds for tokens in self.times]

    @property
    def gaps(self) -> list[float]:
        """The seconds between two tokens of a user, of all users."""
        return [
            later.ended - before.ended for times in self.times for before, later in pairwise(times)
        ]


async def run_users(settings: UsersSettings, join: str | None, console: Console) -> dict[str, Any]:
    """Measure many users at once; return the report of `swarm bench users --json`.

    BadInput for more tokens than the context, NoRoute, Refusal and Unreachable as a session.
    """
    async with open_bench_client(join) as client:
        return await bench_users(client, settings, console)


async def bench_users(client: Client, settings: UsersSettings, console: Console) -> dict[str, Any]:
    """As `run_users`, for a client that has entered."""
    random = Random(settings.seed)
    check_room(client, settings.prompt_lengths[1] + settings.tokens + 1, "--prompts and --tokens")
    rounds: dict[int, list[Crowd]] = {users: [] for users in settings.users}
    for number in range(settings.repetitions + 1):
        console.note(f"round {number} of {settings.repetitions}" if number else "warming up")
        for users in settings.users:
            lengths = mixed_lengths(*settings.prompt_lengths, users)
            prompts = [random_ids(client, random, length) for length in lengths]
            made = await crowd(client, prompts, settings.tokens, settings.patience_seconds)
            if number:
                rounds[users].append(made)
    rows = [row_of(made, settings.tokens) for made in rounds.values()]
    alone = next((row["tokens_per_second"] for row in rows if row["users"] == 1), None)
    for row in rows:
        row["over_one_user"] = row["tokens_per_second"] / alone if alone else None
    return {
        "model": model_name(client),
        "repetitions": settings.repetitions,
        "prompt_tokens": list(settings.prompt_lengths),
        "rows": rows,
    }


async def crowd(
    client: Client, prompts: Sequence[Sequence[int]], tokens: int, patience_seconds: float = 30.0
) -> Crowd:
    """Let a user for each prompt decode; end when the first of them has so many tokens."""
    speakers: list[Speaker] = []
    is_begun, is_over = trio.Event(), trio.Event()

    async def user(prompt: Sequence[int]) -> None:
        async with open_speaker(client, prompt, tokens + 1, patience_seconds) as speaker:
            await speaker.prefill()
            speakers.append(speaker)
            if len(speakers) == len(prompts):
                is_begun.set()
            await is_begun.wait()  # bounded by the others' sessions: one that fails ends all
            while len(speaker.times) < tokens and not is_over.is_set():
                await speaker.decode()
            is_over.set()

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(user, prompt)
    failovers = sum(speaker.session.journal.failovers for speaker in speakers)
    return crowd_of([speaker.times for speaker in speakers], tokens, failovers)


def crowd_of(times: Sequence[Sequence[TokenTimes]], tokens: int, failovers: int) -> Crowd:
    """Count the users' tokens from their common beginning until the first has so many."""
    began = min(each[0].began for each in times)
    ended = min(each[-1].ended for each in times if len(each) == tokens)
    counted = (tuple(one for one in each if one.ended <= ended) for each in times)
    return Crowd(seconds=ended - began, times=tuple(counted), failovers=failovers)


def row_of(rounds: Sequence[Crowd], tokens: int) -> dict[str, Any]:
    """The rounds of one count of users as a row of the report."""
    users = len(rounds[0].times)
    row = Row(
        test=f"tg{tokens}",
        users=users,
        tokens=users * tokens,
        samples=tuple(sum(made.speeds) for made in rounds),
    )
    gaps = [gap for made in rounds for gap in made.gaps]
    return {
        **row.facts(),
        "user_median_tokens_per_second": median(each for made in rounds for each in made.speeds),
        "slowest_over_median": median(slowest_over_median(made.speeds) for made in rounds),
        "gap_p50_ms": percentile(gaps, 50) * 1000,
        "gap_p95_ms": percentile(gaps, 95) * 1000,
        "failovers": sum(made.failovers for made in rounds),
    }


def rendered(report: Mapping[str, Any]) -> "RenderableType":
    """Return the report for a terminal."""
    rows = report["rows"]
    return table_of(
        {
            "model": [report["model"] for _ in rows],
            "users": [str(row["users"]) for row in rows],
            "test": [row["test"] for row in rows],
            "t/s of all": [speed_text(row) for row in rows],
            "÷ one": [
                "" if row["over_one_user"] is None else f"{row['over_one_user']:.2f}"
                for row in rows
            ],
            "t/s of each": [f"{row['user_median_tokens_per_second']:.2f}" for row in rows],
            "slowest ÷ median": [f"{row['slowest_over_median']:.2f}" for row in rows],
            "gap p50 ms": [f"{row['gap_p50_ms']:.1f}" for row in rows],
            "p95 ms": [f"{row['gap_p95_ms']:.1f}" for row in rows],
        }
    )
