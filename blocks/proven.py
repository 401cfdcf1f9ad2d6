"""Which model types are known to compute the same when cut, and what to do about the others.

The list goes with the package, keyed by transformers' minor version: a minor release may rewrite
any family. `swarm doctor families` makes it; nobody edits it by hand.

1. A type is proven only by a trial: in the list for the installed minor version, or just now.
2. A type that failed its trial is not tried again with the same minor version.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from blocks.checkpoint import Checkpoint
from blocks.matrix import LIMIT_SECONDS, Request, examine_all
from blocks.report import Family

LIST_FILE = "proven.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """May a type be served? `sentence` says why; `holds` names the checks that held.

    `is_tested` is False where the list knows nothing, neither good nor bad.
    """

    is_proven: bool
    sentence: str
    is_tested: bool = True
    holds: frozenset[str] = frozenset()


def minor(version: str) -> str:
    """The minor version, as "5.23" of "5.23.0"."""
    return ".".join(version.split(".")[:2])


def listed() -> dict[str, dict[str, Any]]:
    """What the package's list says: minor version → model type → what held, and why not more."""
    text = resources.files("blocks").joinpath(LIST_FILE).read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


@functools.cache
def _listed_once() -> Mapping[str, Mapping[str, Any]]:
    return listed()


def proven(model_type: str, version: str) -> Verdict:
    """What the list says of a model type with that version of transformers."""
    return verdict_of(_listed_once(), model_type, version)


def verdict_of(known: Mapping[str, Mapping[str, Any]], model_type: str, version: str) -> Verdict:
    """What a list says of a model type with that version of transformers."""
    release = minor(version)
    if release not in known:
        return Verdict(False, f"transformers {release} is untested", is_tested=False)
    if model_type not in known[release]:
        sentence = f"model type {model_type} is untested with transformers {release}"
        return Verdict(False, sentence, is_tested=False)
    facts = known[release][model_type]
    return _verdict(model_type, release, facts["serving"], facts["holds"], facts["reason"])


def check_type(checkpoint: Checkpoint, *, limit_seconds: float = LIMIT_SECONDS) -> Verdict:
    """Try the checkpoint's own type, on a tiny model with the structure of its config.

    Takes some seconds and a process of its own; no weight of the checkpoint is read.
    """
    model_type = str(checkpoint.config.model_type)
    request = Request(model_type, checkpoint.config.to_dict())
    (family,) = examine_all([request], limit_seconds=limit_seconds)
    return verdict_of_family(family, metadata.version("transformers"))


def verdict_of_family(family: Family, version: str) -> Verdict:
    """What a trial just made says."""
    facts = facts_of(family)
    return _verdict(
        family.model_type, minor(version), facts["serving"], facts["holds"], facts["reason"]
    )


def verdict_for(checkpoint: Checkpoint) -> Verdict:
    """May this checkpoint be served without `--unproven`? Where the list is silent, tries it."""
    verdict = proven(str(checkpoint.config.model_type), metadata.version("transformers"))
    if verdict.is_tested:
        return verdict
    tried = check_type(checkpoint)
    return Verdict(tried.is_proven, f"{verdict.sentence}: {tried.sentence}", True, tried.holds)


def known_takes(model_type: str) -> str:
    """What the list says that a type's forwards take in the installed release; empty if nothing."""
    types = _listed_once().get(minor(metadata.version("transformers")), {})
    return str(types.get(model_type, {}).get("takes", ""))


def facts_of(family: Family) -> dict[str, Any]:
    """What the list keeps of a family."""
    return {
        "serving": family.is_serving,
        "holds": [check.name for check in family.checks if check.outcome == "holds"],
        "reason": family.reason,
        "takes": family.takes,
    }


def with_families(
    known: Mapping[str, Mapping[str, Any]], version: str, families: Sequence[Family]
) -> dict[str, dict[str, Any]]:
    """The list with these families' facts in place of older ones of the same minor version."""
    merged = {release: dict(types) for release, types in known.items()}
    own = merged.setdefault(minor(version), {})
    own.update({family.model_type: facts_of(family) for family in families})
    merged[minor(version)] = dict(sorted(own.items()))
    return merged


def _verdict(
    model_type: str, release: str, is_serving: bool, holds: Sequence[str], reason: str
) -> Verdict:
    if is_serving:
        sentence = (
            f"model type {model_type} computes the same when cut, with transformers {release}"
        )
    else:
        sentence = (
            f"model type {model_type} fails its test with transformers {release} "
            f"({reason or 'it was not done'})"
        )
    return Verdict(is_serving, sentence, True, frozenset(holds))
