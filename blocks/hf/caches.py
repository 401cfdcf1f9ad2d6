"""The kinds of layers of transformers' caches, and what each keeps.

| fact | releases |
| --- | --- |
| a layer whose keys another stores is a `DummyLayer` | from 5.23 |
| `crop` takes the tokens to remove with a minus sign | from 5.20 |
| layers are given further keywords by `update`, `kwargs` among them | from 5.24 |
| kinds with a `_layer_type` put themselves among those that configs name | from 5.22 |
"""

from typing import Any

import torch
from transformers.cache_utils import (
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

from blocks.hf.models import CONFIG_MAPPING, PretrainedConfig
from blocks.hf.release import Fact, check_facts, check_parameters

__all__ = [
    "FORKABLE",
    "MUTATORS",
    "STATES",
    "UNREGISTERED",
    "Cache",
    "DummyLayer",
    "DynamicCache",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "is_recurrent",
    "whole_cache",
]

# What changes a layer's store.
MUTATORS = (
    "crop",
    "reorder_cache",
    "reset",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
    "offload",
    "prefetch",
)

# Where recurrent layers keep what they keep, each a dict by number.
STATES = ("conv_states", "recurrent_states")

# transformers would take a subclass of some kinds for a better version of them.
UNREGISTERED = {"_layer_type": None}

# Kinds that hold nothing but keys and values, which only grow.
FORKABLE = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer, DummyLayer)


def whole_cache(config: PretrainedConfig) -> DynamicCache:
    """transformers' own cache for a whole model."""
    return DynamicCache(config=config)


def is_recurrent(layer: Any) -> bool:
    """Does it hold a state instead of a past that can be masked and cut?"""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def _keys(count: int) -> torch.Tensor:
    return torch.arange(float(count)).view(1, 1, count, 1)


def _appends_and_crops() -> bool:
    layer = DynamicLayer()
    layer.update(_keys(2), _keys(2), 0, kwargs={})
    keys, _ = layer.update(_keys(1), _keys(1))
    whole = keys.flatten().tolist(), layer.get_seq_length(), layer.get_mask_sizes(1)
    layer.crop(-1)
    return bool(whole == ([0, 1, 0], 3, (4, 0)) and layer.keys.flatten().tolist() == [0, 1])


def _slides() -> bool:
    layer = DynamicSlidingWindowLayer(3)
    layer.update(_keys(5), _keys(5), 0)
    sizes = layer.get_mask_sizes(1)
    keys, _ = layer.update(_keys(1), _keys(1), 0)
    told = keys.flatten().tolist(), sizes, layer.cumulative_length, layer.keys.shape[-2]
    return told == ([3, 4, 0], (3, 3), 6, 2)


def _keeps_states() -> bool:
    layer = LinearAttentionLayer()
    layer.update_recurrent_state(torch.ones(1, 1))
    before = dict(layer.has_previous_state)
    return (
        all(isinstance(getattr(layer, name), dict) for name in STATES)
        and float(layer.recurrent_states[0]) == 1.0
        and before.keys() == set(range(layer.number_of_states))
    )


def _lays_out() -> bool:
    config = CONFIG_MAPPING["gemma2"](num_hidden_layers=2, sliding_window=3)
    return [type(layer) for layer in DynamicCache(config=config).layers] == [
        DynamicSlidingWindowLayer,
        DynamicLayer,
    ]


FACTS = (
    Fact(
        "a layer appends what it is given, and forgets what `crop` tells",
        _appends_and_crops,
    ),
    Fact("a sliding layer gives its window and the new, keeps one less, and counts all", _slides),
    Fact("a recurrent layer keeps its states in dicts by number", _keeps_states),
    Fact(
        "a cache has a layer of the kind that the config tells for each of the model's", _lays_out
    ),
    Fact(
        "layers have all the methods that change what they store",
        lambda: all(hasattr(DynamicSlidingWindowLayer, name) for name in MUTATORS),
    ),
    Fact("layers say whether they can be cut", lambda: DynamicLayer().is_croppable is True),
)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    check_parameters("DynamicCache", DynamicCache.__init__, {"config": None})
    check_parameters("Cache", Cache.__init__, {"layers": None})
    for name in ("lazy_initialization", "update"):
        known = dict.fromkeys(("key_states", "value_states"), ...)
        check_parameters(f"DynamicLayer.{name}", getattr(DynamicLayer, name), known)
    check_parameters(
        "DynamicIndexedLayer.update_indexer",
        DynamicIndexedLayer.update_indexer,
        {"indexer_key_states": ...},
    )
    check_facts(FACTS)
