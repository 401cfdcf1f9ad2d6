"""Which model types are known to compute the same when cut, and what to do about the others.

The list goes with the package, keyed by transformers' minor version: a minor release may rewrite
any family. `swarm doctor families` makes it; nobody edits it by hand.

1. A type is proven only by a trial: in the list for the installed minor version, or one made here.
2. A type that failed its trial is not tried again with the same minor version.
3. What is in no list is tried once per machine: the verdict is kept for this very code, config and
   these releases. A damaged one is none; a crash or a trial that ran out of time is not kept.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from blocks.checkpoint import Checkpoint
from blocks.matrix import LIMIT_SECONDS, Request, examine_all
from blocks.report import CHECKS, SERVING, Family

log = logging.getLogger(__name__)

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
        sentence = (
            f"transformers {release} is untested: it is not among the releases that this version "
            f"was tried with ({', '.join(known)})"
        )
        return Verdict(False, sentence, is_tested=False)
    if model_type not in known[release]:
        sentence = f"model type {model_type} is untested with transformers {release}"
        return Verdict(False, sentence, is_tested=False)
    return _verdict_of_facts(model_type, release, known[release][model_type])


def check_type(checkpoint: Checkpoint, *, limit_seconds: float = LIMIT_SECONDS) -> Verdict:
    """Try the checkpoint's own type, on a tiny model with the structure of its config.

    Takes some seconds and a process of its own; no weight of the checkpoint is read.
    """
    return verdict_of_family(_tried(checkpoint, limit_seconds), metadata.version("transformers"))


def verdict_of_family(family: Family, version: str) -> Verdict:
    """What a trial just made says."""
    return _verdict_of_facts(family.model_type, minor(version), facts_of(family))


def verdict_for(checkpoint: Checkpoint, folder: Path | None = None) -> Verdict:
    """May this checkpoint be served without `--unproven`? Where the list is silent, tries it.

    A verdict kept in the folder is taken, and a new one is kept there if the disk takes it.
    """
    model_type, version = str(checkpoint.config.model_type), metadata.version("transformers")
    verdict = proven(model_type, version)
    if verdict.is_tested:
        return verdict
    if folder is not None and (kept := kept_verdict(checkpoint, folder)) is not None:
        return kept
    family = _tried(checkpoint, LIMIT_SECONDS)
    if folder is not None and not family.trouble:
        _keep(_place(checkpoint, folder), facts_of(family))
    return _with_reason(verdict, verdict_of_family(family, version))


def kept_verdict(checkpoint: Checkpoint, folder: Path) -> Verdict | None:
    """What an earlier trial on this machine said, of what is in no list; None if there was none."""
    try:
        facts = json.loads(_place(checkpoint, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not _are_facts(facts):
        return None
    model_type, version = str(checkpoint.config.model_type), metadata.version("transformers")
    tried = _verdict_of_facts(model_type, minor(version), facts)
    return _with_reason(proven(model_type, version), tried, " (tried before on this machine)")


def _with_reason(unlisted: Verdict, tried: Verdict, when: str = "") -> Verdict:
    sentence = f"{unlisted.sentence}; {tried.sentence}{when}"
    return Verdict(tried.is_proven, sentence, True, tried.holds)


def _tried(checkpoint: Checkpoint, limit_seconds: float) -> Family:
    request = Request(str(checkpoint.config.model_type), checkpoint.config.to_dict())
    (family,) = examine_all([request], limit_seconds=limit_seconds)
    return family


def _place(checkpoint: Checkpoint, folder: Path) -> Path:
    """Where the verdict is kept for this config, these releases, and the code that cuts."""
    config = {**checkpoint.config.to_dict(), "_name_or_path": ""}
    releases = [metadata.version(name) for name in ("transformers", "torch")]
    facts = json.dumps([releases, _code(), config], sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"


@functools.cache
def _code() -> str:
    """A digest of this package's code: with other code a type may compute otherwise."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _keep(place: Path, facts: Mapping[str, Any]) -> None:
    fresh = place.with_suffix(f".{os.getpid()}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(facts), encoding="utf-8")
        fresh.replace(place)
    except OSError as error:
        log.info("the verdict cannot be kept: %s", error)


def _are_facts(facts: Any) -> bool:
    """Is this what `facts_of` gives, of a trial that came to its end?"""
    return (
        isinstance(facts, dict)
        and isinstance(facts.get("reason"), str)
        and isinstance(holds := facts.get("holds"), list)
        and all(name in CHECKS for name in holds)
        and facts.get("serving") is all(name in holds for name in SERVING)
    )


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


def _verdict_of_facts(model_type: str, release: str, facts: Mapping[str, Any]) -> Verdict:
    if facts["serving"]:
        sentence = (
            f"model type {model_type} computes the same when cut, with transformers {release}"
        )
    else:
        sentence = (
            f"model type {model_type} fails its test with transformers {release} "
            f"({facts['reason'] or 'it was not done'})"
        )
    return Verdict(facts["serving"], sentence, True, frozenset(facts["holds"]))
