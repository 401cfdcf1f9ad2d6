"""What a model thinks in tags is told apart from what it answers, in every dialect."""

import json
from itertools import pairwise
from typing import Any

import pytest
from gateway_world import MODEL, PiecesSwarm, ScriptedSwarm, asked
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.gateway.ask import Ask
from swarm.gateway.thinking import Reader, Thought
from swarm.gateway.tools import Call

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
PATHS = (CHAT, MESSAGES, RESPONSES)
MESSAGE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
)
TAGGED = MESSAGE + "<assistant>{% if enable_thinking is false %}<think></think>{% endif %}"
BEGUN = MESSAGE + "<assistant><think>\n"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SCHEMA |= {"additionalProperties": False}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def ask(path: str, script: str, template: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, template)
    hello = [{"role": "user", "content": "Is <think> a tag?"}]
    body: dict[str, Any] = {"model": MODEL, "temperature": 0}
    body |= {"input" if path == RESPONSES else "messages": hello}
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 200
    return asked(swarm, path, body | fields), swarm


def parts(path: str, made: Any) -> tuple[str, str]:
    """What was thought, and what was said."""
    assert made.status == 200, made.body
    if path == CHAT:
        message = made.json["choices"][0]["message"]
        return message.get("reasoning_content", ""), message["content"] or ""
    if path == MESSAGES:
        blocks = made.json["content"]
        kinds = [block["type"] for block in blocks]
        assert kinds == sorted(kinds, key=["thinking", "text", "tool_use"].index)
        thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
        return "".join(thoughts), "".join(block.get("text", "") for block in blocks)
    items = made.json["output"]
    texts = {item["type"]: item["content"][0]["text"] for item in items if "content" in item}
    return texts.get("reasoning", ""), texts.get("message", "")


def streamed(path: str, made: Any) -> tuple[str, str]:
    events = [event for event in made.events if event != "[DONE]"]
    if path == CHAT:
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        names = ("reasoning_content", "content")
    elif path == MESSAGES:
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        names = ("thinking", "text")
    else:
        kinds = ("response.reasoning_text.delta", "response.output_text.delta")
        deltas = [{e["type"]: e["delta"]} for e in events if e["type"] in kinds]
        names = kinds
    first, second = ("".join(d.get(name) or "" for d in deltas) for name in names)
    return first, second


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("template", "script", "thought", "text"),
    [
        (TAGGED, "<think>\nHm, so.\n</think>\n\nYes.", "Hm, so.", "Yes."),
        (BEGUN, "Hm, so.\n</think>\n\nYes.", "Hm, so.", "Yes."),
        (BEGUN, "<think>\nHm </th so.</think>Yes.", "Hm </th so.", "Yes."),
        (TAGGED, "Yes, <think> is a tag. </think>", "", "Yes, <think> is a tag. </think>"),
        (TAGGED, "<think></think>Yes.", "", "Yes."),
        (TAGGED, "<think>Never ends", "Never ends", ""),
        (MESSAGE.replace("</think>", "|"), "<think>Hm</think>Yes.", "", "<think>Hm</think>Yes."),
    ],
)
def test_thoughts_are_told_apart(
    path: str, template: str, script: str, thought: str, text: str
) -> None:
    assert parts(path, ask(path, script, template)[0]) == (thought, text)
    assert streamed(path, ask(path, script, template, stream=True)[0]) == (thought, text)


def read(text: str, cuts: list[int], *, is_thinking: bool) -> tuple[str, str, list[str]]:
    asking = Ask(choices=(), prompt_tokens=0, tools=("f",), thinks=True, is_thinking=is_thinking)
    reader = Reader(asking)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    told = [part for a, b in pairwise(places) for part in reader.feed(text[a:b])]
    told += list(reader.finish())
    thought = "".join(part.text for part in told if isinstance(part, Thought))
    calls = [part.arguments for part in told if isinstance(part, Call)]
    return thought, "".join(part for part in told if isinstance(part, str)), calls


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "so ", "<th", CALL, "x"]), max_size=6),
    st.lists(st.integers(0, 120), max_size=12),
    st.booleans(),
)
def test_it_does_not_matter_how_the_tags_were_cut(
    pieces: list[str], cuts: list[int], is_thinking: bool
) -> None:
    text = "".join(pieces)
    whole = read(text, [], is_thinking=is_thinking)
    assert read(text, cuts, is_thinking=is_thinking) == whole
    assert read(text, list(range(len(text))), is_thinking=is_thinking) == whole


