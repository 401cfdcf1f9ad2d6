"""Tool calls in what a model says: read as the text comes. Pure.

Two forms are known. Hermes' and Qwen's: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any
number, text between them. Llama's: the whole answer is `{"name": …, "parameters": {…}}`, several of
them parted by semicolons, after `<|python_tag|>` or nothing.

1. What is no call of a known tool is text, to the letter.
2. A call is told whole, once it is whole.
3. The arguments told are an object in JSON that any parser takes and UTF-8 can hold: a lone
   surrogate is U+FFFD, and a number that JSON has not is null.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from swarm.text import UNKNOWN_CHARACTER

_BEGIN, _END = "<tool_call>", "</tool_call>"
_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Call:
    """A tool called. `arguments` is JSON as text."""

    name: str
    arguments: str
    id: str


class ToolReader:
    """Parts what a model says into text and calls; those beyond `most` are left out."""

    def __init__(self, names: Collection[str], most: float = math.inf) -> None:
        self._names = frozenset(names)
        self._left = most
        self._held = ""
        self._is_bare: bool | None = None  # Llama's form; None: too early to tell
        self._is_in_call = False

    def feed(self, text: str) -> Iterator[str | Call]:
        """Take text; give what is certain."""
        self._held += text
        if self._is_bare is None:
            self._look_at_start()
        if self._is_bare is False:
            yield from self._parted()

    def finish(self) -> Iterator[str | Call]:
        """Give the rest: the answer is whole."""
        rest, self._held = self._held, ""
        if self._is_in_call:  # it ended without the closing mark
            yield from self._told(rest, _BEGIN + rest)
        elif rest and self._is_bare:
            yield from self._told(rest.strip().removeprefix(_TAG), rest)
        elif rest:
            yield rest

    def _look_at_start(self) -> None:
        start = self._held.lstrip()
        if start.startswith(("{", _TAG)):
            self._is_bare = True
        elif start and not _TAG.startswith(start):
            self._is_bare = False

    def _parted(self) -> Iterator[str | Call]:
        while True:
            mark = _END if self._is_in_call else _BEGIN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            self._held = after
            if self._is_in_call:
                yield from self._told(before, _BEGIN + before + _END)
            elif before.strip():
                yield before.rstrip()
            self._is_in_call = not self._is_in_call
        if not self._is_in_call:
            certain = len(self._held) - overlap(self._held, _BEGIN)
            # White space may lead to a call, of which it is no part.
            certain = min(certain, len(self._held[:certain].rstrip()))
            text, self._held = self._held[:certain], self._held[certain:]
            if text:
                yield text

    def _told(self, text: str, otherwise: str) -> Iterator[str | Call]:
        """The calls that a text holds; if it holds none, that other text."""
        calls = self._calls(text)
        if not calls:
            yield otherwise
        for call in calls:
            if self._left > 0:
                self._left -= 1
                yield call

    def _calls(self, text: str) -> list[Call]:
        """Read calls parted by semicolons; none if any of it is something else."""
        calls: list[Call] = []
        rest = text.strip()
        while rest:
            try:
                value, end = _DECODER.raw_decode(rest)
                name = value.get("name") if isinstance(value, dict) else None
                given = value.get("arguments", value.get("parameters", {})) if name else None
                arguments = _object_text(given)
            except (ValueError, RecursionError):
                return []
            if not isinstance(name, str) or name not in self._names or arguments is None:
                return []
            calls.append(Call(name, arguments, f"call_{uuid4().hex[:24]}"))
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
        return calls


class PlainReader:
    """Takes all for text."""

    def feed(self, text: str) -> Iterator[str | Call]:
        """Give the text."""
        if text:
            yield text

    def finish(self) -> Iterator[str | Call]:
        """Nothing is held back."""
        yield from ()


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of an old call; none if they are no object, as when the model was cut off."""
    try:
        arguments: dict[str, Any] = json.loads(_object_text(text) or "{}")
    except (ValueError, RecursionError):
        return {}
    return arguments


def _object_text(given: object) -> str | None:
    """An object, or the one that a text holds, as JSON; None for what is none. ValueError or
    RecursionError for what is no JSON.
    """
    value = _DECODER.decode(given) if isinstance(given, str) else given
    if not isinstance(value, dict):
        return None
    text = json.dumps(value, ensure_ascii=False)
    return _SURROGATE.sub(UNKNOWN_CHARACTER, text)


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda _name: None)
_SURROGATE = re.compile("[\ud800-\udfff]")


def overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
