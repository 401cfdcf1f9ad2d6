"""POST /v1/responses: OpenAI's newer form of a chat, in and out. Nothing is stored here.

1. A request becomes the `ChatRequest` that asks for the same; what has no counterpart is refused.
2. What a provider did earlier in the chat (thoughts, its own tools) is left out of the prompt.
"""

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec

from swarm.gateway.answering import answer
from swarm.gateway.ask import Ask
from swarm.gateway.chat import chat_ask
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import bad, checked, unsupported
from swarm.gateway.replies import Collected
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
    Part,
    ResponseFormat,
    Sampling,
    Share,
    Temperature,
    Tool,
    ToolCall,
)
from swarm.gateway.speech import Ended, Opened, Piece
from swarm.gateway.streaming import named_frame
from swarm.gateway.thinking import Reader, Said, Thought

_PROVIDERS_ITEMS = (
    "reasoning",
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
    "mcp_list_tools",
    "mcp_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "custom_tool_call",
    "custom_tool_call_output",
    "local_shell_call",
    "local_shell_call_output",
    "compaction",
)
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


class Item(msgspec.Struct, frozen=True):
    """A message, a function's call, or its output."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """A function the model may call; tools of another type are the provider's, and left out."""

    type: str
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(msgspec.Struct, frozen=True):
    """The function that must be called."""

    type: str
    name: str = ""


