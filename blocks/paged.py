"""Layers of a session's past whose keys and values lie in pages of a pool (`blocks.pool`).

1. A step by itself is given what a growing layer would give: a copy of the past in one piece.
   Steps by tables (`blocks.by_table`) read the pages where they lie.
2. How long such a layer is the session knows; only within a step it may be ahead of the others.
3. A session of several rows never joins others: its layers are growing ones instead.
"""

from collections.abc import Sequence
from typing import Any

import torch

from blocks.growing import ROLLBACK_TOKENS, Growing, GrowingSliding, Known
from blocks.pool import Form, Ledger, Pools
from blocks.transfer import sent

Pair = tuple[torch.Tensor, torch.Tensor]


class Paged(Growing):
    """A full-attention layer in pages."""

    ledger: Ledger
    number: int  # of its block
    known: Known
    end: int  # positions stored by the last step that was computed here

    def get_seq_length(self) -> int:
        """Positions held."""
        return max(self.end, self.known.length) if self.is_initialized else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """Append and return all keys and values."""
        if not self.is_initialized and len(key_states) > 1:
            self.__class__ = Growing
            return self.update(key_states, value_states, *args, **kwargs)
        return _updated(self, key_states, value_states, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in transformers their count comes with a minus sign."""
        _crop(self, tokens_to_remove)


class PagedSliding(GrowingSliding):
    """A sliding layer in pages: keeps those that its window or a rollback may need."""

    ledger: Ledger
    number: int
    known: Known
    end: int

    @property
    def cumulative_length(self) -> int:
        """Positions held, or dropped before the window."""
        return max(self.end, self.known.length) if self.is_initialized else 0

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        """The session counts."""

    @property
    def shortest(self) -> int:
        """The least length, beside 0, for which everything its window needs is still held."""
        gone = self.ledger.gone(self.number) * self.ledger.pools.page_tokens
        return gone + self.sliding_window - 1 if gone else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """Append and return the keys and values that `get_mask_sizes` announced."""
        if not self.is_initialized and len(key_states) > 1:
            self.__class__ = GrowingSliding
            return self.update(key_states, value_states, *args, **kwargs)
        return _updated(self, key_states, value_states, self.sliding_window - 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in transformers their count comes with a minus sign."""
        _crop(self, tokens_to_remove)


_KINDS = {Growing: Paged, GrowingSliding: PagedSliding}


def may_be_paged(layers: Sequence[Any]) -> bool:
    """Are they all of kinds that can be in pages? Asked of growing layers."""
    return all(type(layer) in _KINDS for layer in layers)


def page(layers: Sequence[Any], numbers: Sequence[int], known: Known, pools: Pools) -> Ledger:
    """Make pages the room of these growing layers, all of one new session; its ledger."""
    ledger = Ledger(pools)
    for layer, number in zip(layers, numbers, strict=True):
        layer.__class__ = _KINDS[type(layer)]
        layer.ledger, layer.number, layer.known, layer.end = ledger, number, known, 0
    return ledger


def share(layers: Sequence[Any], forks: Sequence[Any], ledger: Ledger) -> None:
    """Let new layers begin with what is in that ledger, which was forked from these layers'."""
    for layer, fork in zip(layers, forks, strict=True):
        fork.ledger = ledger
        fork.dtype, fork.device = layer.dtype, layer.device
        fork.is_initialized = layer.is_initialized


def _updated(
    layer: Any, key_states: torch.Tensor, value_states: torch.Tensor, window: int | None
) -> Pair:
    """Append; all keys and values, or the last `window` and the new ones."""
    ledger, number, tokens = layer.ledger, layer.number, key_states.shape[-2]
    if not layer.is_initialized:
        layer.dtype, layer.device = key_states.dtype, key_states.device
        keep = None if window is None else window + ROLLBACK_TOKENS
        ledger.open(number, Form.of(key_states, value_states), keep)
        layer.is_initialized = True
    past = layer.get_seq_length()
    ledger.make_room(number, past, tokens)
    _write(layer, past, key_states, value_states)
    layer.end = past + tokens
    seen = past if window is None else min(past, window)
    return (key_states, value_states) if not seen else _read(layer, past - seen, layer.end)


def _write(layer: Any, past: int, *states: torch.Tensor) -> None:
    pool, pages = layer.ledger.held[layer.number]
    size, tokens, done = pool.page_tokens, states[0].shape[-2], 0
    while done < tokens:
        index, place = divmod(past + done, size)
        count = min(size - place, tokens - done)
        for room, state in zip((pool.keys, pool.values), states, strict=True):
            new = state[0, :, done : done + count].transpose(0, 1)
            room[pages[index], place : place + count] = new
        done += count


def _read(layer: Any, first: int, end: int) -> Pair:
    """Keys and values [1, heads, end - first, width], copied."""
    pool, pages = layer.ledger.held[layer.number]
    start, stop = first // pool.page_tokens, -(-end // pool.page_tokens)
    index = sent(torch.tensor(pages[start:stop]), pool.form.device)
    before = start * pool.page_tokens
    keys, values = (
        room.index_select(0, index).flatten(0, 1)[first - before : end - before].transpose(0, 1)
        for room in (pool.keys, pool.values)
    )
    return keys[None], values[None]


def _crop(layer: Any, tokens_to_remove: int) -> None:
    if tokens_to_remove and layer.is_initialized:
        layer.ledger.cut(layer.number, layer.get_seq_length() + tokens_to_remove)
        layer.end = 0
