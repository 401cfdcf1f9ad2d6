"""Tool calls in what a model says: read as the text comes. Pure.

Two forms are known. Hermes' and Qwen's: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any
number, text between them. Llama's: the whole answer is `{"name": …, "parameters": {…}}`, several of
them parted by semicolons, after `<|python_tag|>` or nothing.

1. What is no call of a known tool is text, to the letter.
2. A call is told whole, once it is whole.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from uuid import uuid4

_BEGIN, _END = "<tool_call>", "</tool_call>"
_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Call:
    """A tool called. `arguments` is JSON as text."""

    name: str
    arguments: str
    id: str


class ToolReader:
    """Parts what a model says into text and calls."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
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
            calls = self._calls(rest)
            yield from calls or [_BEGIN + rest]
        elif rest and self._is_bare:
            yield from self._calls(rest.strip().removeprefix(_TAG)) or [rest]
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
                yield from self._calls(before) or [_BEGIN + before + _END]
            elif before.strip():
                yield before.rstrip()
            self._is_in_call = not self._is_in_call
        if not self._is_in_call:
            certain = len(self._held) - _overlap(self._held, _BEGIN)
            # White space may lead to a call, of which it is no part.
            certain = min(certain, len(self._held[:certain].rstrip()))
            text, self._held = self._held[:certain], self._held[certain:]
            if text:
                yield text

    def _calls(self, text: str) -> list[str | Call]:
        """Read calls parted by semicolons; none if any of it is something else."""
        calls: list[str | Call] = []
        decoder = json.JSONDecoder()
        rest = text.strip()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            name = value.get("name") if isinstance(value, dict) else None
            given = value.get("arguments", value.get("parameters", {})) if name else None
            if name not in self._names or not isinstance(given, dict | str):
                return []
            arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
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


def reader_for(names: Collection[str]) -> ToolReader | PlainReader:
    """What reads an answer in which these tools may be called."""
    return ToolReader(names) if names else PlainReader()


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