class Format(msgspec.Struct, frozen=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextForm(msgspec.Struct, frozen=True):
    """How text is wanted."""

    format: Format | None = None


class Reasoning(msgspec.Struct, frozen=True):
    """How much to think."""

    effort: str | None = None


class ResponsesRequest(Sampling, frozen=True, kw_only=True):
    """POST /v1/responses."""

    model: ModelName
    input: str | Annotated[list[Item], msgspec.Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextForm | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's: the template's own variables
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None


class Responses:
    """The handler of /v1/responses."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def responses(self, exchange: Exchange) -> None:
        """POST /v1/responses."""
        self._desk.check_key(exchange.request)
        request = await exchange.read(ResponsesRequest)
        self._desk.check_model(request.model)
        unsupported(
            {
                "previous_response_id": request.previous_response_id,
                "conversation": request.conversation,
                "background": request.background,
                "prompt": request.prompt,
                "include": "message.output_text.logprobs" in (request.include or ()),
            }
        )
        ask = await chat_ask(self._desk, _chat_of(request))
        await answer(
            self._desk,
            exchange,
            ask,
            ResponseWriter(ask, request),
            is_streamed=bool(request.stream),
            frame=named_frame,
            last=b"",
        )


def _chat_of(request: ResponsesRequest) -> ChatRequest:
    messages = [ChatMessage("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        messages.append(ChatMessage("user", request.input))
    else:
        messages += [
            _message(item, f"input.{at}")
            for at, item in enumerate(request.input)
            if item.type not in _PROVIDERS_ITEMS
        ]
    checked(bool(messages), "no item has content", "input")
    return ChatRequest(
        model=request.model,
        messages=messages,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        tools=[_tool(tool) for tool in request.tools or ()],
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request.text),
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        chat_template_kwargs=request.chat_template_kwargs,
        **request.sampling(),
    )


def _message(item: Item, where: str) -> ChatMessage:
    match item.type:
        case "message" if item.role is not None:
            return ChatMessage(item.role, _content(item.content, where))
        case "function_call" if item.name is not None:
            function = CalledFunction(item.name, item.arguments or "{}")
            return ChatMessage("assistant", "", tool_calls=[ToolCall(function, item.call_id or "")])
        case "function_call_output":
            return ChatMessage("tool", _content(item.output, where), tool_call_id=item.call_id)
    raise bad(f"an item of type {item.type[:32]!r} is not taken as it stands", where)


def _content(content: str | list[Part] | None, where: str) -> str | list[Part]:
    if content is None:
        raise bad("an item without content", where)
    if isinstance(content, str):
        return content
    return [Part(_TEXTS.get(part.type, part.type), part.text, part.refusal) for part in content]


def _tool(tool: FunctionTool) -> Tool:
    if tool.type != "function":
        return Tool(None, tool.type)
    if tool.name is None:
        raise bad("a tool without a name", "tools")
    return Tool(Function(tool.name, tool.description, tool.parameters, tool.strict), tool.type)


def _choice(
    choice: Literal["none", "auto", "required"] | NamedChoice | None,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    if not isinstance(choice, NamedChoice):
        return choice
    own = NamedFunction(choice.name) if choice.type == "function" else None
    return NamedTool(own, choice.type)


def _format(text: TextForm | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    form = text.format
    schema = JsonSchema(form.name, form.schema) if form.schema is not None else None
    return ResponseFormat(form.type, schema)


class ResponseWriter:
    """The shapes of a response, and the events it comes in."""

    def __init__(self, ask: Ask, request: ResponsesRequest) -> None:
        self._ask = ask
        self._request = request
        self._reader = Reader(ask)
        self._id = f"resp_{uuid4().hex}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open = ""  # the kind of the item that is being said
        self._collected = Collected(1)
        self._events = 0

    def opened(self, opened: Opened) -> Iterator[dict[str, Any]]:
        """The response begins."""
        begun = {**self._response("in_progress"), "x_swarm": {"route": list(opened.route)}}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Thoughts, text and calls."""
        for part in self._reader.feed(piece.text, piece.tokens):
            yield from self._part(part)

    def ended(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """The last item ends, and the response."""
        self._collected.ends[0] = ended
        for part in self._reader.finish():
            yield from self._part(part)
        yield from self._close()
        response = self.whole()
        yield self._event(f"response.{response['status']}", response=response)

    def finished(self) -> Iterator[dict[str, Any]]:
        """Nothing comes behind the end."""
        yield from ()

    def whole(self) -> dict[str, Any]:
        """The whole response."""
        is_cut = self._collected.ends[0].reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["usage"] = {
            "input_tokens": self._ask.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._collected.reused},
            "output_tokens": self._collected.tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.thought_tokens},
            "total_tokens": self._ask.prompt_tokens + self._collected.tokens,
        }
        return {**response, "x_swarm": self._collected.x_swarm()}

    def _part(self, part: Said) -> Iterator[dict[str, Any]]:
        if isinstance(part, str):
            yield from self._say("output_text", part)
            return
        if isinstance(part, Thought):
            yield from self._say("reasoning_text", part.text)
            return
        yield from self._close()
        item = {
            "type": "function_call",
            "id": f"fc_{part.id[5:]}",
            "call_id": part.id,
            "name": part.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._items.append(item)
        at = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", **at, item=dict(item))
        named = {**at, "item_id": item["id"]}
        yield self._event("response.function_call_arguments.delta", **named, delta=part.arguments)
        yield self._event(
            "response.function_call_arguments.done",
            **named,
            name=part.name,
            arguments=part.arguments,
        )
        item.update(arguments=part.arguments, status="completed")
        yield self._event("response.output_item.done", **at, item=dict(item))

    def _say(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if self._open != kind:
            yield from self._close()
            yield from self._begin(kind)
        self._items[-1]["content"][0]["text"] += text
        logs: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._event(f"response.{kind}.delta", **self._place(), delta=text, **logs)

    def _begin(self, kind: str) -> Iterator[dict[str, Any]]:
        self._open = kind
        item: dict[str, Any] = {"status": "in_progress", "content": []}
        part: dict[str, Any] = {"type": kind, "text": ""}
        if kind == "output_text":
            item |= {"type": "message", "id": f"msg_{uuid4().hex}", "role": "assistant"}
            part["annotations"] = []
        else:
            item |= {"type": "reasoning", "id": f"rs_{uuid4().hex}", "summary": []}
        self._items.append(item)
        at = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", **at, item={**item, "content": []})
        item["content"].append(part)
        yield self._event("response.content_part.added", **self._place(), part=dict(part))

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        kind, self._open = self._open, ""
        item = self._items[-1]
        item["status"] = "completed"
        part = item["content"][0]
        logs: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._event(f"response.{kind}.done", **self._place(), text=part["text"], **logs)
        yield self._event("response.content_part.done", **self._place(), part=part)
        at = {"output_index": len(self._items) - 1}
        yield self._event("response.output_item.done", **at, item=item)

    def _place(self) -> dict[str, Any]:
        item = self._items[-1]
        return {
            "item_id": item["id"],
            "output_index": len(self._items) - 1,
            "content_index": 0,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._events = self._events, self._events + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _response(self, status: str) -> dict[str, Any]:
        request = self._request
        asked = msgspec.to_builtins(request)
        text = asked.get("text") or {"format": {"type": "text"}}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": list(self._items),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": text,
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": [tool for tool in asked.get("tools") or () if tool["type"] == "function"],
            "top_p": request.top_p,
            "metadata": request.metadata or {},
            "usage": None,
        }
