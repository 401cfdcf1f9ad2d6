"""From a description to blocks that compute: chosen, loaded, measured.

Imports torch: only servers come here.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import cast

import outcome
import trio

from blocks.executor import ComputeThread
from blocks.load import Dtype
from blocks.measure import Speed, cache_bytes_per_token, free_memory_bytes, measure
from blocks.stack import Stack
from routing.offer import Offer
from routing.placement import HEADROOM
from routing.span import Span
from swarm.console import Console
from swarm.errors import BadInput
from swarm.model import VALUE_BYTES, Description, choose_span, load, weight_bytes
from swarm.node import Holding
from swarm.settings import ServeSettings
from swarm.tasks import Result, in_thread
from swarm.worker import Executor

MEASURE_SECONDS = 1.5
# No server keeps caches for more: beyond this its memory is better left to the machine.
MOST_CACHE_TOKENS = 1 << 20


async def prepared(
    settings: ServeSettings,
    description: Description,
    offers: Sequence[Offer],
    seed: int,
    thread: ComputeThread,
    executor_of: Callable[[Stack], Executor],
    console: Console,
) -> Holding:
    """Choose the blocks, load and measure them. BadInput if they do not exist or do not fit.

    `offers` are those of the servers that are there already, `seed` parts newcomers that come at
    once. The caller closes what `executor_of` makes.
    """
    free = settings.memory_bytes or _free_bytes(settings.device)
    dtype = cast(Dtype, settings.dtype)
    span = choose_span(settings.blocks, description, offers, free, dtype, seed)
    progress = console.progress(f"loading blocks {span} of {description.card.name}")
    stack = await load_off_thread(description, span, dtype, settings.device, progress)
    console.note("measuring its speed")
    speed, token_bytes = await run_in(
        thread, lambda: (measure(stack, MEASURE_SECONDS), cache_bytes_per_token(stack))
    )
    left = _free_bytes(settings.device)
    if settings.memory_bytes is not None:
        left = min(left, settings.memory_bytes - weight_bytes(description, span, dtype))
    tokens = cache_tokens(description, token_bytes, left)
    return holding_of(stack, speed, executor_of(stack), tokens)


async def load_off_thread(
    description: Description,
    span: Span,
    dtype: Dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> Stack:
    """Load the blocks while the event loop goes on. See `load`."""
    return await in_thread(partial(load, description, span, dtype, device, progress))


def holding_of(stack: Stack, speed: Speed, executor: Executor, tokens_of_cache: int) -> Holding:
    """What a node holds once a stack is loaded and measured."""
    return Holding(
        span=Span(stack.start, stack.stop),
        executor=executor,
        cache_tokens=tokens_of_cache,
        decode_seconds_per_block=speed.decode_seconds_per_block,
        prefill_seconds_per_block_token=speed.prefill_seconds_per_block_token,
        head_seconds=speed.head_seconds,
        dtype=str(stack.dtype).removeprefix("torch."),
        device=str(stack.device),
    )


def cache_tokens(description: Description, bytes_per_token: int, free_bytes: int) -> int:
    """How many tokens of cache and history fit into what is free, at least one conversation."""
    taken = 2 * bytes_per_token + VALUE_BYTES * description.card.hidden_size  # buffers double
    fitting = int(free_bytes * (1 - HEADROOM)) // taken
    return max(min(fitting, MOST_CACHE_TOKENS), description.card.context_length)


async def run_in(thread: ComputeThread, work: Callable[[], Result]) -> Result:
    """Run `work` in the compute thread and return what it returns."""
    token = trio.lowlevel.current_trio_token()
    is_done = trio.Event()
    outcomes: list[outcome.Outcome[Result]] = []

    def run() -> None:
        outcomes.append(outcome.capture(work))
        with suppress(trio.RunFinishedError):  # nobody waits any more
            token.run_sync_soon(is_done.set)

    thread.submit(run)
    await is_done.wait()
    return outcomes[0].unwrap()


def _free_bytes(device: str) -> int:
    try:
        return free_memory_bytes(device)
    except (RuntimeError, AssertionError) as error:  # torch's answers to a device it has not
        raise BadInput(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}",
            next_step="--device cpu always can",
        ) from error
