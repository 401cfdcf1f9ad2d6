"""Any mixture of fields is answered or refused; a stream holds what the whole answer does."""

from typing import Any

from gateway_world import MODEL, ScriptedSwarm, asked
from hypothesis import given, settings
from hypothesis import strategies as st

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
THINKING = TEMPLATE + "<think>"
SCRIPTS = (
    "Hello there.",
    "",
    '{"name": "f", "parameters": {"a": [1]}}',
    'So: <tool_call>{"name": "f", "arguments": {}}</tool_call> and <tool_call>x',
    "one STOP two",
    r'Hm</think> <tool_call>{"name": "f", "arguments": {"x": "\ud83d", "y": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call><tool_call>{"name": "f"}</tool_call>',
)
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
STRICT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
COMMON: dict[str, Any] = {
    "n": st.sampled_from([1, 2, 3, 32, 0]),
    "seed": st.integers(-(1 << 63), (1 << 63) - 1),
    "stop": st.one_of(WORDS, st.lists(WORDS, max_size=3), st.just("STOP")),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 200),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 3),
    "logit_bias": st.dictionaries(
        st.integers(0, 99).map(str), st.floats(-100, 100), min_size=1, max_size=4
    ),
    "ignore_eos": st.booleans(),
    "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 70),
    "stop_token_ids": st.lists(st.integers(0, 99), max_size=3),
    "guided_choice": st.lists(WORDS, max_size=2),
    "structured_outputs": st.sampled_from([{"regex": "[a-z]{2}"}, {"json": SCHEMA}, {}]),
    "length_penalty": st.sampled_from([0, 1, None]),
    "stream_options": st.just({"include_usage": True}),
}
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": WORDS})
CHAT: dict[str, Any] = {
    **COMMON,
    "max_tokens": st.integers(0, 60),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "tools": st.just([TOOL]),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"function": {"name": "f"}}]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, STRICT]),
    "parallel_tool_calls": st.booleans(),
    "add_generation_prompt": st.booleans(),
    "continue_final_message": st.booleans(),
}
COMPLETION: dict[str, Any] = {
    **COMMON,
    "max_tokens": st.integers(1, 60),
    "logprobs": st.integers(0, 5),
    "echo": st.booleans(),
}
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
            "content": st.one_of(WORDS, st.lists(PART, max_size=2)),
        }
    ),
    min_size=1,
    max_size=3,
)
PROMPTS = st.one_of(
    WORDS, st.lists(st.integers(0, 99), max_size=5), st.lists(WORDS, min_size=1, max_size=3)
)


def some(fields: dict[str, Any], **needed: Any) -> Any:
    return st.fixed_dictionaries({"model": st.just(MODEL), **needed}, optional=fields)


def check(path: str, body: dict[str, Any], script: str, template: str | None) -> None:
    body = {"seed": 1, **body}
    whole = asked(ScriptedSwarm(script, template), path, body)
    made = asked(ScriptedSwarm(script, template), path, {**body, "stream": True})
    assert whole.status == made.status in (200, 400), (whole.body, made.body)
    if whole.status == 400:
        assert whole.json["error"]["message"]
        assert whole.json == made.json
        return
    assert made.events[-1] == "[DONE]"
    for index, choice in enumerate(whole.json["choices"]):
        own = [c for e in made.events[:-1] for c in e["choices"] if c["index"] == index]
        reasons = [each["finish_reason"] for each in own if each["finish_reason"]]
        assert reasons == [choice["finish_reason"]]
        if "text" in choice:
            assert "".join(each["text"] for each in own) == choice["text"]
        else:
            said = "".join(each["delta"].get("content") or "" for each in own)
            assert said == (choice["message"]["content"] or said)
            thought = "".join(each["delta"].get("reasoning_content", "") for each in own)
            assert thought == choice["message"].get("reasoning_content", "")
            calls = [call for each in own for call in each["delta"].get("tool_calls", [])]
            names = [call["function"] for call in choice["message"].get("tool_calls", [])]
            assert [call["function"] for call in calls] == names


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    some(CHAT, messages=MESSAGES),
    st.sampled_from(SCRIPTS),
    st.sampled_from([None, TEMPLATE, THINKING]),
)
def test_any_chat_is_answered_or_refused(body: Any, script: str, template: str | None) -> None:
    check("/v1/chat/completions", body, script, template)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(some(COMPLETION, prompt=PROMPTS), st.sampled_from(SCRIPTS))
def test_any_completion_is_answered_or_refused(body: Any, script: str) -> None:
    check("/v1/completions", body, script, None)
