"""What a model once said, well or badly, is told to its clients and taken back from them."""

import json
from typing import Any

import pytest
from gateway_world import MODEL, ScriptedSwarm, asked

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
PATHS = (CHAT, MESSAGES, RESPONSES)
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS: dict[str, list[Any]] = {
    CHAT: [{"type": "function", "function": FUNCTION}],
    MESSAGES: [{"name": "f", "input_schema": {"type": "object"}}],
    RESPONSES: [{"type": "function", **FUNCTION}],
}


def ask(path: str, script: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, TEMPLATE)
    said = {"input" if path == RESPONSES else "messages": HELLO}
    most = {"max_output_tokens" if path == RESPONSES else "max_tokens": 200}
    body = {"model": MODEL, "temperature": 0, **said, **most, **fields}
    return asked(swarm, path, body), swarm


def answered(path: str, made: Any) -> tuple[str, list[str]]:
    """The text of an answer, and its calls' arguments as they went out."""
    assert made.status == 200, made.body
    if path == CHAT:
        message = made.json["choices"][0]["message"]
        calls = [each["function"]["arguments"] for each in message.get("tool_calls", [])]
        return message["content"] or "", calls
    if path == MESSAGES:
        blocks = made.json["content"]
        texts = [each["text"] for each in blocks if each["type"] == "text"]
        used = [each["input"] for each in blocks if each["type"] == "tool_use"]
        return "".join(texts), [json.dumps(each, ensure_ascii=False) for each in used]
    items = made.json["output"]
    texts = [each["content"][0]["text"] for each in items if each["type"] == "message"]
    calls = [each["arguments"] for each in items if each["type"] == "function_call"]
    return "".join(texts), calls


def streamed(path: str, made: Any) -> tuple[str, list[str]]:
    """The same, put together from a stream that came to its end."""
    events = [event for event in made.events if event != "[DONE]"]
    if path == CHAT:
        assert made.events[-1] == "[DONE]"
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        calls = [each["function"]["arguments"] for d in deltas for each in d.get("tool_calls", [])]
        return "".join(delta.get("content") or "" for delta in deltas), calls
    if path == MESSAGES:
        assert events[-1]["type"] == "message_stop"
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        calls = [delta["partial_json"] for delta in deltas if "partial_json" in delta]
        return "".join(delta.get("text", "") for delta in deltas), calls
    assert events[-1]["type"] == "response.completed"
    kinds = "response.output_text.delta", "response.function_call_arguments.delta"
    texts, calls = ([e["delta"] for e in events if e["type"] == kind] for kind in kinds)
    return "".join(texts), calls


