"""`swarm bench speed`: how fast this machine's blocks are, with no network around them.

Imports torch: only who holds weights comes here.

1. Blocks are chosen, fetched and loaded as `swarm serve` would.
2. All tests are repeated in turn, so that a noisy moment meets them all; a first round of each
   warms up and counts for nothing.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from blocks.bench import WARM_STEPS, StackBench
from blocks.errors import BlocksError
from blocks.load import Dtype
from blocks.stack import Stack
from blocks.thread import ComputeThread
from swarm.bench.rows import Row, speed_text, table_of
from swarm.console import Console
from swarm.entering import describe_asked
from swarm.errors import BadInput, SwarmError
from swarm.loading import Loader, run_in
from swarm.model import weight_bytes
from swarm.settings import ServeSettings
from swarm.tasks import in_thread

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT_TOKENS = 512
LEAST_PAST = 1  # of a session that decodes; as in llama-bench it begins with nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What to measure: `serve` says which blocks, the rest of it is not used."""

    serve: ServeSettings = field(default_factory=ServeSettings)
    prompt_tokens: int | None = None  # None: PROMPT_TOKENS, or a shorter context's whole
    tokens: int = 128
    users: tuple[int, ...] = (1,)
    repetitions: int = 5


async def run_speed(settings: SpeedSettings, console: Console) -> dict[str, Any]:
    """Load the blocks, measure, and return the report of `swarm bench speed --json`.

    BadInput for blocks that are not there or do not fit, and for more tokens than the context.
    """
    asked = settings.serve
    description = await describe_asked(asked)
    prompt = prompt_tokens(settings.prompt_tokens, settings.tokens, description.card.context_length)
    with ComputeThread(asked.threads) as thread:
        loader = Loader(asked, description, thread, console)
        span = loader.choose((), "")
        stack, quant = await loader.load_stack(span)
        console.note(f"measuring, {settings.repetitions} repetitions")
        rows = await in_thread(partial(_measured, stack, thread, prompt, settings))
        threads = await run_in(thread, torch.get_num_threads)
    return {
        "model": description.card.name,
        "span": str(span),
        "blocks": len(span),
        "params": weight_bytes(description, span, "float32", "none", "cpu") // 4,
        "weight_bytes": weight_bytes(
            description, span, cast(Dtype, asked.dtype), quant, asked.device
        ),
        "device": str(stack.device),
        "dtype": str(stack.dtype).removeprefix("torch."),
        "quant": quant,
        "threads": threads,
        "repetitions": settings.repetitions,
        "rows": rows,
    }


def prompt_tokens(asked: int | None, decoded: int, context: int) -> int:
    """Return the prompt's length: as asked, or what the context allows.

    BadInput if the context holds no such prompt, or not so many decoded tokens.
    """
    prompt = min(PROMPT_TOKENS, context) if asked is None else asked
    longest = max(prompt, LEAST_PAST + WARM_STEPS + decoded)
    if longest > context:
        raise BadInput(
            f"a test of {longest} tokens is beyond the model's context of {context}",
            next_step="give smaller numbers to --prompt and --tokens",
        )
    return prompt


def _measured(
    stack: Stack, thread: ComputeThread, prompt: int, settings: SpeedSettings
) -> list[dict[str, Any]]:
    """Run every test once a round; return the rows. In a thread of its own."""
    prefilled: list[float] = []
    decoded: dict[int, list[float]] = {users: [] for users in settings.users}
    passes: dict[int, float] = {}
    try:
        with closing(StackBench(stack, thread)) as bench:
            for number in range(settings.repetitions + 1):
                seconds = bench.prefill(prompt)
                if number:
                    prefilled.append(prompt / seconds)
                for users in settings.users:
                    made = bench.decode([LEAST_PAST] * users, settings.tokens)
                    passes[users] = made.passes / settings.tokens
                    if number:
                        decoded[users].append(users * settings.tokens / made.seconds)
    except BlocksError as error:
        raise SwarmError(f"the blocks could not be measured: {error}") from error
    first = Row(test=f"pp{prompt}", users=1, tokens=prompt, samples=tuple(prefilled))
    rows = [first.facts()]
    for users, samples in decoded.items():
        row = Row(
            test=f"tg{settings.tokens}",
            users=users,
            tokens=users * settings.tokens,
            samples=tuple(samples),
        )
        rows.append({**row.facts(), "passes_per_step": passes[users]})
    return rows


def rendered(report: Mapping[str, Any]) -> "RenderableType":
    """Return the report for a terminal, as llama-bench would print it."""
    rows = report["rows"]
    held = report["dtype"] if report["quant"] == "none" else report["quant"]
    same = len(rows)
    return table_of(
        {
            "model": [report["model"]] * same,
            "blocks": [report["span"]] * same,
            "size": [f"{report['weight_bytes'] / (1 << 20):.1f} MiB"] * same,
            "params": [f"{report['params'] / 1e6:.2f} M"] * same,
            "backend": [f"{report['device']} {held}"] * same,
            "threads": [str(report["threads"])] * same,
            "test": [
                f"{row['test']} x{row['users']}" if row["users"] > 1 else row["test"]
                for row in rows
            ],
            "t/s": [speed_text(row) for row in rows],
        }
    )
