#!/usr/bin/env python3
"""The paper's table of fault tolerance, on this engine: how fast is a text while servers die?

    OMP_NUM_THREADS=1 python scripts/fault_table.py [--json] [--tokens 128,1024] [--stages 4]

Sending activations to a stage fails with probability p, for each step and stage; with the send the
server is lost, its caches and its streams (`fault_world.py`). Three ways to go on:

restarts     caches; after any failure the text begins again, over servers that live
cacheless    every step sends the whole text so far and all stages compute it; a failure repeats
             the step at the stage that failed
ours         caches; the lost server's blocks move to another one, which is sent what it lacks

All ways are taken over the same stacks and network, in turn, with the same faults for a seed.
Speed is the tokens of all runs over their seconds, from opening the session to the last token.

1. Every text is compared with the one undisturbed; exit code 1 if one of `ours` differs.
2. A cell is run again with the next seed until it took `--cell-seconds`, at most `--seeds` times.
3. Restarts whose expected time exceeds `--longest` seconds are not run. That time is computed from
   p and the time of a step measured without failures, and marked ~; over an hour: "does not
   finish".
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, get_args

import trio
from fault_ways import Bench, Cell, Run, Way, run_once
from grow import grow

from blocks.thread import ComputeThread
from routing.span import even_spans
from swarm.model import describe, load
from swarm.settings import DEMO_FOLDER
from swarm.text import Tokens

WAYS: tuple[Way, ...] = get_args(Way)

PROMPT = "Once upon a time, there was a little girl named Lily."
HOUR_SECONDS = 3600.0  # the paper's own limit


@dataclass(slots=True)
class Measured:
    """What is known of a cell: its runs or, without any, the seconds one is expected to take."""

    runs: list[Run] = field(default_factory=list)
    expected_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """What its runs took."""
        return sum(run.seconds for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured. Without failures too, whatever is asked: the rest is compared with it."""

    tokens: tuple[int, ...] = (128, 1024)
    probabilities: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    ways: tuple[Way, ...] = WAYS
    stages: int = 4
    replicas: int = 2
    away_seconds: float = 0.05
    seeds: int = 10
    cell_seconds: float = 20.0
    longest_seconds: float = 300.0
    first_seed: int = 0

    def cells(self) -> list[Cell]:
        """All cells in the order in which they take their turns: fewer failures first."""
        return [
            Cell(tokens, way, probability)
            for tokens in self.tokens
            for probability in self.probabilities
            for way in self.ways
        ]


# --- what can be known without measuring -------------------------------------------------------


def expected_steps(probability: float, stages: int, steps: int) -> float:
    """Return how many steps it takes until `steps` in a row have none failed, on average.

    A step fails if any of its sends to `stages` stages does. inf if beyond any number.
    """
    survives = (1 - probability) ** stages
    if survives == 1:
        return float(steps)
    try:
        return (survives**-steps - 1) / (1 - survives)
    except OverflowError:
        return float("inf")


# --- the table ---------------------------------------------------------------------------------


class WrongText(Exception):
    """A text is not the undisturbed one."""


def measure(
    settings: Settings, run_once: Callable[[Cell, int], Run], note: Callable[[str], None]
) -> dict[Cell, Measured]:
    """Fill all cells, one run (of a cell with a seed) each in turn.

    WrongText if a failure changed a text of ours.
    """
    table = {cell: Measured() for cell in settings.cells()}
    longest = max(settings.tokens)
    undisturbed = run_once(Cell(longest, "ours", 0.0), settings.first_seed).token_ids
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for cell, measured in table.items():
            if not _is_due(cell, measured, table, settings):
                continue
            run = run_once(cell, seed)
            measured.runs.append(run)
            is_same = run.token_ids == undisturbed[: cell.tokens]
            other = "" if is_same else ", ANOTHER TEXT"
            note(
                f"{cell.tokens} tokens, {cell.way}, p={cell.probability:g}, seed {seed}: "
                f"{run.seconds:.1f} s, {len(run.struck)} failures{other}"
            )
            if cell.way == "ours" and not is_same:
                raise WrongText(f"{len(run.struck)} failures changed the text of seed {seed}")
    return table


def _is_due(
    cell: Cell, measured: Measured, table: dict[Cell, Measured], settings: Settings
) -> bool:
    """Return whether to run the cell once more; note what it is expected to take if never."""
    if measured.expected_seconds is not None or measured.seconds >= settings.cell_seconds:
        return False
    if cell.way != "restarts" or cell.probability == 0:
        return True
    still = table[Cell(cell.tokens, cell.way, 0.0)]
    step_seconds = still.seconds / len(still.runs) / cell.tokens
    expected = step_seconds * expected_steps(cell.probability, settings.stages, cell.tokens)
    if expected > settings.longest_seconds and not measured.runs:
        measured.expected_seconds = expected
        return False
    return True


def speed_of(cell: Cell, measured: Measured) -> float | None:
    """Tokens per second; None for what does not finish."""
    if measured.expected_seconds is not None:
        is_finished = measured.expected_seconds <= HOUR_SECONDS
        return cell.tokens / measured.expected_seconds if is_finished else None
    return len(measured.runs) * cell.tokens / measured.seconds


