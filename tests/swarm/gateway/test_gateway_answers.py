"""Completions and chats: what is asked for, and the shapes it comes in."""

from typing import Any

import numpy as np
import pytest
from gateway_world import MODEL, ScriptedSwarm, asked

from swarm.sampling import Candidates

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


def chat(script: str = "Hello there.", **fields: Any) -> Any:
    return asked(
        ScriptedSwarm(script),
        CHAT,
        {"model": MODEL, "messages": HELLO, "temperature": 0, **fields},
    )


def completion(script: str = "Hello there.", **fields: Any) -> Any:
    return asked(
        ScriptedSwarm(script),
        COMPLETIONS,
        {"model": MODEL, "prompt": "Hi", "temperature": 0, "max_tokens": 50, **fields},
    )


def test_an_answer_that_stops_by_itself_and_one_that_is_cut_say_so() -> None:
    assert chat().json["choices"][0]["finish_reason"] == "stop"
    cut = chat(max_tokens=5).json["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("Hello", "length")


def test_the_newer_name_of_the_limit_is_taken_first() -> None:
    made = chat(max_tokens=9, max_completion_tokens=3).json
    assert made["usage"]["completion_tokens"] == 3


def test_a_limit_beyond_the_context_is_what_there_is_room_for() -> None:
    made = chat("x" * 600, max_tokens=100_000).json
    assert made["usage"]["total_tokens"] == 512
    assert made["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("logs", [False, True])
def test_the_chunks_of_a_stream_put_together_are_the_whole_answer(path: str, logs: bool) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "n": 2, "stop": ["the", "zz"]}
    if path == CHAT:
        fields |= {"messages": HELLO, "logprobs": logs, "top_logprobs": 2 if logs else None}
    else:
        fields |= {"prompt": "Hi", "echo": not logs, "logprobs": 2 if logs else None}
        fields |= {"max_tokens": 50}
    whole = asked(ScriptedSwarm("Hello there."), path, fields).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = asked(ScriptedSwarm("Hello there."), path, {**fields, **options}).events
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == whole["usage"]
    assert events[-2]["choices"] == []
    for index, choice in enumerate(whole["choices"]):
        own = [c for e in events[:-1] for c in e["choices"] if c["index"] == index]
        if path == CHAT:
            text = "".join(each["delta"].get("content") or "" for each in own)
            assert own[0]["delta"]["role"] == "assistant"
            assert text == choice["message"]["content"] == "Hello "
        else:
            text = "".join(each["text"] for each in own)
            assert text == choice["text"] == ("Hello " if logs else "HiHello ")
        reasons = [each["finish_reason"] for each in own if each["finish_reason"]]
        assert reasons == [choice["finish_reason"]] == ["stop"]
        told = [each["logprobs"] for each in own if each["logprobs"]]
        name = "content" if path == CHAT else "tokens"
        joined = [entry for each in told for entry in each[name]]
        assert joined == (choice["logprobs"][name] if logs else [])


def test_what_may_begin_a_stop_is_held_back_until_it_cannot() -> None:
    made = completion("a STO b STOP c", stop="STOP", stream=True)
    texts = [choice["text"] for event in made.events[:-1] for choice in event["choices"]]
    assert "".join(texts) == "a STO b "
    assert "S" not in texts  # never alone: it came together with what ruled a stop out
    assert completion("a STO", stop="STOP").json["choices"][0]["text"] == "a STO"


def test_a_prompt_may_be_ids_or_several() -> None:
    several = completion(prompt=["Hi", "Ho ho"], n=2).json
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert several["usage"]["prompt_tokens"] == 7
    ids = completion(prompt=[41, 74], echo=True).json
    assert ids["choices"][0]["text"] == "HiHello there."
    assert completion(prompt=[[41, 74], [41]]).json["usage"]["prompt_tokens"] == 3


def test_the_route_is_told_with_every_answer() -> None:
    route = [{"peer": "p", "span": "0:4", "name": ""}]
    none = {"failovers": 0, "replayed_tokens": 0, "reused_tokens": 0}
    assert chat().json["x_swarm"] == {"route": route, **none}
    events = chat(stream=True).events
    assert events[0]["x_swarm"] == {"route": route}
    assert events[-2]["x_swarm"]["failovers"] == 0
    assert chat(n=2).json["x_swarm"]["routes"] == [route, route]


def test_each_answer_has_a_seed_of_its_own_and_the_request_a_first_one() -> None:
    def texts(seed: int) -> list[str]:
        made = completion("ab", prompt="Hi", n=4, seed=seed, temperature=2, ignore_eos=True)
        return [choice["text"] for choice in made.json["choices"]]

    assert texts(5) == texts(5)
    assert len(set(texts(5))) == 4
    assert texts(6)[:3] == texts(5)[1:]


def test_a_bias_and_penalties_reach_the_choice() -> None:
    never = {str(8): -100}  # "'"
    plain, biased = completion("''''"), completion("''''", logit_bias=never)
    assert plain.json["choices"][0]["text"] == "''''"
    assert "'" not in biased.json["choices"][0]["text"]
    swarm = ScriptedSwarm("aaaa")
    fields = {"model": MODEL, "prompt": "Hi", "temperature": 0, "max_tokens": 4}
    asked(swarm, COMPLETIONS, {**fields, "frequency_penalty": 0.5, "repetition_penalty": 1.5})
    wishes = swarm.sessions[0].wishes
    assert wishes[0].penalised == (41, 74)
    assert wishes[-1].penalised == (41, 66, 74)


def test_the_models_own_template_is_used_and_its_text_gets_no_more_ends() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}>"
    swarm = ScriptedSwarm(" yes", template)
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": content}]
    fields = {"model": MODEL, "messages": messages, "chat_template_kwargs": {"mood": "gay"}}
    made = asked(swarm, CHAT, {**fields, "temperature": 0}).json
    assert swarm.prompts == ["<system>Be kind.<user>a\nbgay>"]
    assert made["choices"][0]["message"]["content"] == " yes"


