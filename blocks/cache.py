"""What a session has left behind in the layers of one stack: keys, values, states.

1. Only layers of the stack store anything. The others are ghosts that know the session's length
   and nothing else, because families ask "the first layer" or "the first full layer" for it.
2. Appending costs what is appended: buffers double and are written in place.
3. After `rollback(n)` the next step computes what it would have computed had the session never
   been longer than n. What cannot be rolled back so is refused, never approximated.
4. A cache holds no reference to itself: dropping the last reference frees its memory at once.
5. What caches share is never written: of a cache and its forks, whoever appends first where another
   still looks takes a room of its own.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from blocks.errors import BlocksError, StepError

# Room for the first tokens of a session; below it doubling would only mean many small copies.
_FIRST_ROOM_TOKENS = 64

# How far a sliding layer remembers beyond its window, so that any draft can be rolled back.
ROLLBACK_TOKENS = 64


# transformers would take a subclass of some kinds for a better version of them.
UNREGISTERED = {"_layer_type": None}


@dataclass(slots=True)
class _Session:
    """What ghosts know. An object of its own, so that ghosts and cache form no cycle."""

    length: int = 0


@dataclass(slots=True)
class _Buffer:
    """Room for one tensor that grows along axis -2. Views of it stay valid as it grows.

    `shared`: how many tokens, from the start of the room, forks look at.
    """

    room: torch.Tensor | None = None
    shared: int = 0

    def append(
        self, held: torch.Tensor | None, new: torch.Tensor, keep: int | None = None
    ) -> torch.Tensor:
        """Return `held` followed by `new`, copying `held` only when it has outgrown its room.

        `held` is what the last call returned, possibly cut at its end. A new room takes over the
        last `keep` tokens of it (None: all).
        """
        count, room = 0 if held is None else held.shape[-2], self.room
        if (
            room is None
            or held is None
            or held.data_ptr() != room.data_ptr()  # a beam search put its own tensor in place
            or count < self.shared  # rolled back below what a fork looks at
            or count + new.shape[-2] > room.shape[-2]
        ):
            kept = count if keep is None else min(count, keep)
            tokens = max(_FIRST_ROOM_TOKENS, 2 * (kept + new.shape[-2]))
            room = self.room = new.new_empty((*new.shape[:-2], tokens, new.shape[-1]))
            self.shared = 0
            if held is not None:
                room[..., :kept, :] = held[..., count - kept :, :]
            count = kept
        room[..., count : count + new.shape[-2], :] = new
        return room[..., : count + new.shape[-2], :]


class _Growing(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """A full-attention layer that grows in place. Crops are views, so the buffers survive them."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    buffers: tuple[_Buffer, _Buffer]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return all keys and values."""
        _initialise(self, key_states, value_states)
        self.keys = self.buffers[0].append(self.keys, key_states)
        self.values = self.buffers[1].append(self.values, value_states)
        return self.keys, self.values


class _GrowingSliding(DynamicSlidingWindowLayer):  # type: ignore[misc]  # as above
    """A sliding layer that keeps `ROLLBACK_TOKENS` beyond its window and grows in place."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    buffers: tuple[_Buffer, _Buffer]
    sliding_window: int
    cumulative_length: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return the keys and values that `get_mask_sizes` announced."""
        _initialise(self, key_states, value_states)
        visible = min(self.cumulative_length, self.sliding_window - 1) + key_states.shape[-2]
        keep = self.sliding_window - 1 + ROLLBACK_TOKENS
        self.keys = self.buffers[0].append(self.keys, key_states, keep)
        self.values = self.buffers[1].append(self.values, value_states, keep)
        self.cumulative_length += key_states.shape[-2]
        hidden = self.keys.shape[-2] - visible
        return self.keys[..., hidden:, :], self.values[..., hidden:, :]

    def can_crop(self, tokens: int) -> bool:
        """Is everything the window needs still held once the last `tokens` are gone?"""
        return self.cumulative_length - tokens >= self.shortest

    @property
    def shortest(self) -> int:
        """The least length, beside 0, for which everything its window needs is still held."""
        held = 0 if self.keys is None else self.keys.shape[-2]
        gone = self.cumulative_length - held
        return gone + self.sliding_window - 1 if gone else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in transformers their count comes with a minus sign."""
        if tokens_to_remove and self.keys is not None and self.values is not None:
            self.keys = self.keys[..., :tokens_to_remove, :]
            self.values = self.values[..., :tokens_to_remove, :]
            self.cumulative_length += tokens_to_remove


def _initialise(layer: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Let the layer note dtype and device; our own buffers take the place of its empty tensors."""
    if not layer.is_initialized:
        layer.lazy_initialization(key_states, value_states)
        layer.keys = layer.values = None
        layer.buffers = (_Buffer(), _Buffer())