def cpu_speed_of(cell: Cell, measured: Measured) -> float | None:
    """Tokens per second of processor time, which other programs do not stretch; waits are free."""
    if not measured.runs:
        return None
    return len(measured.runs) * cell.tokens / sum(run.cpu_seconds for run in measured.runs)


def rows_of(settings: Settings, table: dict[Cell, Measured]) -> Iterator[list[str]]:
    """Yield the table's rows, its head first."""
    yield ["tokens", "way", *(f"p={each:g}" for each in settings.probabilities)]
    for tokens in settings.tokens:
        for way in settings.ways:
            cells = [Cell(tokens, way, each) for each in settings.probabilities]
            yield [str(tokens), way, *(_shown(cell, table[cell]) for cell in cells)]
        if "ours" in settings.ways:
            cells = [Cell(tokens, "ours", each) for each in settings.probabilities]
            yield [str(tokens), "ours, kept", *_kept(cells, table, speed_of)]
            yield [str(tokens), "of cpu time", *_kept(cells, table, cpu_speed_of)]


def _shown(cell: Cell, measured: Measured) -> str:
    speed = speed_of(cell, measured)
    if speed is None:
        return "does not finish"
    if measured.expected_seconds is not None:
        return f"~{speed:.3g}"
    failures = sum(len(run.struck) for run in measured.runs)
    return f"{speed:.3g} ({failures}/{len(measured.runs)})"


def _kept(
    cells: Sequence[Cell],
    table: dict[Cell, Measured],
    speed_of: Callable[[Cell, Measured], float | None],
) -> list[str]:
    """What each cell keeps of the speed of the first, in which nothing fails."""
    speeds = [speed_of(cell, table[cell]) for cell in cells]
    return [f"{speed / speeds[0]:.0%}" if speed and speeds[0] else "" for speed in speeds]


def as_json(settings: Settings, table: dict[Cell, Measured]) -> dict[str, Any]:
    """Everything measured, but for the texts."""
    return {
        "stages": settings.stages,
        "replicas": settings.replicas,
        "away_seconds": settings.away_seconds,
        "cells": [_cell_as_json(cell, measured) for cell, measured in table.items()],
    }


def _cell_as_json(cell: Cell, measured: Measured) -> dict[str, Any]:
    speeds = [cell.tokens / run.seconds for run in measured.runs]
    return {
        "tokens": cell.tokens,
        "way": cell.way,
        "probability": cell.probability,
        "tokens_per_second": speed_of(cell, measured),
        "median_tokens_per_second": median(speeds) if speeds else None,
        "tokens_per_cpu_second": cpu_speed_of(cell, measured),
        "expected_seconds": measured.expected_seconds,
        "runs": [
            {name: getattr(run, name) for name in run.__slots__ if name != "token_ids"}
            for run in measured.runs
        ],
    }


# --- the command -------------------------------------------------------------------------------


def open_bench(folder: Path, settings: Settings, thread: ComputeThread, width: int) -> Bench:
    """Make the model with room for the longest text, and load a stack for each stage."""
    model = folder / "model"
    grow(DEMO_FOLDER, model, width=width, dtype="float32")
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = max(512, max(settings.tokens) + 64)
    (model / "config.json").write_text(json.dumps(config))
    description = describe(model)
    stacks = [
        load(description, span, "float32", "cpu")
        for span in even_spans(description.card.blocks, settings.stages)
    ]
    prompt = tuple(Tokens(description.files).encode(PROMPT))
    return Bench(stacks, thread, prompt, settings.replicas, settings.away_seconds)


def read_settings(asked: argparse.Namespace) -> Settings:
    """The command line as settings."""
    return Settings(
        tokens=tuple(int(each) for each in asked.tokens.split(",")),
        probabilities=tuple(sorted({0.0, *map(float, asked.p.split(","))})),
        ways=tuple(way for way in WAYS if way in asked.ways.split(",")),
        stages=asked.stages,
        replicas=asked.replicas,
        away_seconds=asked.away,
        seeds=asked.seeds,
        cell_seconds=asked.cell_seconds,
        longest_seconds=asked.longest,
        first_seed=asked.seed,
    )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--tokens", default="128,1024")
    parser.add_argument("--p", default="0,1e-4,1e-3,1e-2", help="probabilities of a failed send")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2, help="servers for each stage")
    parser.add_argument("--width", type=int, default=1, help="hidden size, times the demo's")
    parser.add_argument("--away", type=float, default=0.05, help="seconds a lost server is away")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=10, help="runs of a cell, at most")
    parser.add_argument("--cell-seconds", type=float, default=20.0, help="enough for a cell")
    parser.add_argument("--longest", type=float, default=300.0, help="seconds a run may need")
    asked = parser.parse_args()
    settings = read_settings(asked)
    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as folder, ComputeThread(1) as thread:
        bench = open_bench(Path(folder), settings, thread, asked.width)
        try:
            table = measure(
                settings,
                lambda cell, seed: trio.run(run_once, cell, seed, bench),
                lambda line: print(line, file=sys.stderr, flush=True),
            )
        except WrongText as wrong:
            raise SystemExit(f"fault_table: {wrong}") from wrong
    if asked.json:
        print(json.dumps(as_json(settings, table)))
        return
    rows = list(rows_of(settings, table))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
