"""What a family's forward calls its arguments, and what it does with them.

| fact | releases |
| --- | --- |
| scans of several positions begin anew in mamba, falcon_mamba, jamba and zamba | until 5.24 |
| the cache is `past_key_values`, in a few recurrent families `cache_params` | until 5.23 |
| it is `cache`; a decorator renames the old names until 5.40 | from 5.24 |
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_origin

from blocks.errors import BlocksError
from blocks.hf.models import tiny_model
from blocks.hf.release import Fact, check_facts, unsupported, version

# The newest first: a decorator may take an old name beside the one that the signature shows.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")

# What a step gives a family's forward. Some families take no position_ids or mask: the trial of a
# type sees whether they need none, and `takes_of` whether a release has renamed one.
_STANDARD = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a forward as its own source names them."""
    return inspect.signature(function).parameters


def cache_argument(inner: Any) -> str:
    """By what name the forward of a module takes the session's cache.

    BlocksError, naming what it does take, if by none that is known: a session whose cache were
    left out would lose its past.
    """
    parameters = parameters_of(inner.forward)
    for name in CACHE_NAMES:
        if name in parameters and not _is_mapping(parameters[name].annotation):
            return name
    raise BlocksError(
        f"{type(inner).__name__} of transformers {version()} takes no cache by a name known "
        f"here ({', '.join(CACHE_NAMES)}), but {', '.join(parameters)}"
    )


def forgets_state(source: str) -> bool:
    """Does a layer's part, by the source of its forward, use its recurrent state for one position
    only? A later chunk of a prompt is then computed as if nothing went before.
    """
    return (
        "recurrent_state is not None and seq_len == 1" in source and "initial_state" not in source
    )


def _is_mapping(annotation: Any) -> bool:
    """xlm has a `cache` of its own, a dict of tensors."""
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return any("dict[" in str(kind) or get_origin(kind) is dict for kind in kinds)


def takes_of(kinds: Iterable[type]) -> str:
    """What the forwards of these classes take, as the list of proven types keeps it.

    A release that renames an argument of one, or changes a plain default, has another text.
    """
    return "; ".join(map(_signature, kinds))


def _signature(kind: type) -> str:
    words = [kind.__name__]
    for one in list(parameters_of(kind.forward).values())[1:]:  # type: ignore[attr-defined]
        plain = one.default is None or isinstance(one.default, bool | int | float | str)
        words.append(f"{one.name}={one.default!r}" if plain else one.name)
    return " ".join(words)


def check_takes(takes: str, known: str) -> None:
    """Unsupported if one of these forwards takes something else than it is known to.

    Of a class that is not known, as a checkpoint may have other kinds of layers, nothing is asked.
    """
    listed = {one.partition(" ")[0]: one.split() for one in known.split("; ")}
    for name, *after in (one.split() for one in takes.split("; ")):
        _, *before = listed.get(name, [name, *after])
        if before != after:
            gone = ", ".join(word for word in before if word not in after) or "another order"
            new = ", ".join(word for word in after if word not in before) or "nothing"
            raise unsupported(f"{name}.forward takes {new} in the place of {gone}")


def _llama_takes_all() -> bool:
    model = tiny_model()
    cache_argument(model.model)
    taken = parameters_of(model.model.forward)
    return all(name in taken for name in _STANDARD) and (
        parameters_of(model.forward)["logits_to_keep"].default == 0
    )


FACTS = (
    Fact(
        f"the forward of llama takes {', '.join(_STANDARD)}, a cache and logits_to_keep=0",
        _llama_takes_all,
    ),
)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    check_facts(FACTS)