@functools.cache
def _growing_kind(kind: type) -> type:
    """The kind of layer that stores what `kind` stores, but grows in place; `kind` if unknown."""
    for ours, theirs in ((_Growing, DynamicLayer), (_GrowingSliding, DynamicSlidingWindowLayer)):
        if kind is theirs:
            return ours
        # kinds that add to attention (an indexer, a convolution) keep all but the appending
        if issubclass(kind, theirs) and getattr(kind, "update", None) is theirs.update:
            names = {"update": ours.update, "grows": kind, **UNREGISTERED}
            return type(f"Growing{kind.__name__}", (kind,), names)
    return kind


def kind_of(layer: Any) -> type:
    """transformers' own kind of a layer that a stack holds."""
    if isinstance(layer, _Growing):
        return cast(type, DynamicLayer)
    if isinstance(layer, _GrowingSliding):
        return cast(type, DynamicSlidingWindowLayer)
    return cast(type, getattr(type(layer), "grows", type(layer)))


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """Ghosts store nothing, so what changes a store changes nothing."""


_MUTATORS = (
    "crop",
    "reorder_cache",
    "reset",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
    "offload",
    "prefetch",
)


@functools.cache
def _ghost_kind(kind: type) -> type:
    """The class of ghosts of a kind of layer: answers by the session's length, stores nothing."""

    def ignore(self: Any, value: Any) -> None:
        """Constructors and resets assign what a ghost computes."""

    names: dict[str, Any] = {**dict.fromkeys(_MUTATORS, _nothing), **UNREGISTERED}
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
    """The cache of one session in the blocks `start:stop`, passed to models as `past_key_values`.

    `lent` are blocks before `start` whose keys these blocks share: they are stored here, too.
    `length` counts the positions computed. A stack brackets a step's layers by `begin` and
    `advance`; between them the cache is torn: layers that ran are ahead of those that did not.
    """

    def __init__(
        self, config: PretrainedConfig, start: int, stop: int, lent: Sequence[int] = ()
    ) -> None:
        self.start, self.stop = start, stop
        self.numbers = (*lent, *range(start, stop))  # of the layers that store something
        self.rows: int | None = None  # sequences side by side, set by the first step
        self.is_torn = False
        self._config: Any = config
        self._session = _Session()
        self._build()

    def _build(self) -> None:
        super().__init__(config=self._config)
        count = self._config.get_text_config(decoder=True).num_hidden_layers
        if not self.layers:  # a config that tells nothing of its layers
            self.layers: list[Any] = [DynamicLayer() for _ in range(count)]
        self.layer_class_to_replicate = None
        for number, layer in enumerate(self.layers):
            kind: type = type(layer)
            if number in self.numbers:
                layer.__class__ = _growing_kind(kind)
            elif not isinstance(layer, DummyLayer):
                layer.__class__ = _ghost_kind(kind)
                layer.session = self._session
        self._hold()

    def _hold(self) -> None:
        self.held = [self.layers[number] for number in self.numbers]
        self._sliding = [layer for layer in self.held if isinstance(layer, _GrowingSliding)]
        self._is_forkable = all(kind_of(layer) in _FORKABLE for layer in self.held)

    @property
    def length(self) -> int:
        """Positions computed and held."""
        return self._session.length

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
        fork = StackCache(self._config, self.start, self.stop, lent)
        fork.rows, fork._session.length = self.rows, length
        for number, layer in zip(self.numbers, self.held, strict=True):
            fork.layers[number] = _forked(layer, self.length - length)
        fork._hold()
        return fork

    @property
    def byte_count(self) -> int:
        """Bytes of memory taken, spare room included; storages shared by tensors count once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in self._tensors()
        }
        return sum(storages.values())

    @property
    def used_byte_count(self) -> int:
        """Bytes that hold something of the session."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.held:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if torch.is_tensor(tensor) and tensor.dim() > 0:  # scalars are settings
                        yield tensor


def _can_crop(layer: Any, tokens: int) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return False  # their crop does not undo the recurrent states
    if isinstance(layer, DynamicSlidingWindowLayer):
        return isinstance(layer, _GrowingSliding) and layer.can_crop(tokens)
    return bool(layer.is_croppable)


# Kinds that hold nothing but keys and values, which only grow.
_FORKABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)


def _forked(layer: Any, removed: int) -> Any:
    """A layer that holds what `layer` holds but for the last `removed` tokens, by reference."""
    fork = object.__new__(type(layer))
    vars(fork).update(vars(layer))
    if not isinstance(layer, DummyLayer) and layer.is_initialized:
        for buffer, held in zip(layer.buffers, (layer.keys, layer.values), strict=True):
            buffer.shared = max(buffer.shared, held.shape[-2] - removed)
        fork.buffers = (_Buffer(), _Buffer())
    fork.crop(-removed)
    return fork
