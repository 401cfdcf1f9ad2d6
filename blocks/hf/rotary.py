"""Rotary scalings that go by how long a text is.

| fact | releases |
| --- | --- |
| a rotary module tells its `rope_type` (a dict by kinds of layers), takes `position_ids` | all |
| one forward's largest position is the length: beyond the original length "longrope" takes its | |
| long factors for all positions; beyond `max_position_embeddings` "dynamic" takes another base | |
| for each length, and remembers the longest | all |
| Phi-3's kin drop the cache in `prepare_inputs_for_generation` where a text crosses it | all |

1. What is one forward there comes here in chunks and decode steps: a pass is told the length of the
   forward that it is a part of. Its modules are shown the last position of that, too, and what
   they make of it is cut off again: whatever they do with a length, it is the family's own code.
2. What a module remembers of a pass is undone after it: sessions do not mix.
3. A kind of scaling that is not known raises by name.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from blocks.errors import BlocksError
from blocks.hf.forwards import parameters_of
from blocks.hf.models import CONFIG_MAPPING, causal_class
from blocks.hf.release import Fact, check_facts

_ANY_LENGTH = frozenset({"default", "linear", "yarn", "llama3", "proportional", "ntk_alpha"})
_SWITCHING, _GROWING = "longrope", "dynamic"


@dataclass(frozen=True, slots=True)
class LengthScaling:
    """How positions are computed by the length of a text.

    They change beyond each of `switches`, and with each length beyond `grows_after`. A text that
    grows beyond `anew_after` is computed anew from its first position, as the family has it.
    """

    switches: tuple[int, ...] = ()
    grows_after: int | None = None
    anew_after: int | None = None

    def regime(self, length: int) -> int:
        """The least length whose positions are computed as those of this; 0: of short ones."""
        if self.grows_after is not None and length > self.grows_after:
            return length
        return max((switch + 1 for switch in self.switches if length > switch), default=0)

    def told(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {**asdict(self), "switches": list(self.switches)}


class Rotary:
    """The rotary modules of a model that go by length; most models have none.

    BlocksError if one of `inner`, the decoder, does so in a way that is not known.
    """

    def __init__(self, model: nn.Module, inner: nn.Module) -> None:
        found = {module: _kinds(module) for module in inner.modules() if _kinds(module)}
        self._modules = tuple(found)
        # longrope only keeps what it computed once; a recording must find that where it was
        self._fresh = {
            module: _state(module)
            for module, kinds in found.items()
            if any(_GROWING in kind for kind in kinds.values())
        }
        limits = [one for module, kinds in found.items() for one in _limits(module, kinds)]
        grown = [limit for kind, limit in limits if kind == _GROWING]
        switches = {limit for kind, limit in limits if kind == _SWITCHING}
        self.scaling = (
            LengthScaling(tuple(sorted(switches)), min(grown, default=None), _anew_after(model))
            if limits
            else None
        )

    @contextmanager
    def at(self, regime: int) -> Iterator[None]:
        """Within, positions are computed as in a forward of this regime, if they are not beyond it;
        0: by their own length.
        """
        with ExitStack() as undo:
            for module in self._modules if regime else ():
                before = partial(_with_last, regime)
                undo.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                undo.enter_context(module.register_forward_hook(_without_last, with_kwargs=True))
            try:
                yield
            finally:
                for module, state in self._fresh.items():
                    vars(module).clear()
                    vars(module).update({**state, "_buffers": dict(state["_buffers"])})

    def is_growing(self, regime: int) -> bool:
        """Has each length like this one a regime of its own?"""
        after = None if self.scaling is None else self.scaling.grows_after
        return after is not None and regime > after


def has_length_scaling(config: Any) -> bool:
    """May the rotary positions of this config go by length? Its modules tell for certain."""
    return any(_goes_by_length(one.get("rope_type")) for one in _parameters(config))


def stretched(config: Any, positions: int) -> int:
    """How long texts may be for a config that says `positions`: dynamic scaling stretches them."""
    factors = [
        one.get("factor") or 1
        for one in _parameters(config)
        if one.get("rope_type") == _GROWING and not one.get("alpha")
    ]
    return int(positions * max([1, *factors]))


def _parameters(config: Any) -> list[Mapping[str, Any]]:
    """What a config says of its rotary scalings: one, or one for each kind of layer."""
    told = getattr(config, "rope_parameters", None)
    if not isinstance(told, Mapping):
        return []
    nested = [one for one in told.values() if isinstance(one, Mapping)]
    return [told] if "rope_type" in told else nested


def _goes_by_length(kind: Any) -> bool:
    return kind == _SWITCHING or (isinstance(kind, str) and _GROWING in kind)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The scalings of a rotary module that go by length, by kind of layer where there are several.

    BlocksError for one of which that is not known.
    """
    told = getattr(module, "rope_type", None)
    kinds = told if isinstance(told, dict) else {} if told is None else {None: told}
    name = type(module).__name__
    for kind in kinds.values():
        if kind not in _ANY_LENGTH and not _goes_by_length(kind):
            raise BlocksError(
                f"{name} of the installed transformers scales positions by {kind!r}: whether that "
                "goes by the length of a text is not known here"
            )
    by_length = {layer: kind for layer, kind in kinds.items() if _goes_by_length(kind)}
    if by_length and "position_ids" not in parameters_of(module.forward):
        raise BlocksError(
            f"{name} of the installed transformers takes no position_ids, but "
            f"{', '.join(parameters_of(module.forward))}: it cannot be told the length of a text"
        )
    return by_length


