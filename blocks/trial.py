"""May a stack's sessions have their keys in pages, and their steps recorded? Tried, never assumed.

A family's code may use what a step by tables does not tell it: how long a session is, a mask, other
keys than its cache gave it. And what is recorded may have taken in a number that was true then
only. So one block of each kind runs sessions of its own, both ways, before any user's.

1. Recordings are tried with other rows and lengths than those they were made with.
2. What raises or differs is not used: first nothing is recorded, then keys are not paged at all.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from blocks.apart import is_near
from blocks.by_table import KERNEL_PAGE_TOKENS, Reads, read_plainly
from blocks.cache import StackCache
from blocks.decoding import Decoder
from blocks.forward import Carved
from blocks.growing import kind_of
from blocks.hf.models import layer_kinds
from blocks.joint import Row, run_rows
from blocks.paged import may_be_paged
from blocks.pool import Pools
from blocks.recorder import GraphRecorder, Recorder
from blocks.sides import Sides

logger = logging.getLogger(__name__)

# Of each pair of sessions: positions before the first step. The first pair's steps are recorded.
_PASTS = ((2, 5), (11, 3))
_STEPS = 3
_PAGE_TOKENS = (
    16  # at least: all of a trial's tables are alike, so that what is recorded comes again
)


@dataclass(frozen=True, slots=True)
class Paging:
    """How a stack is to keep keys in pages of so many positions, and to record its steps.

    `recorder` None records nothing, `most_pages` bounds each pool; `reads` is what attention reads
    pages with, None for the kernel where it fits.
    """

    page_tokens: int = KERNEL_PAGE_TOKENS
    recorder: Recorder | None = None
    most_pages: int | None = None
    reads: Reads | None = None

    @classmethod
    def on(cls, device: torch.device) -> "Paging | None":
        """What suits the device: None on a CPU, whose steps wait for its memory, not for Python."""
        return cls(recorder=GraphRecorder(device)) if device.type == "cuda" else None


class Tried(Protocol):
    """A stack, or a block of it."""

    start: int
    stop: int
    holds_embedding: bool
    holds_head: bool

    def part(self, start: int, stop: int) -> "Tried":
        """Some of its blocks."""

    def sample(self, tokens: int) -> tuple[torch.Tensor, Sides]:
        """Random hidden states [1, tokens, ...] and sides into it."""

    def run(self, inputs: torch.Tensor, *, cache: StackCache | None = None) -> torch.Tensor:
        """What it makes of them."""


def decoder_of(carved: Carved, stack: Tried, paging: Paging) -> Decoder | None:
    """What runs the stack's decode steps by tables; None where keys are better not in pages."""
    refused = _why_not_paged(carved, stack)
    found: Decoder | None = None
    unrecorded: str | None = None
    for recorder, reads in _ways(paging, carved.device) if refused is None else ():
        pools = Pools(max(paging.page_tokens, _PAGE_TOKENS))
        refused = _difference(Decoder(carved, pools, recorder, reads), stack)
        if refused is None:
            pools = Pools(paging.page_tokens, paging.most_pages)
            found = Decoder(carved, pools, recorder, reads)
            break
        unrecorded = unrecorded or refused
    if carved.device.type == "cuda":
        torch.cuda.empty_cache()  # what the trials took, and loading: it is counted from now on
    blocks = f"blocks {stack.start}:{stack.stop}"
    if found is None:
        logger.info("keys of %s are not in pages: %s", blocks, refused)
    elif unrecorded is not None:
        how = "as they could be" if found.recorder else "recorded"
        logger.info("steps of %s are not %s: %s", blocks, how, unrecorded)
    return found


def _ways(paging: Paging, device: torch.device) -> Iterator[tuple[Recorder | None, Reads | None]]:
    """What to try, best first. On a CPU no kernel is ever chosen."""
    readers = (paging.reads,) if device.type == "cpu" else (paging.reads, read_plainly)
    for reads in dict.fromkeys(readers):
        if paging.recorder is not None:
            yield paging.recorder, reads
        yield None, reads


def _why_not_paged(carved: Carved, stack: Tried) -> str | None:
    if carved.sides.is_needed:
        return "something travels beside its hidden states"
    if not may_be_paged(_cache(carved, stack).held):
        return "some of its layers keep more than keys and values"
    if carved.counts_positions(range(stack.start, stack.stop)):
        return "it counts positions itself, the same for all rows of a batch"
    return None


