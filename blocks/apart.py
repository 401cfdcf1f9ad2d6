"""May sessions of a block be attended to apart? The trial of one block, on sessions of its own.

Attention by rows calls the family's own function, so what it gives is right if every key that a
layer stores reaches it as stored, and nothing is hidden but the future. Both are seen in one step.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from blocks.attention import Rows
from blocks.cache import StackCache
from blocks.forward import Carved
from blocks.growing import kind_of
from blocks.hf.caches import DynamicIndexedLayer
from blocks.hf.models import layer_kinds
from blocks.joint import Row, run_rows
from blocks.sides import Sides

logger = logging.getLogger(__name__)

# Of two sessions: positions before the step.
_PASTS = (2, 5)

# How far the ways may be apart, as a part of the largest value: they round differently.
_MOST_APART = 1e-4
_MOST_APART_HALF = 3e-2  # with 8 bits


class Tried(Protocol):
    """A stack of one block."""

    start: int
    holds_embedding: bool
    holds_head: bool

    def sample(self, tokens: int) -> tuple[torch.Tensor, Sides]:
        """Random hidden states [1, tokens, ...] and sides into the block."""

    def new_cache(self) -> StackCache:
        """An empty cache of the block."""


def attends_apart(carved: Carved, one: Tried) -> bool:
    """Does attention by rows give in this block what the family's own batch gives?

    Blocks of a kind are tried once. A step must have run in it: what keeps a state is not tried.
    Never raises for what a family's code makes of the trial.
    """
    types = layer_kinds(carved.model.config)
    cache = one.new_cache()
    kind = (
        type(carved.parts.layers[one.start]),
        kind_of(cache.layers[one.start]),
        types[one.start] if types else None,
        one.holds_embedding,  # the ends are run through other code of the family
        one.holds_head,
    )
    if kind not in carved.tried:
        # an indexer chooses among the positions of all rows, so they must be together
        indexed = any(issubclass(kind_of(layer), DynamicIndexedLayer) for layer in cache.held)
        carved.tried[kind] = not indexed and _is_seen(carved, one)
    return carved.tried[kind]


def _is_seen(carved: Carved, one: Tried) -> bool:
    joint, alone = carved.attention(is_joint=True), carved.attention(is_joint=False)
    if joint is None or alone is None:
        return False
    try:
        tokens = max(_PASTS) + 1
        ids = torch.arange(tokens, device=carved.device)[None] % carved.vocabulary_size
        trial = _Trial(carved, one, (ids, {}) if one.holds_embedding else one.sample(tokens))
        padded = trial.joint_step(None)
        ways = trial.joint_step(joint), trial.steps_alone(alone)
    except Exception as refused:  # noqa: BLE001  # a family's own code may raise anything
        logger.info("block %s is not attended to by rows: %s", one.start, refused)
        return False
    return joint.is_whole and all(is_near(padded, way, carved.dtype) for way in ways)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Two sessions in one block, begun anew for each way to take their next step."""

    carved: Carved
    one: Tried
    sample: tuple[torch.Tensor, Sides]

    def joint_step(self, rows: Rows | None) -> torch.Tensor:
        """One step of both: hidden states [2, 1, ...], or logits where there is a head."""
        both = [
            Row(self._begun(past), *self._taken(slice(past, past + 1)), self.one.holds_head)
            for past in _PASTS
        ]
        with torch.inference_mode():
            run_rows(self.carved, both, lambda *_: self.one.new_cache(), lambda _: rows)
        return torch.cat([row.values for row in both])

    def steps_alone(self, rows: Rows) -> torch.Tensor:
        """One step of each, by its own past."""
        begun = [(self._begun(past), slice(past, past + 1)) for past in _PASTS]
        with torch.inference_mode(), rows.attached():
            return torch.cat([self._step(cache, place) for cache, place in begun])

    def _begun(self, past: int) -> StackCache:
        cache = self.one.new_cache()
        with torch.inference_mode():
            self._step(cache, slice(past))
        return cache

    def _step(self, cache: StackCache, places: slice) -> torch.Tensor:
        values, sides = self._taken(places)
        positions = torch.arange(self.sample[0].shape[1], device=values.device)[None, places]
        blocks = range(self.one.start, self.one.start + 1)
        shared = {"position_ids": positions, "attention_mask": None}
        cache.begin(1)
        output = self.carved.forward(
            blocks,
            values,
            shared,
            cache=cache,
            wanted=1 if self.one.holds_head else None,
            sides=sides,
        )
        cache.advance(values.shape[1])
        return output.asked

    def _taken(self, places: slice) -> tuple[torch.Tensor, Sides]:
        values, sides = self.sample
        return values[:, places], {name: side[:, places] for name, side in sides.items()}


def is_near(padded: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Do two ways to one result, computed in that dtype, differ by rounding only?"""
    most = _MOST_APART if dtype == torch.float32 else _MOST_APART_HALF
    return bool((padded - other).abs().max() <= most * padded.abs().max())
