"""How transformers lets attention be exchanged: by a name in configs, for which a function stands.

| fact | releases |
| --- | --- |
| configs name their attention in `_attn_implementation` (private), asked at each call | from 5.0 |
| a module of a family has its `ALL_ATTENTION_FUNCTIONS`, `eager_attention_forward` | from 5.0 |
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blocks.errors import BlocksError
from blocks.hf.models import tiny_model
from blocks.hf.release import Fact, check_facts, check_parameters

__all__ = [
    "HARMLESS",
    "base_of",
    "causal_mask_function",
    "configs_of",
    "is_window",
    "name_attention",
    "own_attention",
    "register",
]

_CONFIG_KEY = "_attn_implementation"

# Keywords that say nothing more of one position's attention than its past does.
HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "position_embeddings",
        "position_ids",
        "scaling",
        "sliding_window",
        "use_cache",
    }
)


def register(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make `attend` what layers call whose config names this, with the mask that `mask` makes."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def configs_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """The configs that say how a model's layers attend."""
    found = (vars(module).get("config") for module in model.modules())
    named = [config for config in found if hasattr(config, _CONFIG_KEY)]
    return tuple({id(config): config for config in named}.values())


def base_of(configs: Sequence[Any]) -> str | None:
    """The one implementation they all name, if it is one that can be run by rows."""
    names = {getattr(config, _CONFIG_KEY) for config in configs}
    chunked = any(getattr(config, "attention_chunk_size", None) for config in configs)
    base = names.pop() if len(names) == 1 else None
    return base if base in ("sdpa", "eager") and not chunked else None


def name_attention(configs: Sequence[Any], name: str) -> None:
    """Let layers with these configs attend by what was registered under that name."""
    for config in configs:
        setattr(config, _CONFIG_KEY, name)


@functools.cache
def _own_of(kind: type, base: str) -> Callable[..., Any]:
    home = vars(sys.modules[kind.__module__])
    if base == "eager":
        if "eager_attention_forward" not in home:
            raise BlocksError(f"{kind.__module__} has no eager_attention_forward")
        own: Callable[..., Any] = home["eager_attention_forward"]
    else:
        own = home.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[base]
    return own


def own_attention(module: nn.Module, base: str) -> Callable[..., Any]:
    """What the module's family attends with."""
    return _own_of(type(module), base)  # type: ignore[arg-type]  # a class is hashable


def is_window(config: Any, local_size: int | None) -> bool:
    """Is this size of a mask the config's own window?"""
    return local_size is not None and local_size == getattr(config, "sliding_window", None)


def _is_asked_by_keyword() -> bool:
    """Do layers hand their attention what `attend` and `own_attention` take?"""
    own = own_attention(tiny_model().model.layers[0].self_attn, "sdpa")
    names = list(inspect.signature(own).parameters)
    return names[:5] == ["module", "query", "key", "value", "attention_mask"]


FACTS = (
    Fact(
        "a model names its attention in its config",
        lambda: base_of(configs_of(tiny_model())) is not None,
    ),
    Fact("attention takes module, query, key, value and attention_mask", _is_asked_by_keyword),
)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    known = {
        "mask_function": causal_mask_function,
        "attention_mask": None,
        "local_size": None,
        "allow_is_causal_skip": True,
    }
    check_parameters("sdpa_mask", sdpa_mask, known)
    check_parameters("eager_mask", eager_mask, {"mask_function": causal_mask_function})
    check_parameters(
        "sdpa_attention_forward", sdpa_attention_forward, {"scaling": None, "dropout": 0.0}
    )
    check_facts(FACTS)