def _limits(module: Any, kinds: Mapping[str | None, str]) -> Iterator[tuple[str, int]]:
    for layer, kind in kinds.items():
        told = module.config.rope_parameters
        own = told if layer is None else told[layer]
        if kind == _SWITCHING:
            yield _SWITCHING, own["original_max_position_embeddings"]
        else:
            yield _GROWING, module.config.max_position_embeddings


def _anew_after(model: nn.Module) -> int | None:
    """Beyond what length the model's `generate` drops its cache; None: it never does."""
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    source = inspect.getsource(inspect.unwrap(prepare)) if prepare is not None else ""
    if "original_max_position_embeddings" not in source:
        return None
    return getattr(model.config, "original_max_position_embeddings", None)


def _are_found() -> bool:
    """Are the modules of both kinds found, and what they go by?"""
    scaled: dict[str, dict[str, Any]] = {
        "phi3": {"rope_type": _SWITCHING, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        "llama": {"rope_type": _GROWING, "factor": 2.0},
    }
    found = []
    for model_type, rope in scaled.items():
        rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 4}
        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
        config = CONFIG_MAPPING[model_type](
            **sizes,
            num_hidden_layers=1,
            intermediate_size=8,
            vocab_size=8,
            pad_token_id=0,
            max_position_embeddings=8,
            original_max_position_embeddings=4,
            rope_parameters=rope,
        )
        model = causal_class(config)(config)
        found.append((has_length_scaling(config), Rotary(model, model.model).scaling))
    return found == [
        (True, LengthScaling(switches=(4,), anew_after=4)),
        (True, LengthScaling(grows_after=8)),
    ]


FACTS = (Fact("rotary modules tell by which length they scale positions", _are_found),)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    check_facts(FACTS)


def _state(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), "_buffers": dict(module._buffers)}


def _bound(module: nn.Module, args: Any, named: Any) -> inspect.BoundArguments:
    return inspect.signature(module.forward).bind(*args, **named)


def _with_last(
    length: int, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = _bound(module, args, named)
    positions = bound.arguments["position_ids"]
    last = positions.new_full((*positions.shape[:-1], 1), length - 1)
    bound.arguments["position_ids"] = torch.cat([positions, last], dim=-1)
    return bound.args, bound.kwargs


def _without_last(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
) -> Any:
    count = _bound(module, args, named).arguments["position_ids"].shape[-1]
    tables = output if isinstance(output, tuple) else (output,)
    if any(table.dim() < 2 or table.shape[-2] != count for table in tables):
        raise BlocksError(f"{type(module).__name__} gives no table of {count} positions")
    cut = tuple(table[..., :-1, :] for table in tables)
    return cut if isinstance(output, tuple) else cut[0]
