"""What a session has left behind in the layers of one stack: keys, values, states.

1. Only layers of the stack store anything. The others are ghosts that know the session's length
   and nothing else, because families ask "the first layer" or "the first full layer" for it.
2. Appending costs what is appended: buffers double and are written in place, or keys lie in pages.
3. After `rollback(n)` the next step computes what it would have computed had the session never
   been longer than n. What cannot be rolled back so is refused, never approximated.
4. A cache holds no reference to itself: dropping the last reference frees its memory at once.
5. What caches share is never written: of a cache and its forks, whoever appends first where another
   still looks takes a room of its own.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from blocks.errors import BlocksError, StepError
from blocks.growing import Buffer, Growing, GrowingSliding, Known, growing_kind, kind_of
from blocks.hf.caches import (
    FORKABLE,
    MUTATORS,
    UNREGISTERED,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    is_recurrent,
)
from blocks.hf.models import PretrainedConfig, decoder_config
from blocks.paged import page, share
from blocks.pool import Ledger, Pools


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Ghosts store nothing, so what changes a store changes nothing."""


@functools.cache
def _ghost_kind(kind: type) -> type:
    """The class of ghosts of a kind of layer: answers by the session's length, stores nothing."""

    def ignore(self: Any, value: Any) -> None:
        """Constructors and resets assign what a ghost computes."""

    names: dict[str, Any] = {**dict.fromkeys(MUTATORS, _nothing), **UNREGISTERED}
    if issubclass(kind, DynamicSlidingWindowLayer):
        names["cumulative_length"] = property(lambda self: self.session.length, ignore)
    elif issubclass(kind, DynamicLayer):
        names["get_seq_length"] = lambda self: self.session.length
    if issubclass(kind, LinearAttentionCacheLayerMixin):
        names["has_previous_state"] = property(
            lambda self: dict.fromkeys(range(self.number_of_states), self.session.length > 0),
            ignore,
        )
    return type(f"Ghost{kind.__name__}", (kind,), names)


