"""Layers of a session's past that grow in place: keys and values in buffers that double.

1. Appending costs what is appended; views of what was held stay valid.
2. What a fork looks at is never written: who appends there takes a room of its own.
"""

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch

from blocks.hf.caches import UNREGISTERED, DynamicLayer, DynamicSlidingWindowLayer

# Room for the first tokens of a session; below it doubling would only mean many small copies.
_FIRST_ROOM_TOKENS = 64

# How far a sliding layer remembers beyond its window, so that any draft can be rolled back.
ROLLBACK_TOKENS = 64


@dataclass(slots=True)
class Known:
    """What ghosts know. An object of its own, so that ghosts and cache form no cycle."""

    length: int = 0


@dataclass(slots=True)
class Buffer:
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


class Growing(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """A full-attention layer that grows in place. Crops are views, so the buffers survive them."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    buffers: tuple[Buffer, Buffer]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return all keys and values."""
        _initialise(self, key_states, value_states)
        self.keys = self.buffers[0].append(self.keys, key_states)
        self.values = self.buffers[1].append(self.values, value_states)
        return self.keys, self.values


class GrowingSliding(DynamicSlidingWindowLayer):  # type: ignore[misc]  # as above
    """A sliding layer that keeps `ROLLBACK_TOKENS` beyond its window and grows in place."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    buffers: tuple[Buffer, Buffer]
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
        layer.buffers = (Buffer(), Buffer())


@functools.cache
def growing_kind(kind: type) -> type:
    """The kind of layer that stores what `kind` stores, but grows in place; `kind` if unknown."""
    for ours, theirs in ((Growing, DynamicLayer), (GrowingSliding, DynamicSlidingWindowLayer)):
        if kind is theirs:
            return ours
        # kinds that add to attention (an indexer, a convolution) keep all but the appending
        if issubclass(kind, theirs) and getattr(kind, "update", None) is theirs.update:
            names = {"update": ours.update, "grows": kind, **UNREGISTERED}
            return type(f"Growing{kind.__name__}", (kind,), names)
    return kind


def kind_of(layer: Any) -> type:
    """transformers' own kind of a layer that a stack holds."""
    if isinstance(layer, Growing):
        return cast(type, DynamicLayer)
    if isinstance(layer, GrowingSliding):
        return cast(type, DynamicSlidingWindowLayer)
    return cast(type, getattr(type(layer), "grows", type(layer)))
