"""POST /v1/messages: Anthropic's form of a chat, in and out.

1. A request becomes the `ChatRequest` that asks for the same; what has no counterpart is refused.
2. What a provider did earlier in the chat (thoughts, its own tools) is left out of the prompt.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec

from swarm.gateway.answering import answer
from swarm.gateway.ask import Ask
from swarm.gateway.chat import chat_ask
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import bad, checked
from swarm.gateway.replies import Collected, x_swarm_of
from swarm.gateway.requests import (
    CalledFunction,
    ChatMessage,
    ChatRequest,
    Count,
    Function,
    JsonSchema,
    ModelName,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Sampling,
    Share,
    Stop,
    Tool,
    ToolCall,
)
from swarm.gateway.speech import Ended, Opened, Piece
from swarm.gateway.streaming import named_frame
from swarm.gateway.thinking import Reader, Said, Thought, thinks

_PROVIDERS_BLOCKS = ("thinking", "redacted_thinking", "server_tool_use", "mcp_tool_use")


class Block(msgspec.Struct, frozen=True):
    """A piece of a message: text, the use of a tool, or its result."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: "str | list[Block] | Block | None" = None
    is_error: bool | None = None


class AnthropicMessage(msgspec.Struct, frozen=True):
    """One message."""

    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(msgspec.Struct, frozen=True):
    """A tool the model may use; those of another `type` are the provider's, and left out."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] | None = None
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Which tool to use."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    """A schema that the answer must follow."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    """How the answer is wanted."""

    format: OutputFormat | None = None


class CountRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: ModelName
    messages: Annotated[list[AnthropicMessage], msgspec.Meta(min_length=1, max_length=4096)]
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's: the template's own variables


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[Stop], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its name before there was an output_config


class Messages:
    """The handlers of Anthropic's paths."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def messages(self, exchange: Exchange) -> None:
        """POST /v1/messages."""
        self._desk.check_key(exchange.request)
        request = await exchange.read(MessagesRequest)
        self._desk.check_model(request.model)
        is_thinker = thinks(self._desk.swarm.model.tokens.chat_template)
        kind = (request.thinking or {}).get("type", "disabled")
        is_taken = is_thinker or kind in ("disabled", "adaptive")
        checked(is_taken, "this model does not think before it answers", "thinking")
        ask = await chat_ask(self._desk, _asked(request))
        writer = MessageWriter(ask, request.model)
        await answer(
            self._desk,
            exchange,
            ask,
            writer,
            is_streamed=bool(request.stream),
            frame=named_frame,
            last=b"",
        )

    async def count(self, exchange: Exchange) -> None:
        """POST /v1/messages/count_tokens."""
        self._desk.check_key(exchange.request)
        request = await exchange.read(CountRequest)
        self._desk.check_model(request.model)
        ask = await chat_ask(self._desk, _chat_of(request))
        await exchange.reply({"input_tokens": ask.prompt_tokens})


def _asked(request: MessagesRequest) -> ChatRequest:
    newer = request.output_config.format if request.output_config else None
    form = newer or request.output_format
    return msgspec.structs.replace(
        _chat_of(request),
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=form and ResponseFormat("json_schema", JsonSchema(schema=form.schema)),
    )


def _chat_of(request: CountRequest) -> ChatRequest:
    messages: list[ChatMessage] = []
    if request.system:
        messages.append(ChatMessage("system", _text(request.system, "system")))
    for place, message in enumerate(request.messages):
        messages += _messages(message, f"messages.{place}.content")
    checked(bool(messages), "no message has content", "messages")
    last, choice = messages[-1], request.tool_choice
    return ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool) for tool in request.tools or ()],
        tool_choice=_choice(request),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        continue_final_message=last.role == "assistant" and not last.tool_calls,
        chat_template_kwargs={**_thinking(request), **(request.chat_template_kwargs or {})},
        **request.sampling(),
    )


def _thinking(request: CountRequest) -> dict[str, Any]:
    """What templates call it."""
    kind = (request.thinking or {}).get("type")
    return {} if kind in (None, "adaptive") else {"enable_thinking": kind != "disabled"}