def test_a_template_for_tools_is_used_when_there_are_tools_and_one_of_several_must_be_default() -> (
    None
):
    templates = [
        {"name": "tool_use", "template": "{{ tools[0].function.name }}>"},
        {"name": "default", "template": "plain{{ documents[0] if documents }}>"},
    ]
    fields = {"model": MODEL, "messages": HELLO, "temperature": 0}
    tools = [{"type": "function", "function": {"name": "look"}}]
    swarm = ScriptedSwarm(" yes", templates)
    asked(swarm, CHAT, {**fields, "tools": tools})
    asked(swarm, CHAT, {**fields, "chat_template_kwargs": {"documents": ["doc"]}})
    assert swarm.prompts == ["look>", "plaindoc>"]
    made = asked(ScriptedSwarm(" yes", templates[:1]), CHAT, fields)
    assert made.status == 400
    assert "tool_use" in made.json["error"]["message"]


def test_parts_of_a_content_reach_a_template_that_loops_over_them() -> None:
    template = (
        "{% for m in messages %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endfor %}"
    )
    swarm = ScriptedSwarm(" yes", template)
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": content}]
    asked(swarm, CHAT, {"model": MODEL, "messages": messages, "temperature": 0})
    assert swarm.prompts == ["(a)(b)"]


def test_without_a_template_the_plain_one_ends_where_the_user_would_speak() -> None:
    swarm = ScriptedSwarm(" Yes.\nUser: and you?")
    made = asked(swarm, CHAT, {"model": MODEL, "messages": HELLO, "temperature": 0}).json
    assert swarm.prompts == ["User: Hi\n\nAssistant:"]
    assert made["choices"][0]["message"]["content"] == "Yes."
    assert made["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "much"}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"97": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    made = chat(**fields)
    assert made.status == 400
    assert made.json["error"]["param"] == param
    assert made.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [4711]}, "prompt"),
        ({"prompt": ["\ud800"]}, None),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["x"] * 40}, "prompt"),
    ],
)
def test_so_is_a_completion_that_cannot_be(fields: dict[str, Any], param: str | None) -> None:
    made = completion(**fields)
    assert (made.status, made.json["error"]["param"]) == (400, param)


def test_a_body_that_is_no_json_of_ours_is_refused() -> None:
    swarm = ScriptedSwarm("x")
    for body in (b"{", b"\xff", b"[" * 100_000, b'{"model": NaN}', b""):
        assert asked(swarm, CHAT, body).status == 400


def test_the_likeliest_ids_are_told_with_shares_over_all_ids() -> None:
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    found = Candidates(
        np.array([5, 4, 9], np.int32), logits, np.array([2], np.int32), logits[:1] - 1, 1, 0.0
    )
    total = np.log(np.exp([3.0, 2.0, 1.0, 2.0, 0.0]).sum())
    assert [token for token, _ in found.likeliest(3)] == [5, 2, 4]
    shares = [share for _, share in found.likeliest(3)]
    assert shares == pytest.approx([3 - total, 2 - total, 2 - total])
    assert found.log_probability(9) == pytest.approx(1 - total)
    assert len(found.likeliest(20)) == 4
