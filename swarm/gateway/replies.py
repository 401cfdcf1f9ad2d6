"""Answers in the shapes that OpenAI's clients expect: chunks of a stream, and whole objects. Pure.

1. A stream's chunks put together hold what the whole object holds.
2. An answer's `finish_reason` is "stop" only if it stopped: by an end-of-sequence id or a stop.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol
from uuid import uuid4

from swarm.gateway.ask import Ask
from swarm.gateway.speech import Ended, Opened, Piece, Share, Told

REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Writer(Protocol):
    """Turns events into one protocol's objects. Each method gives the chunks to send."""

    def opened(self, opened: Opened) -> Iterable[dict[str, Any]]:
        """An answer begins."""

    def piece(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """Text has come."""

    def ended(self, ended: Ended) -> Iterable[dict[str, Any]]:
        """An answer is whole."""

    def finished(self) -> Iterable[dict[str, Any]]:
        """All answers are whole."""

    def whole(self) -> dict[str, Any]:
        """The object that is answered without a stream."""


class Collected:
    """What has been said of each answer."""

    def __init__(self, count: int) -> None:
        self.texts: list[list[str]] = [[] for _ in range(count)]
        self.told: list[list[Told]] = [[] for _ in range(count)]
        self.ends: dict[int, Ended] = {}

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self.texts[piece.index].append(piece.text)
        self.told[piece.index] += piece.told

    def text(self, index: int) -> str:
        """The text of an answer so far."""
        return "".join(self.texts[index])

    @property
    def tokens(self) -> int:
        """How many tokens all whole answers have."""
        return sum(ended.tokens for ended in self.ends.values())

    @property
    def reused(self) -> int:
        """How many positions of prompts no hop had to compute again."""
        return sum(ended.reused_tokens for ended in self.ends.values())

    def x_swarm(self) -> dict[str, Any]:
        """What the swarm did for all answers: the routes at the end, repairs, and replays."""
        ends = [self.ends[index] for index in sorted(self.ends)]
        told = {
            "route": list(ends[0].route) if ends else [],
            "failovers": sum(ended.failovers for ended in ends),
            "replayed_tokens": sum(ended.replayed_tokens for ended in ends),
            "reused_tokens": sum(ended.reused_tokens for ended in ends),
        }
        return told if len(ends) < 2 else {**told, "routes": [list(each.route) for each in ends]}


def usage_of(ask: Ask, collected: Collected) -> dict[str, Any]:
    """The count of tokens."""
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": collected.tokens,
        "total_tokens": ask.prompt_tokens + collected.tokens,
        "prompt_tokens_details": {"cached_tokens": min(collected.reused, ask.prompt_tokens)},
    }


def x_swarm_of(ended: Ended) -> dict[str, Any]:
    """What the swarm did for one answer."""
    return {
        "route": list(ended.route),
        "failovers": ended.failovers,
        "replayed_tokens": ended.replayed_tokens,
        "reused_tokens": ended.reused_tokens,
    }


class OpenAiWriter:
    """What chats and completions have in common."""

    kind = ""
    prefix = ""

    def __init__(self, ask: Ask, model: str, fingerprint: str, *, has_usage: bool) -> None:
        self._ask = ask
        self._has_usage = has_usage
        self._base = {
            "id": f"{self.prefix}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }
        self.collected = Collected(len(ask.choices))

    def finished(self) -> Iterator[dict[str, Any]]:
        """The chunk with the usage, if it was asked for."""
        if self._has_usage:
            usage = usage_of(self._ask, self.collected)
            yield {**self._chunk(), "usage": usage, "x_swarm": self.collected.x_swarm()}

    def whole(self) -> dict[str, Any]:
        """The whole object."""
        return {
            **self._base,
            "object": self.kind,
            "choices": [self._whole_choice(index) for index in sorted(self.collected.ends)],
            "usage": usage_of(self._ask, self.collected),
            "x_swarm": self.collected.x_swarm(),
        }

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base, "object": self._chunk_kind, "choices": list(choices)}
        return {**chunk, "usage": None} if self._has_usage else chunk

    @property
    def _chunk_kind(self) -> str:
        return self.kind

    def _whole_choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


class CompletionWriter(OpenAiWriter):
    """The shapes of /v1/completions. `echoes`: text to begin each answer with."""

    kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, ask: Ask, model: str, fingerprint: str, *, has_usage: bool, echoes: Sequence[str]
    ) -> None:
        super().__init__(ask, model, fingerprint, has_usage=has_usage)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes] or [0] * len(ask.choices)

    def opened(self, opened: Opened) -> Iterator[dict[str, Any]]:
        """The prompt, if it should be echoed."""
        if self._echoes:
            echo = self._echoes[opened.index]
            self.collected.texts[opened.index].append(echo)
            yield self._chunk(self._choice(opened.index, echo))

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A chunk of text."""
        self.collected.add(piece)
        logs = self._logs(piece.told, self._offsets[piece.index])
        self._offsets[piece.index] += sum(len(told.chosen.text) for told in piece.told)
        yield self._chunk(self._choice(piece.index, piece.text, logs))

    def ended(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """The chunk that says why."""
        self.collected.ends[ended.index] = ended
        choice = {**self._choice(ended.index, ""), "finish_reason": REASONS[ended.reason]}
        yield {**self._chunk(choice), "x_swarm": x_swarm_of(ended)}

    def _choice(self, index: int, text: str, logs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logs, "finish_reason": None}

    def _whole_choice(self, index: int) -> dict[str, Any]:
        start = len(self._echoes[index]) if self._echoes else 0
        logs = self._logs(self.collected.told[index], start)
        choice = self._choice(index, self.collected.text(index), logs)
        return {**choice, "finish_reason": REASONS[self.collected.ends[index].reason]}

    def _logs(self, told: Sequence[Told], offset: int) -> dict[str, Any] | None:
        if self._ask.top is None:
            return None
        offsets = []
        for each in told:
            offsets.append(offset)
            offset += len(each.chosen.text)
        return {
            "tokens": [_named(each.chosen) for each in told],
            "token_logprobs": [each.chosen.log for each in told],
            "top_logprobs": [
                {_named(share): share.log for share in (*each.likeliest[::-1], each.chosen)}
                for each in told
            ],
            "text_offset": offsets,
        }


def _named(share: Share) -> str:
    """A token as text or, if it is a part of a character, as OpenAI writes its bytes."""
    if share.text.encode() == share.bytes:
        return share.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in share.bytes)
