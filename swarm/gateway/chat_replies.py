"""Chats' answers in OpenAI's shapes: chunks with deltas, and whole messages. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from swarm.gateway.ask import Ask
from swarm.gateway.replies import REASONS, OpenAiWriter, x_swarm_of
from swarm.gateway.speech import Ended, Opened, Piece, Share, Told
from swarm.gateway.thinking import Reader, Said, Thought
from swarm.gateway.tools import Call


class ChatWriter(OpenAiWriter):
    """The shapes of /v1/chat/completions."""

    kind = "chat.completion"
    prefix = "chatcmpl"

    def __init__(self, ask: Ask, model: str, fingerprint: str, *, has_usage: bool) -> None:
        super().__init__(ask, model, fingerprint, has_usage=has_usage)
        self._readers = [Reader(ask) for _ in ask.choices]
        self._thoughts: list[list[str]] = [[] for _ in ask.choices]
        self._calls: list[list[Call]] = [[] for _ in ask.choices]
        self._said: list[list[str]] = [[] for _ in ask.choices]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def opened(self, opened: Opened) -> Iterator[dict[str, Any]]:
        """The chunk that says who speaks, and over which route."""
        choice = self._choice(opened.index, {"role": "assistant", "content": ""})
        yield {**self._chunk(choice), "x_swarm": {"route": list(opened.route)}}

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Chunks of text and of calls."""
        self.collected.add(piece)
        logs = chat_logs(piece.told) if self._ask.top is not None else None
        deltas = list(
            self._deltas(piece.index, self._readers[piece.index].feed(piece.text, piece.tokens))
        )
        if logs is not None and not deltas:
            deltas = [{"content": ""}]
        for place, delta in enumerate(deltas):
            yield self._chunk(self._choice(piece.index, delta, logs if place == 0 else None))

    def ended(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """The chunk that says why."""
        self.collected.ends[ended.index] = ended
        for delta in self._deltas(ended.index, self._readers[ended.index].finish()):
            yield self._chunk(self._choice(ended.index, delta))
        choice = {**self._choice(ended.index, {}), "finish_reason": self._reason(ended)}
        yield {**self._chunk(choice), "x_swarm": x_swarm_of(ended)}

    def _deltas(self, index: int, parts: Iterable[Said]) -> Iterator[dict[str, Any]]:
        for part in parts:
            if isinstance(part, str):
                self._said[index].append(part)
                yield {"content": part}
            elif isinstance(part, Thought):
                self._thoughts[index].append(part.text)
                yield {"reasoning_content": part.text}
            else:
                number = len(self._calls[index])
                self._calls[index].append(part)
                yield {"tool_calls": [{"index": number, **called(part)}]}

    def _choice(
        self, index: int, delta: dict[str, Any], logs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logs, "finish_reason": None}

    def _reason(self, ended: Ended) -> str:
        if self._calls[ended.index] and ended.reason != "length":
            return "tool_calls"
        return REASONS[ended.reason]

    def _whole_choice(self, index: int) -> dict[str, Any]:
        calls = [called(call) for call in self._calls[index]]
        text = "".join(self._said[index])
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text.strip() else text,
            "refusal": None,
        }
        if self._thoughts[index]:
            message["reasoning_content"] = "".join(self._thoughts[index])
        if calls:
            message["tool_calls"] = calls
        logs = chat_logs(self.collected.told[index]) if self._ask.top is not None else None
        reason = self._reason(self.collected.ends[index])
        return {"index": index, "message": message, "logprobs": logs, "finish_reason": reason}


def called(call: Call) -> dict[str, Any]:
    """A tool call in OpenAI's form."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_logs(told: Sequence[Told]) -> dict[str, Any]:
    """Log-probabilities in the chat's form."""
    return {
        "content": [
            {**_entry(each.chosen), "top_logprobs": [_entry(share) for share in each.likeliest]}
            for each in told
        ],
        "refusal": None,
    }


def _entry(share: Share) -> dict[str, Any]:
    return {"token": share.text, "logprob": share.log, "bytes": list(share.bytes)}