def _messages(message: AnthropicMessage, where: str) -> Iterator[ChatMessage]:
    """What a message comes to: results of tools are messages of their own."""
    if isinstance(message.content, str):
        yield ChatMessage(message.role, message.content)
        return
    is_empty = not message.content and message.role != "assistant"  # who may have said nothing
    checked(not is_empty, "a message without content", where)
    calls, texts = [], []
    for block in message.content:
        if block.type == "tool_result":
            content = [block.content] if isinstance(block.content, Block) else block.content
            text = _text(content or "", where)
            yield ChatMessage("tool", text, tool_call_id=block.tool_use_id)
        elif block.type == "tool_use" and block.name is not None:
            function = CalledFunction(block.name, json.dumps(block.input or {}))
            calls.append(ToolCall(function, block.id or ""))
        elif block.type not in _PROVIDERS_BLOCKS and not block.type.endswith("_tool_result"):
            texts.append(block)
    if texts or calls:
        text = _text(texts, where) if texts else ""
        yield ChatMessage(message.role, text, tool_calls=calls or None)


def _text(content: str | Iterable[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content:
        if block.type == "tool_reference":  # what a provider's tool search found
            continue
        if block.type != "text" or block.text is None:
            raise bad(f"only text and tools are taken, not {block.type[:32]!r}", where)
        texts.append(block.text)
    return "\n".join(texts)


def _tool(tool: AnthropicTool) -> Tool:
    if tool.type not in (None, "custom"):
        return Tool(type=tool.type)
    if tool.name is None:
        raise bad("a tool without a name", "tools")
    return Tool(Function(tool.name, tool.description, tool.input_schema))


def _choice(request: CountRequest) -> Literal["none", "auto", "required"] | NamedTool | None:
    match request.tool_choice:
        case None:
            return None
        case ToolChoice(type="tool", name=name):
            return NamedTool(NamedFunction(name or ""))
        case ToolChoice(type="any"):
            return "required"
        case ToolChoice(type="none"):
            return "none"
    return "auto"


class MessageWriter:
    """The shapes of an answer: a message of blocks, and the events it comes in."""

    def __init__(self, ask: Ask, model: str) -> None:
        self._ask = ask
        self._model = model
        self._id = f"msg_{uuid4().hex[:24]}"
        self._reader = Reader(ask)
        self._blocks: list[dict[str, Any]] = []
        self._open = ""  # the kind of the block that is being said
        self._collected = Collected(1)

    def opened(self, opened: Opened) -> Iterator[dict[str, Any]]:
        """The message begins."""
        yield {
            "type": "message_start",
            "message": {**self._message([], None), "x_swarm": {"route": list(opened.route)}},
        }

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Thoughts, text and uses of tools."""
        for part in self._reader.feed(piece.text, piece.tokens):
            yield from self._part(part)

    def ended(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """The last block ends, and why."""
        self._collected.ends[0] = ended
        for part in self._reader.finish():
            yield from self._part(part)
        yield from self._close()
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": self._reason(), "stop_sequence": ended.stop},
            "usage": self._usage(),
            "x_swarm": x_swarm_of(ended),
        }
        yield {"type": "message_stop"}

    def finished(self) -> Iterator[dict[str, Any]]:
        """Nothing comes behind the end."""
        yield from ()

    def whole(self) -> dict[str, Any]:
        """The whole message."""
        message = self._message(self._blocks, self._reason())
        message["stop_sequence"] = self._collected.ends[0].stop
        return {**message, "x_swarm": self._collected.x_swarm()}

    def _part(self, part: Said) -> Iterator[dict[str, Any]]:
        if isinstance(part, str):
            yield from self._say("text", part)
            return
        if isinstance(part, Thought):
            yield from self._say("thinking", part.text, signature="")
            return
        yield from self._close()
        block = {"type": "tool_use", "id": f"toolu_{part.id[5:]}", "name": part.name}
        yield self._begun({**block, "input": {}})
        self._blocks[-1]["input"] = msgspec.Raw(part.arguments.encode())
        yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _say(self, kind: str, text: str, **more: str) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield self._begun({"type": kind, kind: "", **more})
        self._blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _begun(self, block: dict[str, Any]) -> dict[str, Any]:
        self._blocks.append(dict(block))
        place = len(self._blocks) - 1
        return {"type": "content_block_start", "index": place, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open:
            self._open = ""
            yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _reason(self) -> str:
        ended = self._collected.ends[0]
        if ended.reason == "length":
            return "max_tokens"
        if any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        return "end_turn" if ended.stop is None else "stop_sequence"

    def _usage(self) -> dict[str, int]:
        return {"input_tokens": self._ask.prompt_tokens, "output_tokens": self._collected.tokens}

    def _message(self, blocks: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": self._usage(),
        }
