"""What a family's forward calls its arguments, and what it does with them.

| fact | releases |
| --- | --- |
| scans of several positions begin anew in mamba, falcon_mamba, jamba and zamba | until 5.24 |
| the cache is `past_key_values`, in a few recurrent families `cache_params` | until 5.23 |
| it is `cache`; a decorator renames the old names until 5.40 | from 5.24 |
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_origin

from blocks.errors import BlocksError

# The newest first: a decorator may take an old name beside the one that the signature shows.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


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
        f"{type(inner).__name__} of the installed transformers takes no cache by a name known "
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
