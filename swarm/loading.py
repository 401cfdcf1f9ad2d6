"""From a description to blocks that compute: chosen, loaded, measured.

Imports torch: only servers come here.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import cast

import outcome
import trio

from blocks.executor import Executor
from blocks.load import Dtype
from blocks.measure import cache_bytes_per_token, free_memory_bytes, measure
from blocks.stack import Stack
from blocks.thread import ComputeThread
from routing.offer import Offer
from routing.placement import HEADROOM, largest_spans
from routing.span import Span
from swarm.console import Console
from swarm.errors import BadInput
from swarm.model import (
    VALUE_BYTES,
    Description,
    choose_span,
    digests_of,
    fetch,
    load,
    sizes_of,
    weight_bytes,
)
from swarm.moving import Freedom
from swarm.node import Holding
from swarm.pace import Speeds
from swarm.settings import ServeSettings
from swarm.tasks import Result, in_thread

MEASURE_SECONDS = 1.5
# No server keeps caches for more: beyond this its memory is better left to the machine.
MOST_CACHE_TOKENS = 1 << 20
HISTORY_SHARE = 10
LEAST_HISTORY_BYTES = 64 << 20


class Loader:
    """Chooses, loads and measures the blocks of one server, as its settings say.

    The free memory is looked at once, before anything is loaded: whatever blocks follow the first
    ones take their place.
    """

    def __init__(
        self,
        settings: ServeSettings,
        description: Description,
        thread: ComputeThread,
        console: Console,
    ) -> None:
        """BadInput for a device that is not there."""
        self._settings = settings
        self._description = description
        self._thread = thread
        self._console = console
        self._free_bytes = settings.memory_bytes or _free_bytes(settings.device)

    @property
    def _dtype(self) -> Dtype:
        return cast(Dtype, self._settings.dtype)

    def choose(self, offers: Sequence[Offer], seed: int) -> Span:
        """Choose the blocks. BadInput if they do not exist or do not fit.

        `offers` are those of the servers that are there already, `seed` parts newcomers that come
        at once.
        """
        return choose_span(
            self._settings.blocks, self._description, offers, self._free_bytes, self._dtype, seed
        )

    def freedom(self) -> Freedom | None:
        """Where this server may go later: nowhere if its owner named the blocks."""
        match self._settings.blocks:
            case Span():
                return None
            case int():
                return Freedom()
        sizes = sizes_of(self._description.checkpoint, self._dtype)
        return Freedom(candidates=tuple(largest_spans(sizes, self._free_bytes)))

    async def fetch(self, span: Span) -> None:
        """Bring here what is missing of the weights of these blocks. BadInput if they cannot be."""
        work = partial(
            fetch,
            self._description,
            span,
            disk_bytes=self._settings.disk_bytes,
            note=self._console.note,
            progress=self._console.progress,
        )
        await in_thread(work)  # for hours perhaps, and Ctrl-C must not wait for it

    async def load(self, span: Span) -> Holding:
        """Load and measure these blocks; the caller closes what comes back. BadInput as `load`."""
        await self.fetch(span)
        settings, description = self._settings, self._description
        progress = self._console.progress(f"loading blocks {span} of {description.card.name}")
        stack = await load_off_thread(description, span, self._dtype, settings.device, progress)
        self._console.note("measuring its speed")
        speeds, token_bytes = await run_in(
            self._thread,
            lambda: (measured(stack, MEASURE_SECONDS), cache_bytes_per_token(stack)),
        )
        left = _free_bytes(settings.device)
        if settings.memory_bytes is not None:
            left = min(left, settings.memory_bytes - weight_bytes(description, span, self._dtype))
        tokens = cache_tokens(description, token_bytes, left)
        digests = await in_thread(partial(digests_of, description, span))
        held = holding_of(stack, speeds, Executor(stack, self._thread), tokens)
        return replace(held, digests=digests, history_bytes=_history_bytes())


async def load_off_thread(
    description: Description,
    span: Span,
    dtype: Dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> Stack:
    """Load the blocks while the event loop goes on. See `load`."""
    return await in_thread(partial(load, description, span, dtype, device, progress))


def measured(stack: Stack, seconds: float) -> Speeds:
    """Measure a stack. In the compute thread."""
    speed = measure(stack, seconds)
    return Speeds(
        decode_seconds_per_block=speed.decode_seconds_per_block,
        prefill_seconds_per_block_token=speed.prefill_seconds_per_block_token,
        head_seconds=speed.head_seconds,
    )


def holding_of(stack: Stack, speeds: Speeds, executor: Executor, tokens_of_cache: int) -> Holding:
    """What a node holds once a stack is loaded and measured."""
    return Holding(
        span=Span(stack.start, stack.stop),
        executor=executor,
        cache_tokens=tokens_of_cache,
        speeds=speeds,
        close=executor.close,
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


def _history_bytes() -> int:
    """A tenth of the host memory that is free; what else a session makes us keep lies there too."""
    return max(free_memory_bytes("cpu") // HISTORY_SHARE, LEAST_HISTORY_BYTES)


def _free_bytes(device: str) -> int:
    try:
        return free_memory_bytes(device)
    except (RuntimeError, AssertionError) as error:  # torch's answers to a device it has not
        raise BadInput(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}",
            next_step="--device cpu always can",
        ) from error
