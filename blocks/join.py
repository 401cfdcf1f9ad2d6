"""Decode steps of several sessions as one batch: rows are sessions, each with a past of its own.

1. Each session's cache stores what it would have stored alone; the joined cache stores nothing
   past its step. Keys and values are padded on the left as they are read, unless attention takes
   them by rows (`blocks.attention`).
2. Models write into recurrent states in place: these are stacked once for the step and copied back
   by `commit`, so a step that breaks half way leaves the sessions torn, as it does alone.
3. Only kinds of layers that are known here join. A layer with a state of its own would be read for
   the first row alone: it is refused, never approximated.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from blocks.attention import Rows
from blocks.cache import StackCache
from blocks.growing import kind_of
from blocks.hf.caches import (
    STATES,
    UNREGISTERED,
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from blocks.transfer import sent

_KNOWN = frozenset(
    {
        DummyLayer,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        DynamicIndexedLayer,
        LinearAttentionLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    }
)


def why_not_joined(cache: StackCache) -> str | None:
    """None if sessions with such caches can share a batch, else what forbids it."""
    for number, layer in zip(cache.numbers, cache.held, strict=True):
        if kind_of(layer) not in _KNOWN:
            return f"block {number} stores a {kind_of(layer).__name__}, which cannot be joined"
    return None


class JoinedCache(DynamicCache):  # type: ignore[misc]  # transformers is not followed
    """The caches of several sessions, one row and one past each, for one step of one position.

    `ghosts` is a cache of the blocks that the step runs through, which all these caches hold; what
    it stores does not matter, its length becomes the longest. `position_ids` [N, 1] and `mask`
    [N, longest + 1] belong to the step; `mask` is None where no row is padded, or no layer would
    look at it. With `rows`, nothing is padded: the new keys stand for all, and `rows` knows whose.
    """

    def __init__(
        self,
        caches: Sequence[StackCache],
        ghosts: StackCache,
        device: torch.device,
        rows: Rows | None = None,
    ) -> None:
        counts = [cache.length for cache in caches]
        most = max(counts)
        longest = counts.index(most)
        lengths = sent(torch.tensor(counts), device)
        ghosts.advance(most - ghosts.length)
        layers = [
            _joined([cache.layers[number] for cache in caches], longest, rows)
            if number in ghosts.numbers
            else ghost
            for number, ghost in enumerate(ghosts.layers)
        ]
        Cache.__init__(self, layers=layers)
        self.position_ids = lengths[:, None]
        is_padded = min(counts) < most
        attends = any(isinstance(layer, DynamicLayer) for layer in self.layers)
        # purely recurrent families take the first columns of a mask for those of the new tokens
        self.mask: torch.Tensor | None = None
        if is_padded and attends and rows is None:
            places = torch.arange(most + 1, device=device)
            self.mask = (places >= most - lengths[:, None]).long()

    def commit(self) -> None:
        """Copy recurrent states back to the sessions; the step is computed."""
        for layer in self.layers:
            if isinstance(layer, _Joined):
                layer.commit()


class _Joined:
    """What all kinds of joined layers share; mixed into the kind itself, whose settings it has."""

    rows: Sequence[Any]  # the sessions' own layers
    longest: int
    stacked: dict[str, dict[int, torch.Tensor | None]]
    apart: Rows | None  # who attends to them, if not all together

    def states(self, name: str) -> dict[int, torch.Tensor | None]:
        """The recurrent states of that name, stacked at the first call."""
        if name not in self.stacked:
            parts: list[dict[int, torch.Tensor | None]] = [getattr(row, name) for row in self.rows]
            self.stacked[name] = {
                index: None if first is None else torch.cat([part[index] for part in parts])
                for index, first in parts[0].items()
            }
        return self.stacked[name]

    def commit(self) -> None:
        """Copy stacked states back."""
        for name, states in self.stacked.items():
            for index, state in states.items():
                for number, row in enumerate(self.rows):
                    if state is not None:
                        getattr(row, name)[index].copy_(state[number : number + 1])


def _joined(rows: list[Any], longest: int, apart: Rows | None) -> Any:
    """One layer for the rows of a batch. It has the first row's settings and nothing it stores."""
    if isinstance(rows[0], DummyLayer):
        return rows[0]
    kind: type = _joined_kind(type(rows[0]))  # type: ignore[arg-type]
    layer: Any = object.__new__(kind)
    own = vars(kind)
    for name, value in vars(rows[0]).items():
        if name not in own and not torch.is_tensor(value):
            setattr(layer, name, value)
    layer.rows, layer.longest, layer.stacked, layer.apart = rows, longest, {}, apart
    return layer


@functools.cache
def _joined_kind(kind: type) -> type:
    """The class of joined layers of a kind: asks the rows' own layers, and pads their answers."""

    def ignore(self: Any, value: Any) -> None:
        """The sessions' own layers count for themselves."""

    names: dict[str, Any] = {"get_seq_length": _of_longest("get_seq_length"), **UNREGISTERED}
    if issubclass(kind, DynamicLayer):
        names |= {"update": _update, "get_mask_sizes": _of_longest("get_mask_sizes")}
    if issubclass(kind, DynamicSlidingWindowLayer):
        names["cumulative_length"] = property(
            lambda self: self.rows[self.longest].cumulative_length, ignore
        )
    if issubclass(kind, DynamicIndexedLayer):
        names["update_indexer"] = _update_indexer
    if issubclass(kind, LinearAttentionCacheLayerMixin):
        for name in STATES:
            names[name] = property(functools.partial(_Joined.states, name=name), ignore)
    return type(f"Joined{kind.__name__}", (_Joined, kind), names)


def _of_longest(name: str) -> Callable[..., Any]:
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.rows[self.longest], name)(*args, **kwargs)

    return ask


def _update(
    self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append each row to its session; all keys and values, padded on the left to the longest, or
    the new ones where rows are attended to apart.
    """
    pairs = [
        row.update(key, value, *args, **kwargs)
        for row, key, value in zip(
            self.rows, key_states.split(1), value_states.split(1), strict=True
        )
    ]
    if self.apart is not None:
        self.apart.keep(key_states, value_states, pairs)
        return key_states, value_states
    return _padded([keys for keys, _ in pairs]), _padded([values for _, values in pairs])


def _update_indexer(self: Any, indexer_key_states: torch.Tensor) -> torch.Tensor:
    """Append each row's indexer keys to its session; all of them, padded on the left."""
    return _padded(
        [
            row.update_indexer(keys)
            for row, keys in zip(self.rows, indexer_key_states.split(1), strict=True)
        ]
    )


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors [1, ..., length, d] as one [N, ..., longest, d], zeros before the shorter ones."""
    longest = max(one.shape[-2] for one in tensors)
    first = tensors[0]
    joined = first.new_zeros((len(tensors), *first.shape[1:-2], longest, first.shape[-1]))
    for row, one in zip(joined, tensors, strict=True):
        row[..., longest - one.shape[-2] :, :] = one[0]
    return joined
