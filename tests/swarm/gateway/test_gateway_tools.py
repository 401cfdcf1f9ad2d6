"""Tools: what models say read as calls, and answers that must be JSON."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gateway_world import MODEL, ScriptedSwarm, asked
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from swarm.gateway.grammar import MOST_FEW, JsonGuide
from swarm.gateway.tools import Call, ToolReader
from swarm.sampling import Candidates
from swarm.text import Tokens

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments.city }}"
    "{% endfor %}{% endfor %}<assistant>"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}}
SCHEMA |= {"required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Oslo"}}'


def read(text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, Any]]]:
    """What is said and called, however the text is cut."""
    reader = ToolReader(["weather", "time"])
    places = sorted({min(cut, len(text)) for cut in cuts or []} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    parts = [part for piece in pieces for part in reader.feed(piece)] + list(reader.finish())
    said = "".join(part for part in parts if isinstance(part, str))
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]
    return said, calls


OSLO = ("weather", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("Just words.", "Just words.", []),
        (HERMES, "", [OSLO]),
        (f"Let me see.\n{HERMES}\n{HERMES}", "Let me see.", [OSLO, OSLO]),
        (HERMES.removesuffix("\n</tool_call>"), "", [OSLO]),
        (LLAMA, "", [OSLO]),
        (f"<|python_tag|>{LLAMA}; {LLAMA}", "", [OSLO, OSLO]),
        ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        ('{"a": 1}', '{"a": 1}', []),
        ("{not json", "{not json", []),
        ("a <tool_call>nonsense</tool_call> b", "a<tool_call>nonsense</tool_call> b", []),
        ("a < b and <tool", "a < b and <tool", []),
        ('<tool_call>{"name": "time"}</tool_call>', "", [("time", {})]),
    ],
)
def test_calls_are_told_from_words(text: str, said: str, calls: list[Any]) -> None:
    assert read(text) == (said, calls)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([HERMES, LLAMA, " and ", "\n", "<tool_c", "x"]), max_size=5),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_it_does_not_matter_how_the_text_was_cut(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    assert read(text, cuts) == read(text) == read(text, list(range(len(text))))


def chat(script: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, TEMPLATE)
    messages = [{"role": "user", "content": "Weather?"}]
    asking = {"model": MODEL, "messages": messages, "temperature": 0, **fields}
    return asked(swarm, CHAT, asking), swarm


def test_a_call_is_an_answer_of_its_own_kind() -> None:
    made, swarm = chat(f"I look.{HERMES}", tools=TOOLS)
    choice = made.json["choices"][0]
    assert swarm.prompts == ["[weather][time]<user>Weather?<assistant>"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}


def test_in_a_stream_a_call_comes_whole() -> None:
    made, _ = chat(f"I look.{HERMES}{HERMES}", tools=TOOLS, stream=True)
    deltas = [choice["delta"] for event in made.events[:-1] for choice in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert {call["function"]["arguments"] for call in calls} == {'{"city": "Oslo"}'}
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert made.events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text() -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        made, _ = chat(HERMES, **fields)
        assert made.json["choices"][0]["message"]["content"] == HERMES
        assert made.json["choices"][0]["finish_reason"] == "stop"


def test_earlier_calls_and_their_results_reach_the_template() -> None:
    function = {"name": "weather", "arguments": '{"city": "Rom"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "Rain"},
    ]
    _, swarm = chat("Wet.", tools=TOOLS, messages=messages)
    wanted = "[weather][time]<user>Weather?<assistant>!weatherRom<tool>Rain<assistant>"
    assert swarm.prompts == [wanted]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_tool_that_must_be_called_is(choice: Any) -> None:
    tools = TOOLS[:1]
    made, _ = chat("No, I will not.", tools=tools, tool_choice=choice)
    (call,) = made.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert list(json.loads(call["function"]["arguments"])) == ["city"]
    assert made.json["choices"][0]["finish_reason"] == "tool_calls"


DOG = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "age": {"type": "integer", "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "dog", "schema": DOG}}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("penalty", [0, 1.5])
def test_json_is_of_its_schema_whatever_the_model_would_say(
    temperature: float, penalty: float
) -> None:
    for seed in range(4):
        fields = {"temperature": temperature, "seed": seed, "presence_penalty": penalty}
        made, _ = chat("Well, I think a cat", response_format=FORM, **fields)
        choice = made.json["choices"][0]
        told = json.loads(choice["message"]["content"])
        assert told["kind"] in ("dog", "cat")
        assert told["age"] <= 9
        assert choice["finish_reason"] == "stop"


def test_what_the_model_says_is_kept_where_it_is_json_of_the_schema() -> None:
    said = '{"kind": "cat", "age": 3}'
    made, _ = chat(said, response_format=FORM)
    assert made.json["choices"][0]["message"]["content"] == said
    made, _ = chat(said, response_format={"type": "json_object"})
    assert made.json["choices"][0]["message"]["content"] == said


def test_only_a_few_ids_are_named_in_a_step_and_all_when_there_are_few() -> None:
    _, swarm = chat('{"kind": "cat", "age": 3}', response_format=FORM)
    wishes = swarm.sessions[0].wishes
    assert [wish.allowed is not None for wish in wishes] == [True] * len(wishes)
    assert len(wishes[0].allowed or ()) == 1  # the opening brace


@pytest.mark.parametrize(
    "schema", [{"type": "beast"}, {"pattern": "("}, {"$ref": "http://x/y"}, {"not": {}}]
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    made, _ = chat("x", response_format=form)
    assert (made.status, made.json["error"]["param"]) == (400, "response_format")


class Mask:
    """A matcher that allows these ids."""

    def __init__(self, allowed: list[int], size: int) -> None:
        bits = np.zeros(size, np.uint8)
        bits[allowed] = 1
        self._bits = np.packbits(bits, bitorder="little").tobytes()

    def compute_bitmask(self) -> bytes:
        return self._bits

    def is_error(self) -> bool:
        return False


def test_many_allowed_ids_are_looked_up_among_the_candidates() -> None:
    size = 4 * MOST_FEW
    guide = JsonGuide(Mask(list(range(0, size, 2)), size), size)
    logits = np.array([3, 2, 1], np.float32)
    named = np.array([6, 7], np.int32)
    found = Candidates(np.array([5, 4, 3], np.int32), logits, named, logits[:2], 2, 0.0)
    assert guide.few() is None
    left = guide.narrowed(found)
    assert left is not None
    assert left.tokens.tolist() == [4]
    assert left.named_logits.tolist() == [3.0, -np.inf]
    odd = Candidates(np.array([5, 3], np.int32), logits[:2], named[1:], logits[:1], 1, 0.0)
    assert guide.narrowed(odd) is None
    assert JsonGuide(Mask([1, 2], size), size).few() == {1, 2}


def test_a_model_whose_candidates_are_all_forbidden_is_asked_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm.gateway.grammar.MOST_FEW", 0)  # every step is one of too many
    monkeypatch.setattr("swarm.generate.GUIDED_COUNT", 1)
    made, swarm = chat("Well,", response_format=FORM)
    told = json.loads(made.json["choices"][0]["message"]["content"])
    assert told["kind"] in ("dog", "cat")
    assert any(wish.allowed for wish in swarm.sessions[0].wishes)
    assert any(wish.allowed is None for wish in swarm.sessions[0].wishes)


def test_a_tokenizer_that_is_not_of_bytes_makes_no_json() -> None:
    swarm = ScriptedSwarm("x", TEMPLATE)
    files = {"tokenizer.json": Tokenizer(models.WordLevel({"x": 0}, "x")).to_str().encode()}
    files["tokenizer_config.json"] = json.dumps({"chat_template": TEMPLATE}).encode()
    swarm.model = replace(swarm.model, tokens=Tokens(files))
    messages = [{"role": "user", "content": "x"}]
    made = asked(swarm, CHAT, {"model": MODEL, "messages": messages, "response_format": FORM})
    assert (made.status, "tokenizer" in made.json["error"]["message"]) == (400, True)


def test_json_that_could_not_end_is_refused() -> None:
    made, _ = chat("x", response_format=FORM, ignore_eos=True)
    assert (made.status, made.json["error"]["param"]) == (400, "ignore_eos")