def call(arguments: str) -> str:
    return f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (r'{"x": "\ud83d"}', {"x": "\ufffd"}),
        (r'{"\udc00": ["\ud83d\ude00 \ud83d"]}', {"\ufffd": ["\U0001f600 \ufffd"]}),
        ('{"x": NaN, "y": [-Infinity, 1e999]}', {"x": None, "y": [None, None]}),
        (r'"{\"x\": 1}"', {"x": 1}),
        ('{"x": 123456789012345678901234567890}', {"x": 123456789012345678901234567890}),
    ],
)
def test_arguments_are_json_that_any_parser_takes(path: str, arguments: str, told: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    made, _ = ask(path, call(arguments), tools=TOOLS[path])
    text, (written,) = answered(path, made)
    assert (text, json.loads(written, parse_constant=refuse)) == ("", told)
    made, _ = ask(path, call(arguments), tools=TOOLS[path], stream=True)
    text, (written,) = streamed(path, made)
    assert (text, json.loads(written, parse_constant=refuse)) == ("", told)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arguments", ['"hello"', "[1]", "null", "7", r'"[1]"', '"{"'])
def test_a_call_whose_arguments_are_no_object_is_text(path: str, arguments: str) -> None:
    said = call(arguments)
    made, _ = ask(path, said, tools=TOOLS[path])
    assert answered(path, made) == (said, [])
    made, _ = ask(path, said, tools=TOOLS[path], stream=True)
    assert streamed(path, made) == (said, [])


def history(path: str, arguments: Any) -> dict[str, Any]:
    """A chat in which the model has called a tool with these arguments."""
    first, last = {"role": "user", "content": "go"}, {"role": "user", "content": "go on"}
    if path == RESPONSES:
        made = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
        result = {"type": "function_call_output", "call_id": "c", "output": "bad"}
        return {"input": [first, made, result, last]}
    if path == MESSAGES:
        used = {"type": "tool_use", "id": "c", "name": "f", "input": arguments}
        done = {"type": "tool_result", "tool_use_id": "c", "content": "bad"}
        return {
            "messages": [
                first,
                {"role": "assistant", "content": [used]},
                {"role": "user", "content": [done, {"type": "text", "text": "go on"}]},
            ]
        }
    function = {"name": "f", "arguments": arguments}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return {"messages": [first, called, {"role": "tool", "content": "bad"}, last]}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("arguments", ['{"x": ', "hello", "[1]", '"a"', "[" * 10_000])
def test_an_old_call_that_was_malformed_is_told_without_arguments(
    path: str, arguments: str
) -> None:
    made, swarm = ask(path, "So be it.", **history(path, arguments))
    assert answered(path, made)[0] == "So be it."
    assert swarm.prompts == ["<user>go;<assistant>!f{};<tool>bad;<user>go on;<assistant>"]


def test_an_old_call_with_half_a_character_is_taken_back() -> None:
    for path in (CHAT, RESPONSES):
        made, swarm = ask(path, "Yes.", **history(path, r'{"x": "\ud83d", "y": NaN}'))
        assert answered(path, made)[0] == "Yes."
        assert '", "y": null};<tool>' in swarm.prompts[0]


THOUGHTS = [
    {"type": "thinking", "thinking": "hm", "signature": "s"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
    {"type": "code_execution_tool_result", "tool_use_id": "s", "content": {"type": "result"}},
    {"type": "text", "text": "yo"},
]


def test_thoughts_of_the_past_are_left_out() -> None:
    chat = [HELLO[0], {"role": "assistant", "content": THOUGHTS}, HELLO[0]]
    made, swarm = ask(MESSAGES, "Yes.", messages=chat)
    assert answered(MESSAGES, made)[0] == "Yes."
    assert swarm.prompts == ["<user>Hi;<assistant>yo;<user>Hi;<assistant>"]
    thought = {"role": "assistant", "content": THOUGHTS[:2]}
    _, swarm = ask(MESSAGES, "Yes.", messages=[HELLO[0], thought])
    assert swarm.prompts == ["<user>Hi;<assistant>"]
    made, _ = ask(MESSAGES, "Yes.", messages=[thought])
    assert made.status == 400


def test_reasoning_items_of_the_past_are_left_out() -> None:
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "yo"}]}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    content = [{"type": "reasoning_text", "text": "hm"}]
    more = [{**thought, "content": content}, {"type": "web_search_call", "status": "completed"}]
    made, swarm = ask(RESPONSES, "Yes.", input=[HELLO[0], thought, *more, said, HELLO[0]])
    assert answered(RESPONSES, made)[0] == "Yes."
    assert swarm.prompts == ["<user>Hi;<assistant>yo;<user>Hi;<assistant>"]
    assert ask(RESPONSES, "Yes.", input=[thought])[0].status == 400


BEGUN = [HELLO[0], {"role": "assistant", "content": "1, 2,"}]
GOES_ON = {"continue_final_message": True}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (MESSAGES, {}),
        (CHAT, GOES_ON),
        (CHAT, {**GOES_ON, "add_generation_prompt": False}),
    ],
)
def test_the_assistants_last_message_is_gone_on_with(path: str, fields: Any) -> None:
    made, swarm = ask(path, " 3", messages=BEGUN, **fields)
    assert swarm.prompts == ["<user>Hi;<assistant>1, 2,"]
    assert answered(path, made)[0] == " 3"
    made, _ = ask(path, " 3", messages=BEGUN, stream=True, **fields)
    assert streamed(path, made)[0] == " 3"


def test_blocks_are_gone_on_with_too_and_counted_so() -> None:
    blocks = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": THOUGHTS}]
    _, swarm = ask(MESSAGES, "!", messages=blocks)
    assert swarm.prompts == ["<user>Hi;<assistant>yo"]
    swarm = ScriptedSwarm("x", TEMPLATE)
    for path, fields in (("/v1/messages/count_tokens", {}), ("/tokenize", GOES_ON)):
        made = asked(swarm, path, {"model": MODEL, "messages": BEGUN, **fields}).json
        assert len("<user>Hi;<assistant>1, 2,") in made.values()


def test_without_a_template_the_last_message_is_gone_on_with_as_it_stands() -> None:
    swarm = ScriptedSwarm(" 3")
    body = {"model": MODEL, "messages": BEGUN, "temperature": 0, **GOES_ON}
    made = asked(swarm, CHAT, body)
    assert swarm.prompts == ["User: Hi\n\nAssistant: 1, 2,"]
    assert made.json["choices"][0]["message"]["content"] == " 3"


