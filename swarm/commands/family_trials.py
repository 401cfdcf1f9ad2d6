"""The work of `swarm doctor families`: try, tell, and write the table and the list."""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from blocks.hf.release import model_types
from blocks.matrix import LIMIT_SECONDS, Request, examine_all
from blocks.report import CHECKS, EXACT, ROUNDING, Check, Family, counts
from swarm.errors import BadInput

_LIBRARIES = ("transformers", "torch", "safetensors")

# Why families cannot be cut as they are, where the trial alone shows only that they cannot.
_CAUSES = {
    "blt": "three models in one, of which one cuts the text into patches",
    "cpmant": "it puts a prompt of its own before the text, so that positions are not the text's",
    "dory": "it goes through some of its layers several times",
    "gemma3n": "its vision part asks for more libraries, even for text; the text part alone serves",
    "gemma4_assistant": "it drafts for another model and takes that model's hidden states",
    "gemma4_unified_assistant": "it drafts for another model and takes that model's hidden states",
    "hrm_text": "it goes through its layers several times",
    "inkling2_loop_text": "it goes through some of its layers several times",
    "inkling2_text": "a history of blocks goes from layer to layer",
    "longcat_flash": "each of its layers counts for two",
    "minimax": "it wants a cache of its own kind",
    "openai-gpt": "it keeps no cache: every step is computed from the whole text",
    "qwen4_exp": "streams go from layer to layer as one wide axis",
    "qwen4_exp_text": "streams go from layer to layer as one wide axis",
    "recurrent_gemma": "it keeps the state of a session in the model, so that sessions mix",
    "reformer": "its layers are reversible and hash positions, with a cache of their own",
    "rwkv": "its state goes from layer to layer as a list of its own",
    "xlm": "it runs several lists side by side, of which none is a layer",
    "xlnet": "it puts positions before rows",
    "xlstm": "it wants a cache of its own kind",
}
_CAUSES_BY_REASON = (
    ("from its own single forward", "transformers loses part of the past when a prompt is cut"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySettings:
    """What to try and where to write. `only` empty: all; `table`, `proven` None: nowhere."""

    only: tuple[str, ...] = ()
    table: Path | None = None
    proven: Path | None = None
    limit_seconds: float = LIMIT_SECONDS


def run_families(
    settings: FamilySettings, show: Callable[[Family], None], note: Callable[[str], None]
) -> tuple[str, ...]:
    """Try the families, `show` each as it ends, write what is to be written.

    Returns the types that the package's list takes for proven and that failed. BadInput for a type
    that transformers does not know.
    """
    from blocks.proven import listed, minor, with_families

    known = model_types()
    unknown = [name for name in settings.only if name not in known]
    if unknown:
        raise BadInput(
            f"the installed transformers has no causal language model of type {unknown[0]}",
            next_step="name types as config.json does, in model_type",
        )
    for path in (settings.table, settings.proven):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise BadInput(f"{path} cannot be written", next_step="name a file in a folder")
    before = _listed_in(settings.proven)
    requests = [Request(name) for name in settings.only or known]
    found = examine_all(requests, limit_seconds=settings.limit_seconds, on_done=show)
    note(summary(found))
    version = metadata.version("transformers")
    merged = with_families(before if settings.proven else listed(), version, found)
    if settings.table is not None:
        settings.table.write_text(table_of(found, libraries(), merged), encoding="utf-8")
        note(f"wrote {settings.table}")
    if settings.proven is not None:
        settings.proven.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        note(f"wrote {settings.proven}")
    lost = lost_types(listed().get(minor(version), {}), found)
    for name in lost:
        note(f"{name} is listed as proven and failed")
    return lost


def _listed_in(path: Path | None) -> dict[str, Any]:
    """The list in this file; empty if there is none. BadInput if it is no list of proven types."""
    if path is None or not path.exists():
        return {}
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    if not isinstance(listed, dict):
        raise BadInput(f"{path} is no list of proven types", next_step="name another file")
    return listed


def lost_types(listed: Mapping[str, Any], found: Sequence[Family]) -> tuple[str, ...]:
    """The types that a list takes for proven and that failed now."""
    return tuple(
        family.model_type
        for family in found
        if not family.is_serving and listed.get(family.model_type, {}).get("serving")
    )


def libraries() -> dict[str, str]:
    """The versions that the result depends on."""
    return {"Python": platform.python_version()} | {
        name: metadata.version(name) for name in _LIBRARIES
    }


def summary(found: Sequence[Family]) -> str:
    """How many hold what, in one line."""
    number = counts(found)
    return (
        f"{number['families']} families: {number['exact']} exact in all that they offer, "
        f"{number['serving']} exact for serving; "
        + ", ".join(f"{name} {number[name]}" for name in CHECKS)
    )


def line_of(family: Family) -> str:
    """One family for a person: the type, a word, the largest difference or the reason."""
    word = "exact" if family.is_exact else "serves" if family.is_serving else "no"
    told = (
        f"largest difference {_number(family.max_difference)}"
        if family.is_exact
        else reason_of(family)
    )
    return f"{family.model_type:<26}{word:<8}{told}"


def reason_of(family: Family) -> str:
    """What failed, and the cause where it is known."""
    if family.is_serving:
        return family.reason
    cause = _CAUSES.get(family.model_type) or next(
        (cause for words, cause in _CAUSES_BY_REASON if words in family.reason), None
    )
    return f"{family.reason} ({cause})" if cause else family.reason


def table_of(
    found: Sequence[Family],
    versions: Mapping[str, str],
    listed: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """The page docs/families.md, with a section for each other release that is listed."""
    number = counts(found)
    serving = [family for family in found if family.is_serving]
    others = [family for family in found if not family.is_serving]
    lines = [
        "# Families",
        "",
        "Generated by `swarm doctor families`; do not edit. Libraries: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", on {platform.machine()}, float32, one thread.",
        "",
        *_DEFINITIONS,
        "",
        f"Of {number['families']} model types, {number['serving']} are exact for serving, "
        f"{number['exact']} of them in everything they offer. Each check by itself: "
        + ", ".join(f"{name} {number[name]}" for name in CHECKS)
        + ".",
        "",
        f"## Exact for serving ({len(serving)})",
        "",
        "| model type | " + " | ".join(CHECKS) + " | remarks |",
        "| --- |" + " --- |" * (len(CHECKS) + 1),
        *(_row(family) for family in serving),
        "",
        f"## Not proven ({len(others)})",
        "",
        "| model type | holds | why not |",
        "| --- | --- | --- |",
        *(_other_row(family) for family in others),
        "",
        *_releases_section(found, versions["transformers"], listed),
    ]
    return "\n".join(lines)


def _releases_section(
    found: Sequence[Family], version: str, listed: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """What differs with each other release: the list says what holds there."""
    here = {family.model_type: family.is_serving for family in found}
    for release, types in listed.items():
        if version.startswith(f"{release}."):
            continue
        there = {name: facts["serving"] for name, facts in types.items()}
        differing = {
            "Exact there and not above": [n for n in there if there[n] and here.get(n) is False],
            "Exact above and not there": [n for n in there if not there[n] and here.get(n)],
            "Not known there": [name for name in here if name not in there],
        }
        yield f"## With transformers {release}"
        yield ""
        yield f"Of {len(there)} model types, {sum(there.values())} are exact for serving."
        for said, names in differing.items():
            yield f"{said}: {', '.join(names) or 'none'}."
        yield ""


_DEFINITIONS = (
    "Every configuration for which transformers has a causal language model is made tiny: 6",
    "layers, windows shorter than the texts, random weights, norms and biases among them. The",
    "saved model is cut in three stacks with ends at both sides, each loaded by itself with the",
    "code that serves, and compared with the whole model of transformers on the same ids in the",
    "same chunks. What is tried is the default configuration of a type (a few that leave out the",
    "very thing the type is for are told it); of a type or version that is not listed, a server",
    "tries its checkpoint's own configuration once, before it serves.",
    "Where positions go by the length of a text (longrope, dynamic scaling) it is crossed: decode",
    "grows beyond it, chunked begins beyond it, and joined has texts on both sides. They are",
    "compared with what `generate` computes: a prompt in one forward, and all anew where the",
    "family drops its cache. Types whose checkpoints scale so, though the default does not, are",
    "told to.",
    "Decoders of encoder-decoder models are tried alone, without what an encoder says; composites",
    "of text and vision are saved whole and serve their text part.",
    "",
    "| column | compared |",
    "| --- | --- |",
    "| forward | ids → logits of two rows in one go |",
    "| decode | a prefill in one go, then one position at a time from the caches |",
    "| chunked | a prefill in two chunks, then one position at a time |",
    "| interleaved | two sessions step by step in turn |",
    "| batch | two texts of different lengths, padded on the left; prefill and decode |",
    "| gradient | of a random loss in the last block's output, in the first block's input |",
    "| joined | decode steps of three sessions of different lengths as one batch, each as alone |",
    "| rollback | another text from a position that was passed |",
    "",
    f"A number is the largest absolute difference of a logit; a check holds below {EXACT:.0e}.",
    "Those of gradient and joined are parts of the largest value and hold below",
    f"{ROUNDING:.0e}, as sums are formed in another order there. A dash is not offered: the",
    "code refuses it for this family, and the remark says why. **no** fails. Decode and",
    "chunked also fail where transformers' own run of that kind is not what its own single",
    "forward gives; where it forgets a state unless positions come one by one, they come so in",
    "the run that is compared with. *Exact for serving*: forward, decode, chunked and interleaved",
    "hold.",
    "*Exact in everything*: and none of the other four fails.",
)


def _row(family: Family) -> str:
    cells = " | ".join(_cell(family, name) for name in CHECKS)
    remarks = "; ".join(part for part in (reason_of(family), family.notes) if part)
    return f"| {family.model_type} | {cells} | {_safe(remarks)} |"


def _other_row(family: Family) -> str:
    held = ", ".join(check.name for check in family.checks if check.outcome == "holds") or "-"
    return f"| {family.model_type} | {held} | {_safe(reason_of(family))} |"


def _cell(family: Family, name: str) -> str:
    check: Check | None = next((one for one in family.checks if one.name == name), None)
    if check is None:
        return "not judged"
    if check.outcome == "not offered":
        return "-"
    return _number(check.difference) if check.outcome == "holds" else "**no**"


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return "0" if value == 0 else f"{value:.0e}"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
