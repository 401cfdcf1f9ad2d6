"""Is the installed transformers as it is known here?

1. What has moved or is gone is told by name, not shown as a traceback.
2. Each callable of which arguments are given by name has here the parameters relied on, with their
   defaults where those matter. A release that drops or renames one is told before it is used.
3. What no signature shows is tried: a fact of a line, of some milliseconds, each with a sentence.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from blocks.errors import Unsupported

NEXT_STEP = "install a release that was tried: pip install '{requirement}'"


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that releases known here do. `is_so` takes milliseconds; what it raises is no."""

    sentence: str
    is_so: Callable[[], bool]


@functools.cache
def version() -> str:
    """The version of the installed transformers."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("transformers")
    return "(not installed)"


@functools.cache
def requirement() -> str:
    """Which releases were tried, as pip takes it."""
    with suppress(metadata.PackageNotFoundError):
        needed = metadata.requires("swarm-llm") or ()
        return next((one for one in needed if one.startswith("transformers")), "transformers")
    return "transformers"


def unsupported(what: str) -> Unsupported:
    """The error for something that is not as known."""
    return Unsupported(
        f"transformers {version()} is not as known here: {what}; "
        + NEXT_STEP.format(requirement=requirement())
    )


def moved(error: ImportError) -> Unsupported | None:
    """The error for something of transformers that is not where it is looked for, if that it is."""
    if not (error.name or "").startswith("transformers"):
        return None
    return unsupported(str(error).partition(" (")[0])


def model_types() -> tuple[str, ...]:
    """Every type for which the installed transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


@contextmanager
def as_known(what: str) -> Iterator[None]:
    """Within, an error that only another interface than the known one can raise is Unsupported."""
    try:
        yield
    except (TypeError, AttributeError, ImportError, NameError) as error:
        raise unsupported(f"{what} ends with {type(error).__name__}: {error}") from error


def check_parameters(where: str, function: Callable[..., Any], known: Mapping[str, Any]) -> None:
    """Unsupported unless the function takes these parameters, each with this default.

    `inspect.Parameter.empty` stands for none, Ellipsis for one that does not matter.
    """
    found = inspect.signature(function).parameters
    for name, default in known.items():
        if name not in found:
            raise unsupported(f"{where} takes no {name}, but {', '.join(found)}")
        if default is not ... and found[name].default != default:
            raise unsupported(
                f"{where} has {found[name].default!r} as the default of {name}, not {default!r}"
            )


def check_facts(facts: Iterable[Fact]) -> None:
    """Unsupported for the first that is not so."""
    for fact in facts:
        try:
            reason = "" if fact.is_so() else "it does not"
        except Exception as error:  # noqa: BLE001  # whatever another release raises is the answer
            reason = f"{type(error).__name__}: {error}"
        if reason:
            raise unsupported(f"{fact.sentence} ({reason})")


@functools.cache
def check() -> None:
    """Unsupported, naming it, for the first thing that is not as known. Once a process."""
    modules = [
        import_module(f"blocks.hf.{name}")
        for name in ("models", "forwards", "caches", "attention", "rotary", "loading", "quantizing")
    ]
    with import_module("blocks.hf.loading").quiet():
        for module in modules:
            module.check()
