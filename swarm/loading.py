"""From a description to blocks that compute: chosen, loaded, measured.

Imports torch: only servers come here.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast, get_args

import outcome
import trio

from blocks.executor import Executor
from blocks.formats import is_nf4_fast
from blocks.load import Dtype
from blocks.measure import cache_bytes_per_token, measure
from blocks.memory import free_memory_bytes
from blocks.quantize import Quant, Wanted, choose_quant
from blocks.stack import Stack
from blocks.thread import ComputeThread
from routing.offer import Offer
from routing.placement import HEADROOM, BlockSizes, largest_spans
from routing.span import Span
from swarm.console import Console
from swarm.errors import BadInput
from swarm.model import (
    PLANNED_SESSIONS,
    VALUE_BYTES,
    Description,
    choose_span,
    digests_of,
    fetch,
    load,
    planned_context,
    sizes_of,
    weight_bytes,
)
from swarm.moving import Freedom
from swarm.node import Holding
from swarm.pace import Speeds
from swarm.settings import ServeSettings, cache_home
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

    def choose(self, offers: Sequence[Offer], peer: str) -> Span:
        """Choose the blocks. BadInput if they do not exist or do not fit.

        `offers` are those of the servers that are there already; the own name parts newcomers that
        come at once.
        """
        most = self._description.card.context_length
        if self._settings.blocks is None and self._context < most:
            self._console.note(
                f"memory is planned for conversations of {self._context} tokens, of the {most} "
                "that the model takes: --context plans for others"
            )
        return choose_span(
            self._settings.blocks,
            self._description,
            offers,
            self._free_bytes,
            self._sizes,
            int.from_bytes(peer.encode()[-4:], "big"),
        )

    def freedom(self) -> Freedom | None:
        """Where this server may go later: nowhere if its owner named the blocks."""
        match self._settings.blocks:
            case Span():
                return None
            case int():
                return Freedom()
        return Freedom(candidates=tuple(largest_spans(self._sizes(), self._free_bytes)))

    def _sizes(self) -> BlockSizes:
        """What is planned with where blocks are chosen by memory: unquantized unless asked."""
        settings = self._settings
        quant = "none" if settings.quant == "auto" else cast(Quant, settings.quant)
        return sizes_of(
            self._description.checkpoint,
            self._dtype,
            quant,
            device=settings.device,
            cache_tokens=PLANNED_SESSIONS * self._context,
        )

    @property
    def _context(self) -> int:
        """The tokens of one conversation that memory is planned for."""
        return planned_context(self._description.checkpoint, self._settings.context_tokens)

    def _choose_quant(self, span: Span) -> Quant:
        """The format to hold these blocks in; says why where it was a choice."""
        settings, formats = self._settings, cast("tuple[Quant, ...]", get_args(Quant))
        wanted = cast(Wanted, settings.quant)
        choice = choose_quant(
            wanted,
            device_kind=settings.device.partition(":")[0],
            free_bytes=self._free_bytes,
            span_bytes={
                quant: weight_bytes(self._description, span, self._dtype, quant, settings.device)
                for quant in formats
            },
            is_nf4_fast=wanted != "nf4" or is_nf4_fast(),
        )
        if choice.quant != "none" or wanted == "none":
            self._console.note(choice.sentence)
        return choice.quant

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

    async def load_stack(self, span: Span) -> tuple[Stack, Quant]:
        """Load these blocks, fetched before if need be; also give the format they are held in.

        BadInput as `load`.
        """
        await self.fetch(span)
        progress = self._console.progress(f"loading blocks {span} of {self._description.card.name}")
        quant = await in_thread(partial(self._choose_quant, span))
        stack = await load_off_thread(
            self._description,
            span,
            self._dtype,
            self._settings.device,
            progress,
            quant=quant,
            saved=cache_home() / "spans",
        )
        return stack, quant

    async def load(self, span: Span) -> Holding:
        """Load and measure these blocks; the caller closes what comes back. BadInput as `load`."""
        settings, description = self._settings, self._description
        stack, quant = await self.load_stack(span)
        self._console.note("measuring its speed")
        speeds, token_bytes = await run_in(
            self._thread,
            lambda: (measured(stack, MEASURE_SECONDS), cache_bytes_per_token(stack)),
        )
        left = _free_bytes(settings.device)
        if settings.memory_bytes is not None:
            taken = weight_bytes(description, span, self._dtype, quant, settings.device)
            left = min(left, settings.memory_bytes - taken)
        tokens = cache_tokens(description, token_bytes, left, self._context)
        taken = cache_bytes(tokens, token_bytes, left)
        digests = await in_thread(partial(digests_of, description, span))
        held = holding_of(stack, speeds, Executor(stack, self._thread), tokens)
        beside = _beside_bytes()
        return replace(
            held,
            quantization=quant,
            digests=digests,
            cache_bytes=taken,
            history_bytes=beside,
            waiting_bytes=beside,
        )


async def load_off_thread(
    description: Description,
    span: Span,
    dtype: Dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    quant: Quant = "none",
    saved: Path | None = None,
) -> Stack:
    """Load the blocks while the event loop goes on. See `load`."""
    work = partial(load, description, span, dtype, device, progress, quant=quant, saved=saved)
    return await in_thread(work)


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


def cache_tokens(
    description: Description, bytes_per_token: int, free_bytes: int, context: int
) -> int:
    """How many tokens of cache and history fit into what is free, at least one conversation of so
    many tokens.
    """
    taken = 2 * bytes_per_token + VALUE_BYTES * description.card.hidden_size  # buffers double
    fitting = int(free_bytes * (1 - HEADROOM)) // taken
    return max(min(fitting, MOST_CACHE_TOKENS), context)


def cache_bytes(tokens: int, bytes_per_token: int, free_bytes: int) -> int:
    """What the caches of so many tokens may take. Half of what is free, if they do not grow."""
    if bytes_per_token:
        return tokens * 2 * bytes_per_token  # as above
    return int(free_bytes * (1 - HEADROOM)) // 2


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


def _beside_bytes() -> int:
    """A tenth of the host memory that is free: for histories, and again for steps that wait."""
    return max(free_memory_bytes("cpu") // HISTORY_SHARE, LEAST_HISTORY_BYTES)


def _free_bytes(device: str) -> int:
    try:
        return free_memory_bytes(device)
    except (RuntimeError, AssertionError) as error:  # torch's answers to a device it has not
        raise BadInput(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}",
            next_step="--device cpu always can",
        ) from error
