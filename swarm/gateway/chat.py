"""Chats: from messages to the ids that the model's template makes of them.

1. A template gets what those of transformers get: plain values, a tool call's arguments as an
   object.
2. A model without a template gets PLAIN_TEMPLATE, and its answer ends where the user would speak.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from swarm.errors import BadInput
from swarm.gateway.ask import Ask, ask_of
from swarm.gateway.desk import Desk, aside
from swarm.gateway.faults import bad, checked, unsupported
from swarm.gateway.requests import ChatMessage, ChatRequest, Tool
from swarm.template import Parts, render_chat
from swarm.text import Tokens

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}"
    "[message.role] }}: {{ message.content }}\n\n"
    "{% endfor %}Assistant:"
)
PLAIN_STOPS = ("\nUser:", "\n\nUser:")


def takes_tools(tokens: Tokens) -> bool:
    """True if the model's template says what to do with tools."""
    return "tools" in (tokens.chat_templates.get("tool_use") or tokens.chat_template or "")


def chat_text(
    tokens: Tokens,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool] | None,
    variables: Mapping[str, Any] | None,
) -> tuple[str, bool]:
    """Return the text of a chat, and whether special tokens must be put around it.

    ApiError says what the template says.
    """
    if tools and not takes_tools(tokens):
        raise bad("this model's chat template takes no tools", "tools", "unsupported_parameter")
    try:
        text = render_chat(
            tokens.template_for(has_tools=bool(tools)) or PLAIN_TEMPLATE,
            messages,
            special_tokens=tokens.special_tokens,
            tools=[_plain_tool(tool) for tool in tools] if tools else None,
            variables=variables,
        )
    except BadInput as error:
        raise bad(error.sentence(), "messages") from error
    return text, not tokens.chat_templates


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return the messages as templates take them. ApiError for what is no text."""
    return [_plain_message(message, place) for place, message in enumerate(messages)]


def _plain_message(message: ChatMessage, place: int) -> dict[str, Any]:
    where = f"messages.{place}"
    plain: dict[str, Any] = {"role": message.role, "content": _text_of(message, where)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, where),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _text_of(message: ChatMessage, where: str) -> str:
    if message.content is None:
        checked(message.role == "assistant", "a message without content", f"{where}.content")
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        text = part.text if part.type == "text" else part.refusal
        if part.type not in ("text", "refusal") or text is None:
            raise bad(f"only text is taken, not {part.type[:32]!r}", f"{where}.content")
        texts.append(text)
    return Parts(texts)


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise bad("a tool call's arguments are not JSON", f"{where}.tool_calls") from error
    checked(isinstance(value, dict), "a tool call's arguments are no object", f"{where}.tool_calls")
    arguments: dict[str, Any] = value
    return arguments


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = tool.function
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }


def check_tool_choice(request: ChatRequest) -> tuple[tuple[Tool, ...], bool]:
    """Return the tools the model may call, and whether it must call one. ApiError if one is
    required that is not there.
    """
    choice, tools = request.tool_choice, tuple(request.tools or ())
    if choice is None or isinstance(choice, str):
        must = choice == "required"
        checked(bool(tools) or not must, "tools are required, and none is given", "tool_choice")
        return () if choice == "none" else tools, must
    named = tuple(tool for tool in tools if tool.function.name == choice.function.name)
    checked(bool(named), f"there is no tool {choice.function.name[:64]!r}", "tool_choice")
    return named, True


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of any of these tools, as `ToolReader` reads it."""
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


async def chat_ask(desk: Desk, request: ChatRequest) -> tuple[Ask, tuple[str, ...]]:
    """Return what the chat asks for, and the names of the tools that may be called in the answer.

    ApiError if it cannot be.
    """
    check_chat(request)
    tools, must_call = check_tool_choice(request)
    messages = plain_messages(request.messages)
    prompt, stops = await chat_ids(desk, messages, tools, request.chat_template_kwargs)
    new_guide = None
    form = request.response_format
    if must_call:
        new_guide = await desk.grammars.compiled(call_schema(tools), "tools")
    elif form is not None and form.type != "text":
        schema = form.json_schema.schema if form.json_schema is not None else None
        checked(form.type == "json_object" or schema is not None, "no schema", "response_format")
        wanted = {"type": "object"} if schema is None else schema
        new_guide = await desk.grammars.compiled(wanted, "response_format")
    checked(not (new_guide and request.ignore_eos), "JSON ends by itself", "ignore_eos")
    ask = ask_of(
        request,
        [prompt],
        request.max_completion_tokens or request.max_tokens or desk.settings.default_tokens,
        desk.swarm.model.card,
        desk.settings,
        own_stops=stops,
        top=(request.top_logprobs or 0) if request.logprobs else None,
        keeps_special=bool(tools),
        strips_start=bool(stops),
        new_guide=new_guide,
    )
    return ask, tuple(tool.function.name for tool in tools)


def check_chat(request: ChatRequest) -> None:
    """ApiError for fields of a chat that contradict each other, or are not supported."""
    unsupported(
        {
            "functions": request.functions,
            "function_call": request.function_call,
            "audio": request.audio,
            "prediction": request.prediction,
            "web_search_options": request.web_search_options,
        }
    )
    checked(request.modalities in (None, [], ["text"]), "only text is spoken here", "modalities")
    checked(
        bool(request.logprobs) or not request.top_logprobs,
        "top_logprobs needs logprobs to be true",
        "top_logprobs",
    )


async def chat_ids(
    desk: Desk,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    variables: Mapping[str, Any] | None,
) -> tuple[list[int], tuple[str, ...]]:
    """Return the ids of a chat, and the stops that its template calls for."""
    tokens = desk.swarm.model.tokens
    size = sum(len(message["content"]) for message in messages)
    text, needs_ends = await aside(partial(chat_text, tokens, messages, tools, variables), size)
    ids = await desk.encode(text, with_ends=needs_ends)
    return ids, () if tokens.chat_templates else PLAIN_STOPS