class StackCache(DynamicCache):  # type: ignore[misc]  # transformers is not followed
    """The cache of one session in the blocks `start:stop`, passed to models as their cache.

    `lent` are blocks before `start` whose keys these blocks share: they are stored here, too. With
    `pools` the keys of a session of one row lie in these (`blocks.paged.may_be_paged`).
    `length` counts the positions computed. A stack brackets a step's layers by `begin` and
    `advance`; between them the cache is torn: layers that ran are ahead of those that did not.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        start: int,
        stop: int,
        lent: Sequence[int] = (),
        pools: Pools | None = None,
    ) -> None:
        self.start, self.stop = start, stop
        self.numbers = (*lent, *range(start, stop))  # of the layers that store something
        self.rows: int | None = None  # sequences side by side, set by the first step
        self.is_torn = False
        self._config: Any = config
        self._pools = pools
        self._session = Known()
        self._build()

    def _build(self) -> None:
        super().__init__(config=self._config)
        count = decoder_config(self._config).num_hidden_layers
        if not self.layers:  # a config that tells nothing of its layers
            self.layers: list[Any] = [DynamicLayer() for _ in range(count)]
        self.layer_class_to_replicate = None
        for number, layer in enumerate(self.layers):
            kind: type = type(layer)
            if number in self.numbers:
                layer.__class__ = growing_kind(kind)
            elif not isinstance(layer, DummyLayer):
                layer.__class__ = _ghost_kind(kind)
                layer.session = self._session
        self._hold()
        self.ledger: Ledger | None = None
        if self._pools is not None:
            self.ledger = page(self.held, self.numbers, self._session, self._pools)

    def _hold(self) -> None:
        self.held = [self.layers[number] for number in self.numbers]
        self._sliding = [layer for layer in self.held if isinstance(layer, GrowingSliding)]
        self._is_forkable = all(kind_of(layer) in FORKABLE for layer in self.held)

    @property
    def is_paged(self) -> bool:
        """Do all its keys lie in pages?"""
        return self.ledger is not None and len(self.ledger) == len(self.numbers)

    @property
    def length(self) -> int:
        """Positions computed and held."""
        return self._session.length

    def make_ready(self, tokens: int = 1) -> None:
        """Have pages for that many more positions, where keys lie in pages.

        What was parked comes back. BlocksError, having changed nothing, if there are none.
        """
        if self.ledger is not None and not self.is_torn:
            self._unpark()
            self.ledger.make_ready(self.length, tokens)

    def park(self) -> bool:
        """Take its keys into this process's memory until the next step. False if they stay.

        Only those in pages of a device can go, and only between steps.
        """
        if self.ledger is None or not self.is_paged or self.is_torn:
            return False
        if not self.ledger.is_parked:
            self.ledger.park()
        return True

    def _unpark(self) -> None:
        if self.ledger is not None and self.ledger.is_parked:
            self.ledger.unpark()

    def begin(self, rows: int) -> None:
        """Open a step of `rows` sequences. BlocksError if an earlier step never came to its end."""
        if self.is_torn:
            raise BlocksError("an earlier step failed half way, so this cache can only start anew")
        self.is_torn, self.rows = True, rows

    def advance(self, tokens: int) -> None:
        """Close a step: all held layers have stored `tokens` more positions."""
        self._session.length += tokens
        self.is_torn = False

    def can_roll_back(self, length: int) -> bool:
        """Would `rollback(length)` be exact? Always for 0, and for the present length."""
        removed = self.length - length
        if length == 0 or removed < 0 or self.is_torn:
            return length == 0
        return removed == 0 or all(_can_crop(layer, removed) for layer in self.held)

    def rollback(self, length: int) -> None:
        """Forget all positions from `length` on.

        StepError if the session is shorter. BlocksError if the family cannot go back: recurrent
        layers never can, sliding ones not much further than `ROLLBACK_TOKENS`, a torn cache only
        to 0.
        """
        if not 0 <= length <= self.length and not self.is_torn:
            raise StepError(f"position {length} is beyond the {self.length} held")
        if not self.can_roll_back(length):
            raise BlocksError(f"these layers cannot go back from {self.length} to {length}")
        if length == 0:
            self._session.length, self.rows, self.is_torn = 0, None, False
            self._build()
        elif length < self.length:
            self._unpark()
            for layer in self.held:
                layer.crop(length - self.length)
            self._session.length = length

    @property
    def shortest_fork(self) -> int | None:
        """The least length that a fork may have, None if the family or its state allows none."""
        if not self._is_forkable or self.is_torn or not self.length:
            return None
        return max([1, *(layer.shortest for layer in self._sliding if layer.is_initialized)])

    def fork(self, length: int) -> "StackCache":
        """Return a cache that goes on from the first `length` positions, on its own from then on.

        Nothing is copied before one of the two stores something where the other looks. StepError if
        the session is shorter, BlocksError if `shortest_fork` allows no such fork.
        """
        if not 0 < length <= self.length:
            raise StepError(f"no fork of {length} positions: {self.length} are held")
        shortest = self.shortest_fork
        if shortest is None or length < shortest:
            raise BlocksError(f"these layers cannot be forked at {length} of {self.length}")
        lent = [number for number in self.numbers if not self.start <= number < self.stop]
        fork = StackCache(self._config, self.start, self.stop, lent, self._pools)
        fork.rows, fork._session.length = self.rows, length
        if self.ledger is not None and self.is_paged:
            self._unpark()
            fork.ledger = self.ledger.fork(length)
            share(self.held, fork.held, fork.ledger)
            return fork
        for number, layer in zip(self.numbers, self.held, strict=True):
            fork.layers[number] = _forked(layer, self.length - length)
        fork._hold()
        return fork

    @property
    def byte_count(self) -> int:
        """Bytes of memory taken, spare room included; storages shared by tensors count once."""
        taken = self.ledger.byte_count if self.ledger else 0
        storages: dict[int, int] = {}
        for layer in self.held:
            if type(layer) in _PLAIN:  # keys and values, each in a room of its own
                taken += _room_bytes(layer.keys) + _room_bytes(layer.values)
                continue
            for tensor in _tensors_of(layer):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return taken + sum(storages.values())

    @property
    def used_byte_count(self) -> int:
        """Bytes that hold something of the session."""
        paged = self.ledger.used_byte_count(self.length) if self.ledger else 0
        tensors = (tensor for layer in self.held for tensor in _tensors_of(layer))
        return paged + int(sum(tensor.nbytes for tensor in tensors))


_PLAIN = (Growing, GrowingSliding)


def _room_bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else int(tensor.untyped_storage().nbytes())


def _tensors_of(layer: Any) -> Iterator[torch.Tensor]:
    """What a layer stores."""
    for value in vars(layer).values():
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if torch.is_tensor(tensor) and tensor.dim() > 0:  # scalars are settings
                yield tensor


def _can_crop(layer: Any, tokens: int) -> bool:
    if is_recurrent(layer):
        return False  # their crop does not undo the recurrent states
    if isinstance(layer, DynamicSlidingWindowLayer):
        return isinstance(layer, GrowingSliding) and layer.can_crop(tokens)
    return bool(layer.is_croppable)


def _forked(layer: Any, removed: int) -> Any:
    """A layer that holds what `layer` holds but for the last `removed` tokens, by reference."""
    fork = object.__new__(type(layer))
    vars(fork).update(vars(layer))
    if not isinstance(layer, DummyLayer) and layer.is_initialized:
        for buffer, held in zip(layer.buffers, (layer.keys, layer.values), strict=True):
            buffer.shared = max(buffer.shared, held.shape[-2] - removed)
        fork.buffers = (Buffer(), Buffer())
    fork.crop(-removed)
    return fork
