"""What a checkpoint's own files say of how transformers' `generate` is to choose, checked.

1. Settings stand in generation_config.json; without it, or if it is no JSON, in config.json and its
   text part: the files' own words, not the defaults of a config class.
2. A value that cannot be used counts as absent and is noted by file and field.
3. What `generate` would heed and nobody heeds here is noted by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from blocks.errors import CheckpointError

FILE = "generation_config.json"
LEAST_TOP_P = 1e-9  # transformers' top_p 0 keeps the likeliest id alone

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Ids = Annotated[list[int], msgspec.Meta(max_length=1 << 16)]
_Bias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Many = msgspec.Meta(min_length=1, max_length=1 << 14)
_ID_LISTS: Mapping[str, Any] = {  # a number is a list of one; ids beyond the vocabulary never come
    "eos_token_id": int | _Ids,
    "suppress_tokens": _Ids,
    "begin_suppress_tokens": _Ids,
    "forced_eos_token_id": int | _Ids,
}
_SAMPLING: Mapping[str, Any] = {
    "do_sample": bool,
    "temperature": Annotated[float, msgspec.Meta(ge=0, le=1e6)],
    "top_k": Annotated[int, msgspec.Meta(ge=0, le=1 << 20)],
    "top_p": Annotated[float, msgspec.Meta(ge=0, le=1)],
    "min_p": Annotated[float, msgspec.Meta(ge=0, le=1)],
    "repetition_penalty": Annotated[float, msgspec.Meta(gt=0, le=1e6)],
}
_RULES: Mapping[str, Any] = {
    "bad_words_ids": Annotated[list[Annotated[list[_Id], _Many]], _Many],
    "sequence_bias": Annotated[list[tuple[Annotated[list[_Id], _Many], _Bias]], _Many],
    "no_repeat_ngram_size": _Count,
    "encoder_no_repeat_ngram_size": _Count,
    "min_length": _Count,
    "min_new_tokens": _Count,
    "forced_bos_token_id": _Id,
}
_OTHERS: Mapping[str, Any] = {"bos_token_id": _Id, "stop_strings": str | list[str]}
_TYPES = {**_ID_LISTS, **_SAMPLING, **_RULES, **_OTHERS}
_UNHEEDED: Mapping[str, Any] = {  # with the values that change nothing
    "max_length": 20,
    "max_new_tokens": None,
    "max_time": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "penalty_alpha": 0,
    "diversity_penalty": 0,
    "constraints": None,
    "force_words_ids": None,
    "dola_layers": None,
    "token_healing": False,
    "watermarking_config": None,
}


@dataclass(frozen=True, slots=True)
class Generation:
    """The settings, as a model's card holds them, and what the one who serves it should know."""

    end_ids: list[int]
    begin_id: int | None
    settings: dict[str, Any]
    notes: tuple[str, ...]


def read_generation(folder: Path, vocabulary: int) -> Generation:
    """Return what the files in `folder` say of a model of so many ids. CheckpointError for a
    generation config that transformers could not take either.
    """
    told, file, notes = _told(folder)
    wrong: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name, kind in _TYPES.items():
        if told.get(name) is None:
            continue
        try:
            found[name] = msgspec.convert(told[name], kind)
        except msgspec.ValidationError:
            wrong[name] = told[name]
    for name in _ID_LISTS.keys() & found.keys():
        ids = found[name] if isinstance(found[name], list) else [found[name]]
        found[name] = [token for token in ids if 0 <= token < vocabulary]
        if len(found[name]) < len(ids):
            wrong[name] = told[name]
    for name, ids_of in (("bad_words_ids", list), ("sequence_bias", lambda pair: pair[0])):
        kept = [each for each in found.get(name, ()) if max(ids_of(each)) < vocabulary]
        if len(kept) < len(found.get(name, ())):
            found[name], wrong[name] = kept, told[name]
    if found.get("forced_bos_token_id", 0) >= vocabulary:
        wrong["forced_bos_token_id"] = found.pop("forced_bos_token_id")
    if wrong:
        values = ", ".join(f"{name} {str(value)[:40]}" for name, value in sorted(wrong.items()))
        notes.append(f"{file} holds what cannot be used and counts as absent: {values}")
    unheeded = [name for name, idle in _UNHEEDED.items() if told.get(name) not in (None, idle)]
    if unheeded:
        notes.append(f"{file} holds what is not heeded here: {', '.join(unheeded)}")
    return Generation(
        end_ids=found.get("eos_token_id", []),
        begin_id=found.get("bos_token_id"),
        settings=_settings(found),
        notes=tuple(notes),
    )


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from saying nothing, so that equal models have equal cards."""
    settings = {name: found[name] for name in _SAMPLING if name in found}
    if settings.get("top_p") == 0:
        settings["top_p"] = LEAST_TOP_P
    stops = found.get("stop_strings", [])
    stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    ruled = (_ID_LISTS.keys() | _RULES.keys()) - {"eos_token_id"}
    rules = {name: found[name] for name in sorted(ruled & found.keys())}
    if "min_new_tokens" in rules:  # of the two it is the one that counts
        rules.pop("min_length", None)
    idle = {name for name in rules.keys() - {"forced_bos_token_id"} if not rules[name]}
    extra = {"rules": {name: rules[name] for name in rules.keys() - idle}, "stop_strings": stops}
    return settings | {name: value for name, value in extra.items() if value}


def _told(folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """The fields, the file that they stand in, and what is wrong with the other one."""
    notes = []
    if (folder / FILE).is_file():
        try:
            told = json.loads((folder / FILE).read_text("utf-8"))
        except (ValueError, RecursionError):
            notes.append(f"{FILE} is not JSON: as in transformers config.json counts instead")
        else:
            if not isinstance(told, dict):
                raise CheckpointError(f"{folder / FILE} is not a JSON object; fetch it again")
            return told, FILE, notes
    whole = json.loads((folder / "config.json").read_text("utf-8"))
    parts = (whole.get(name) for name in ("decoder", "generator", "text_config"))
    text: Any = next((part for part in parts if part), {})
    given = {name: value for name, value in whole.items() if value is not None}
    return {**(text if isinstance(text, dict) else {}), **given}, "config.json", notes