def _cache(carved: Carved, part: Tried, pools: Pools | None = None) -> StackCache:
    return StackCache(carved.model.config, part.start, part.stop, pools=pools)


def _difference(decoder: Decoder, stack: Tried) -> str | None:
    """What is wrong with steps by this decoder, None if they are as they should be."""
    carved, seen = decoder.carved, set()
    types = layer_kinds(carved.model.config)
    layers = _cache(carved, stack).layers
    for number in range(stack.start, stack.stop):
        part = stack.part(number, number + 1)
        kind = (
            type(carved.parts.layers[number]),
            kind_of(layers[number]),
            types[number] if types else None,
            part.holds_embedding,  # the ends are run through other code of the family
            part.holds_head,
        )
        if kind in seen:
            continue
        seen.add(kind)
        try:
            with torch.inference_mode():
                wrong = _Trial(decoder, part).wrong()
        except Exception as raised:  # noqa: BLE001  # a family's own code may raise anything
            wrong = f"{type(raised).__name__}: {raised}"
        if wrong is not None:
            return f"block {number}: {wrong}"
    if carved.keeps_state(range(stack.start, stack.stop)):
        return "its layers keep a state of their own between steps"
    return None


@dataclass(frozen=True, slots=True)
class _Trial:
    """Sessions of one block, which take their steps together by tables, with keys padded, and each
    alone.
    """

    decoder: Decoder
    one: Tried

    def wrong(self) -> str | None:
        """What is, if anything."""
        for number, pasts in enumerate(_PASTS):
            sample = self._sample(max(pasts) + _STEPS)
            padded, alone, paged = (
                [self._begun(sample, past, pools) for past in pasts]
                for pools in (None, None, self.decoder.pools)
            )
            if not all(cache.is_paged for cache in paged):
                return "it stores no keys"
            for step in range(_STEPS):
                repeated = self.decoder.repeated
                ways = [self._padded(sample, padded)]
                ways.append([self._padded(sample, [cache])[0] for cache in alone])
                ours = self._together(sample, paged)
                if not all(self._are_near(theirs, ours) for theirs in ways):
                    return f"step {step} of sessions with pasts of {pasts} differs"
                must_repeat = self.decoder.recorder is not None and (number or step)
                if must_repeat and self.decoder.repeated == repeated:
                    return "its steps cannot be recorded"
        return None

    def _are_near(self, theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> bool:
        dtype = self.decoder.carved.dtype  # logits are float32 whatever they come from
        return all(is_near(*pair, dtype) for pair in zip(theirs, ours, strict=True))

    def _sample(self, tokens: int) -> torch.Tensor:
        if not self.one.holds_embedding:
            return self.one.sample(tokens)[0]
        vocabulary = self.decoder.carved.vocabulary_size
        return torch.arange(tokens, device=self.decoder.carved.device)[None] % vocabulary

    def _begun(self, sample: torch.Tensor, past: int, pools: Pools | None) -> StackCache:
        cache = _cache(self.decoder.carved, self.one, pools)
        self.one.run(sample[:, :past], cache=cache)
        return cache

    def _padded(self, sample: torch.Tensor, caches: Sequence[StackCache]) -> list[torch.Tensor]:
        """The family's own way to run them."""
        carved, wants = self.decoder.carved, self.one.holds_head
        rows = [Row(cache, value, {}, wants) for cache, value in self._next(sample, caches)]
        run_rows(carved, rows, lambda *_: _cache(carved, self.one))
        return [row.values for row in rows]

    def _next(
        self, sample: torch.Tensor, caches: Sequence[StackCache]
    ) -> Iterator[tuple[StackCache, torch.Tensor]]:
        for cache in caches:
            yield cache, sample[:, cache.length : cache.length + 1]

    def _together(self, sample: torch.Tensor, caches: Sequence[StackCache]) -> list[torch.Tensor]:
        for cache in caches:
            cache.make_ready()
            cache.begin(1)
        values = [value for _, value in self._next(sample, caches)]
        ghosts = _cache(self.decoder.carved, self.one)
        blocks = range(self.one.start, self.one.stop)
        outputs = self.decoder.run(blocks, values, caches, ghosts, has_logits=self.one.holds_head)
        for cache in caches:
            cache.advance(1)
        return list(outputs[-1].split(1))