def test_a_turn_is_begun_only_if_it_should_be() -> None:
    _, swarm = ask(CHAT, "x", add_generation_prompt=False)
    assert swarm.prompts == ["<user>Hi;"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({**GOES_ON, "add_generation_prompt": True}, "add_generation_prompt"),
        ({**GOES_ON, **history(CHAT, "{}")}, None),
        (
            {**GOES_ON, "messages": history(CHAT, "{}")["messages"][:2]},
            "continue_final_message",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(fields: Any, param: str | None) -> None:
    made, _ = ask(CHAT, "x", **fields)
    assert (made.status, (made.json.get("error") or {}).get("param")) == (
        400 if param else 200,
        param,
    )


def test_a_template_that_leaves_the_last_message_out_is_told_of() -> None:
    for template in ("x", "{% for m in messages %}{{ m.content[:2] }}{% endfor %}"):
        swarm = ScriptedSwarm("x", template)
        made = asked(swarm, CHAT, {"model": MODEL, "messages": BEGUN, **GOES_ON})
        assert (made.status, made.json["error"]["param"]) == (400, "messages")
    trimming = "{% for m in messages %}{{ m.content | trim }};{% endfor %}"
    swarm = ScriptedSwarm("x", trimming)
    asked(swarm, CHAT, {"model": MODEL, "messages": BEGUN, "temperature": 0, **GOES_ON})
    assert swarm.prompts == ["Hi;1, 2,"]


TWO = call('{"x": 1}') + "\n" + call('{"x": 2}')
LLAMAS = '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 2}}'
ONE: dict[str, dict[str, Any]] = {
    CHAT: {"parallel_tool_calls": False},
    RESPONSES: {"parallel_tool_calls": False},
    MESSAGES: {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("script", [TWO, LLAMAS])
def test_where_one_call_at_a_time_is_asked_for_there_is_one(path: str, script: str) -> None:
    made, _ = ask(path, script, tools=TOOLS[path])
    assert len(answered(path, made)[1]) == 2
    made, _ = ask(path, script, tools=TOOLS[path], **ONE[path])
    assert [json.loads(each) for each in answered(path, made)[1]] == [{"x": 1}]
    made, _ = ask(path, script, tools=TOOLS[path], stream=True, **ONE[path])
    assert [json.loads(each) for each in streamed(path, made)[1]] == [{"x": 1}]


PROVIDERS: dict[str, list[Any]] = {
    CHAT: [{"type": "web_search"}, {"type": "web_search", "web_search": {"enable": True}}],
    MESSAGES: [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ],
    RESPONSES: [{"type": "web_search"}, {"type": "file_search", "vector_store_ids": ["v"]}],
}
CHOSEN: dict[str, Any] = {
    CHAT: {"type": "web_search"},
    MESSAGES: {"type": "tool", "name": "web_search"},
    RESPONSES: {"type": "web_search"},
}


@pytest.mark.parametrize("path", PATHS)
def test_tools_that_run_at_a_provider_are_left_out(path: str) -> None:
    mixed = [*PROVIDERS[path], *TOOLS[path]]
    made, swarm = ask(path, call('{"x": 1}'), tools=mixed)
    assert answered(path, made) == ("", ['{"x": 1}'])
    assert swarm.prompts == ["[f]<user>Hi;<assistant>"]
    made, swarm = ask(path, "So.", tools=PROVIDERS[path])
    assert answered(path, made) == ("So.", [])
    assert swarm.prompts == ["<user>Hi;<assistant>"]


@pytest.mark.parametrize("path", PATHS)
def test_a_choice_of_a_tool_that_is_left_out_is_refused_by_its_name(path: str) -> None:
    made, _ = ask(path, "x", tools=[*PROVIDERS[path], *TOOLS[path]], tool_choice=CHOSEN[path])
    assert made.status == 400
    assert "web_search" in made.json["error"]["message"]
    assert path == MESSAGES or made.json["error"]["param"] == "tool_choice"


def test_a_tool_without_what_it_is_is_refused() -> None:
    assert ask(CHAT, "x", tools=[{"type": "function"}])[0].status == 400
    assert ask(MESSAGES, "x", tools=[{"input_schema": {}}])[0].status == 400


def test_an_empty_last_message_is_gone_on_with_and_an_empty_answer_is_no_reason_to_refuse() -> None:
    empty = [*HELLO, {"role": "assistant", "content": []}]
    made, _ = ask(CHAT, "yes", messages=empty, continue_final_message=True)
    assert answered(CHAT, made) == ("yes", [])
    made, _ = ask(MESSAGES, "yes", messages=[*empty, *HELLO])
    assert answered(MESSAGES, made) == ("yes", [])


def test_a_last_message_in_parts_is_gone_on_with_by_a_template_that_loops_over_them() -> None:
    looping = "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    looping += "{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
    swarm = ScriptedSwarm("yes", looping)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {"model": MODEL, "messages": [*HELLO, {"role": "assistant", "content": parts}]}
    made = asked(swarm, CHAT, {**body, "continue_final_message": True, "temperature": 0})
    assert answered(CHAT, made) == ("yes", [])


@pytest.mark.parametrize("kind", ["custom_tool_call", "local_shell_call", "mcp_approval_request"])
def test_what_other_tools_of_a_provider_did_is_left_out_and_so_are_they(kind: str) -> None:
    items = [*HELLO, {"type": kind, "id": "x", "call_id": "y"}, *HELLO]
    tools = [{"type": "custom", "name": None}, *TOOLS[RESPONSES]]
    made, _ = ask(RESPONSES, "yes", input=items, tools=tools)
    assert answered(RESPONSES, made) == ("yes", [])
