"""Chats: from messages to the ids that the model's template makes of them.

1. A template gets what those of transformers get: plain values, a tool call's arguments as an
   object.
2. A model without a template gets PLAIN_TEMPLATE, and its answer ends where the user would speak.
3. What the model once said is never a reason to refuse what comes after it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from swarm.errors import BadInput
from swarm.gateway.answering import guide_of
from swarm.gateway.ask import Ask, ask_of
from swarm.gateway.desk import Desk, aside
from swarm.gateway.faults import bad, checked, unsupported
from swarm.gateway.requests import ChatMessage, ChatRequest, Function, NamedTool, Tool
from swarm.gateway.thinking import OPEN, is_open, thinks
from swarm.gateway.tools import read_arguments
from swarm.template import Parts, render_chat
from swarm.text import Tokens

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}"
    "[message.role] }}: {{ message.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\n\nUser:")
_HERE = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own mark, and its space: it may be trimmed


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a template is given."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Function] = ()
    variables: Mapping[str, Any] | None = None
    is_asking: bool = True  # an assistant's turn is begun
    is_continued: bool = False  # the last message is gone on with instead

    def __post_init__(self) -> None:
        if self.is_continued:
            has_calls = not self.messages or self.messages[-1].get("tool_calls")
            checked(not has_calls, "no message to go on with", "continue_final_message")

    @property
    def size(self) -> int:
        """About so many characters."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text of a chat, and how its answer begins."""

    text: str
    needs_ends: bool  # special tokens must be put around it
    is_thinking: bool  # it ends within a thought


def takes_tools(tokens: Tokens) -> bool:
    """True if the model's template says what to do with tools."""
    return "tools" in (tokens.chat_templates.get("tool_use") or tokens.chat_template or "")


def chat_text(tokens: Tokens, chat: Chat) -> Prompt:
    """Return the text of a chat. ApiError says what the template says."""
    if chat.tools and not takes_tools(tokens):
        raise bad("this model's chat template takes no tools", "tools", "unsupported_parameter")
    messages = list(chat.messages)
    if chat.is_continued:
        messages[-1] = {**messages[-1], "content": _marked(messages[-1]["content"])}
    try:
        text = render_chat(
            tokens.template_for(has_tools=bool(chat.tools)) or PLAIN_TEMPLATE,
            messages,
            special_tokens=tokens.special_tokens,
            add_generation_prompt=chat.is_asking and not chat.is_continued,
            tools=[_plain_tool(tool) for tool in chat.tools] or None,
            variables=chat.variables,
        )
    except BadInput as error:
        raise bad(error.sentence(), "messages") from error
    end = text.rstrip()[-len(OPEN) :]
    if chat.is_continued:
        end = chat.messages[-1]["content"]
        end = end.parts[-1]["text"] if isinstance(end, Parts) else end
        text = _cut_at_mark(text, end)
    return Prompt(text, not tokens.chat_templates, is_open(end))


def _marked(content: str) -> str:
    """A message's content, with the mark at its end."""
    if not isinstance(content, Parts):
        return content + _HERE
    *before, last = (part["text"] for part in content.parts)
    return Parts([*before, last + _HERE])


def _cut_at_mark(text: str, said: str) -> str:
    """The text of a chat up to the end of its last message. ApiError if the template changes what
    was said there.
    """
    before, mark, after = text.rpartition(_HERE.rstrip())
    if not mark or said.strip() not in before:
        raise bad("this model's chat template leaves the last message out", "messages")
    return before if after.startswith(" ") else before.rstrip()


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
                    "arguments": read_arguments(call.function.arguments),
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
    return Parts(texts) if texts else ""


def _plain_tool(function: Function) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {"type": "object", "properties": {}},
        },
    }


def functions_of(tools: Sequence[Tool] | None) -> tuple[Function, ...]:
    """The tools that are functions: others run at a provider, and are left out."""
    own = [tool.function for tool in tools or () if tool.type == "function"]
    checked(None not in own, "a tool without its function", "tools")
    return tuple(function for function in own if function is not None)


def check_tool_choice(request: ChatRequest) -> tuple[tuple[Function, ...], bool]:
    """Return the tools the model may call, and whether it must call one. ApiError if one is
    required that is not there.
    """
    choice, tools = request.tool_choice, functions_of(request.tools)
    if isinstance(choice, NamedTool):
        name = choice.type if choice.function is None else choice.function.name
        named = tuple(tool for tool in tools if choice.function and tool.name == name)
        checked(bool(named), f"there is no tool {name[:64]!r} here", "tool_choice")
        return named, True
    must = choice == "required"
    checked(bool(tools) or not must, "tools are required, and none is given", "tool_choice")
    return () if choice == "none" else tools, must


def call_schema(tools: Sequence[Function]) -> dict[str, Any]:
    """The JSON schema of a call of any of these tools, as `ToolReader` reads it."""
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                "arguments": tool.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


async def chat_ask(desk: Desk, request: ChatRequest) -> Ask:
    """Return what the chat asks for. ApiError if it cannot be."""
    check_chat(request)
    tools, must_call = check_tool_choice(request)
    chat = Chat(
        messages=plain_messages(request.messages),
        tools=tools,
        variables=_variables(request),
        is_asking=request.add_generation_prompt is not False,
        is_continued=bool(request.continue_final_message),
    )
    prompt, ids = await chat_ids(desk, chat)
    call = ("json", json.dumps(call_schema(tools)), "tools") if must_call else None
    new_guide = await guide_of(desk, request, call)
    tokens = desk.swarm.model.tokens
    is_thinker = thinks(tokens.chat_template) and new_guide is None
    return ask_of(
        request,
        [ids],
        request.max_completion_tokens or request.max_tokens or desk.settings.default_tokens,
        desk.swarm.model.card,
        desk.settings,
        own_stops=PLAIN_STOPS if prompt.needs_ends else (),
        top=(request.top_logprobs or 0) if request.logprobs else None,
        keeps_special=bool(tools) or (is_thinker and _hides_tags(tokens)),
        strips_start=prompt.needs_ends and not chat.is_continued,
        new_guide=new_guide,
        tools=tuple(tool.name for tool in tools),
        has_one_call=request.parallel_tool_calls is False,
        thinks=is_thinker,
        is_thinking=prompt.is_thinking,
    )


def _variables(request: ChatRequest) -> dict[str, Any]:
    effort = request.reasoning_effort
    own = {} if effort is None else {"reasoning_effort": effort}
    return {**own, **(request.chat_template_kwargs or {})}


def _hides_tags(tokens: Tokens) -> bool:
    """Tell whether the tags of thoughts are special tokens, which text leaves out."""
    return OPEN not in tokens.decode(tokens.encode(OPEN, with_ends=False))


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
    checked(
        not (request.continue_final_message and request.add_generation_prompt),
        "a message is either gone on with or answered",
        "add_generation_prompt",
    )
    checked(request.modalities in (None, [], ["text"]), "only text is spoken here", "modalities")
    checked(
        bool(request.logprobs) or not request.top_logprobs,
        "top_logprobs needs logprobs to be true",
        "top_logprobs",
    )


async def chat_ids(desk: Desk, chat: Chat) -> tuple[Prompt, list[int]]:
    """Return the text of a chat, and its ids. ApiError says what the template says."""
    prompt = await aside(partial(chat_text, desk.swarm.model.tokens, chat), chat.size)
    return prompt, await desk.encode(prompt.text, with_ends=prompt.needs_ends)
