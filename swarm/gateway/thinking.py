"""What a model thinks before it answers, between tags: told apart from the answer. Pure.

1. Only a thought that the answer begins with is one; the tags elsewhere are text, to the letter.
2. White space around the thought belongs to neither part.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from swarm.gateway.ask import Ask
from swarm.gateway.tools import Call, PlainReader, ToolReader, overlap

OPEN, CLOSE = "<think>", "</think>"
_TAGS = re.compile("</?think>")


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks."""

    text: str


Said = str | Thought | Call


def thinks(template: str | None) -> bool:
    """Tell whether the model of this chat template thinks in tags."""
    return template is not None and _TAGS.search(template) is not None


def is_open(text: str) -> bool:
    """Tell whether a thought is begun and not ended in this text."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


class Reader:
    """Parts one answer into thoughts, text and calls of tools."""

    def __init__(self, ask: Ask) -> None:
        most = 1 if ask.has_one_call else math.inf
        self._inner = ToolReader(ask.tools, most) if ask.tools else PlainReader()
        self._held = ""
        self._is_thinking = ask.is_thinking  # the prompt began the thought
        self._is_begun = False  # something is known to be a thought
        self._is_over = not ask.thinks
        self._is_stripping = False
        self.thought_tokens = 0

    def feed(self, text: str, tokens: int = 1) -> Iterator[Said]:
        """Take the text of so many tokens; give what is certain."""
        if self._is_over:
            yield from self._answer(text)
            return
        self._held += text
        self.thought_tokens += tokens
        if not self._is_begun:
            start = self._held.lstrip()
            if OPEN.startswith(start):  # too early to tell
                return
            if start.startswith(OPEN):
                self._is_thinking, self._held = True, start.removeprefix(OPEN)
            self._is_begun = self._is_stripping = self._is_thinking
        if self._is_thinking:
            yield from self._think()
        else:
            self._is_over, self.thought_tokens = True, 0
            yield from self._answer(self._held)

    def finish(self) -> Iterator[Said]:
        """Give the rest: the answer is whole."""
        if not self._is_over and self._is_thinking:
            thought = self._begun(self._held.rstrip())
            yield from [Thought(thought)] if thought else []
        elif not self._is_over:
            self.thought_tokens = 0
            yield from self._inner.feed(self._held)
        yield from self._inner.finish()

    def _think(self) -> Iterator[Said]:
        before, found, after = self._held.partition(CLOSE)
        certain = before if found else before[: len(before) - overlap(before, CLOSE)]
        thought = certain.rstrip()
        self._held = before[len(thought) :]
        thought = self._begun(thought)
        if thought:
            yield Thought(thought)
        if found:
            self._is_over = self._is_stripping = True
            yield from self._answer(after)

    def _answer(self, text: str) -> Iterator[Said]:
        yield from self._inner.feed(self._begun(text))

    def _begun(self, text: str) -> str:
        """The text without the white space before its first word."""
        if self._is_stripping:
            text = text.lstrip()
            self._is_stripping = not text
        return text