@pytest.mark.parametrize("path", PATHS)
def test_a_call_may_follow_a_thought(path: str) -> None:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    tool = {CHAT: tool, MESSAGES: {"name": "f"}}.get(path, {"type": "function", "name": "f"})
    made, _ = ask(path, f"Hm.</think>{CALL}", BEGUN, tools=[tool])
    assert parts(path, made) == ("Hm.", "")
    assert "f" in [
        *(
            call["function"]["name"]
            for c in made.json.get("choices", [])
            for call in c["message"]["tool_calls"]
        ),
        *(block.get("name") for block in made.json.get("content", [])),
        *(item.get("name") for item in made.json.get("output", [])),
    ]


def test_what_was_thought_is_counted() -> None:
    made, _ = ask(RESPONSES, "<think>Hm.</think>Yes.", TAGGED)
    usage = made.json["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == len("<think>Hm.</think>")
    made, _ = ask(RESPONSES, "  Yes.", TAGGED)
    assert made.json["usage"]["output_tokens_details"]["reasoning_tokens"] == 0


def test_the_events_of_a_thought_are_those_that_the_references_name() -> None:
    made, _ = ask(MESSAGES, "Hm.</think>Yes.", BEGUN, stream=True)
    begun = [event["content_block"] for event in made.events if "content_block" in event]
    assert [block["type"] for block in begun] == ["thinking", "text"]
    assert begun[0]["signature"] == ""
    made, _ = ask(RESPONSES, "Hm.</think>Yes.", BEGUN, stream=True)
    kinds = [event["type"].removeprefix("response.") for event in made.events]
    for kind in (
        "output_item.added",
        "content_part.added",
        "content_part.done",
        "output_item.done",
    ):
        assert kinds.count(kind) == 2
    assert kinds.index("reasoning_text.done") < kinds.index("output_text.delta")


def test_json_that_was_asked_for_is_no_thought() -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    for template in (TAGGED, BEGUN):
        thought, text = parts(CHAT, ask(CHAT, "<think>", template, response_format=form)[0])
        assert (thought, list(json.loads(text))) == ("", ["a"])


def test_a_thought_is_gone_on_with() -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hm,"}]
    made, swarm = ask(MESSAGES, " so</think>Yes.", TAGGED, messages=begun)
    assert swarm.prompts == ["<user>Hi<assistant><think>Hm,"]
    assert parts(MESSAGES, made) == ("so", "Yes.")


def test_anthropics_thinking_is_switched_where_the_template_can() -> None:
    for kind, end in (("enabled", "<assistant>"), ("disabled", "<think></think>")):
        made, swarm = ask(MESSAGES, "Yes.", TAGGED, thinking={"type": kind, "budget_tokens": 1024})
        assert made.status == 200
        assert swarm.prompts[0].endswith(end)
    plain = MESSAGE.replace("</think>", "|")
    assert ask(MESSAGES, "x", plain, thinking={"type": "enabled"})[0].status == 400
    assert ask(MESSAGES, "x", plain, thinking={"type": "adaptive"})[0].status == 200


def test_an_effort_reaches_the_template() -> None:
    template = MESSAGE + "{{ reasoning_effort }}<assistant>"
    for path, fields in (
        (CHAT, {"reasoning_effort": "low"}),
        (RESPONSES, {"reasoning": {"effort": "low"}}),
    ):
        _, swarm = ask(path, "x", template, **fields)
        assert swarm.prompts[0].endswith("low<assistant>")


def test_tags_that_are_special_tokens_are_seen() -> None:
    swarm = PiecesSwarm(["<think>", "H", "m", "</think>", "Y"], TAGGED, ["<think>", "</think>"])
    body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": "H"}]}
    assert parts(CHAT, asked(swarm, CHAT, body)) == ("Hm", "Y")
