"""Fields that change an answer: honoured or refused by name, in every dialect."""

import json
from typing import Any

import numpy as np
import pytest
from gateway_world import CHARACTERS, END, MODEL, PiecesSwarm, ScriptedSwarm, asked
from tokenizers import Tokenizer, decoders, models

from swarm.gateway.ask import ask_of
from swarm.gateway.requests import NEUTRAL, CompletionRequest
from swarm.gateway.settings import GatewaySettings
from swarm.sampling import Candidates, SamplingSettings, choose
from swarm.text import Tokens

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
PATHS = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}<assistant>"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}}
SCHEMA |= {"required": ["a"], "additionalProperties": False}


def ask(path: str, script: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, TEMPLATE)
    body: dict[str, Any] = {"model": MODEL, "temperature": 0}
    body |= {COMPLETIONS: {"prompt": "Hi"}, RESPONSES: {"input": "Hi"}}.get(
        path, {"messages": HELLO}
    )
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 200
    return asked(swarm, path, body | fields), swarm


def said(path: str, made: Any) -> str:
    assert made.status == 200, made.body
    body = made.json
    match path:
        case "/v1/completions":
            return str(body["choices"][0]["text"])
        case "/v1/messages":
            return "".join(block["text"] for block in body["content"])
        case "/v1/responses":
            return "".join(item["content"][0]["text"] for item in body["output"])
    return str(body["choices"][0]["message"]["content"])


def identity(character: str) -> int:
    return CHARACTERS.index(character) + 1


@pytest.mark.parametrize("path", PATHS)
def test_stop_token_ids_end_an_answer_and_are_none_of_it(path: str) -> None:
    made, _ = ask(path, "One, two.", stop_token_ids=[identity(","), 400])
    assert said(path, made) == "One"
    made, _ = ask(path, "One, two.", stop_token_ids=[identity(",")], ignore_eos=True)
    assert said(path, made) == "One"


@pytest.mark.parametrize("path", PATHS)
def test_min_tokens_keep_an_answer_from_ending(path: str) -> None:
    made, swarm = ask(path, "One", min_tokens=9)
    assert said(path, made).startswith("One")
    assert made.json["usage"].get("completion_tokens", made.json["usage"].get("output_tokens")) > 9
    assert END in swarm.sessions[0].wishes[0].penalised  # asked for beside all candidates
    made, _ = ask(path, "One, two.", min_tokens=5, stop_token_ids=[identity(",")])
    assert "," not in said(path, made)[:5]
    most = "max_output_tokens" if path == RESPONSES else "max_tokens"
    assert ask(path, "x", min_tokens=9, **{most: 8})[0].status == 400


def candidates(*logits: float) -> Candidates:
    ids = np.arange(len(logits), dtype=np.int32)
    none = np.zeros(0, np.int32)
    return Candidates(ids, np.array(logits, np.float32), none, none.astype(np.float32), 0, -50.0)


def test_min_p_is_a_share_of_the_likeliest_ones() -> None:
    found = candidates(0.0, float(np.log(0.5)), float(np.log(0.2)))

    def drawn(**fields: Any) -> set[int]:
        return {
            choose(found, SamplingSettings(temperature=1, seed=seed, **fields), 0, {})
            for seed in range(80)
        }

    assert drawn() == {0, 1, 2}
    assert drawn(min_p=0.4) == {0, 1}
    assert drawn(min_p=0.6) == {0}
    assert drawn(min_p=1.0) == {0}


@pytest.mark.parametrize("path", PATHS)
def test_min_p_reaches_the_choice(path: str) -> None:
    texts = {said(path, ask(path, "ab", temperature=1, seed=s, min_p=1)[0]) for s in range(8)}
    assert texts == {"ab"}
    made, _ = ask(path, "ab", min_p=2)
    assert made.status == 400


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"guided_json": SCHEMA}, '{"a": 1}'),
        ({"guided_json": json.dumps(SCHEMA)}, '{"a": 1}'),
        ({"structured_outputs": {"json": SCHEMA}}, '{"a": 1}'),
        ({"guided_regex": "[0-9]{3}"}, "123"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123"),
        ({"guided_choice": ["yes", "no"]}, "yes"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes"),
        ({"guided_grammar": 'root ::= "a" "b"+ "c"'}, "abbc"),
    ],
)
def test_a_form_is_kept_to_whatever_the_model_would_say(
    path: str, fields: dict[str, Any], told: str
) -> None:
    assert said(path, ask(path, told, **fields)[0]) == told
    other = said(path, ask(path, "Well, I think", **fields)[0])
    if "json" in str(fields):
        assert list(json.loads(other)) == ["a"]
    else:
        assert len(other) >= len(told) - 1
        assert "W" not in other


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "nonsense ::="}, "guided_grammar"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_refused(
    path: str, fields: dict[str, Any], param: str
) -> None:
    made, _ = ask(path, "x", **fields)
    assert made.status == 400
    assert path == MESSAGES or made.json["error"]["param"] == param


def test_a_completion_may_have_a_response_format() -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    assert list(json.loads(said(COMPLETIONS, ask(COMPLETIONS, "No", response_format=form)[0])))


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_anthropics_structured_output_is_of_its_schema(name: str) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    given = {"output_config": {"format": form}, "output_format": form}[name]
    made, _ = ask(MESSAGES, "No, I will not.", **{name: given})
    assert list(json.loads(said(MESSAGES, made))) == ["a"]
    made, _ = ask(MESSAGES, "x", output_config={"format": {**form, "schema": {"type": "beast"}}})
    assert made.status == 400
    assert said(MESSAGES, ask(MESSAGES, "x", output_config={"effort": "low"})[0]) == "x"


CHANGED = {
    "n": 2,
    "best_of": 2,
    "use_beam_search": True,
    "length_penalty": 0,
    "skip_special_tokens": False,
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "prompt_logprobs": 1,
    "logprobs": 1,
    "stop": ["x"],
    "suffix": "x",
    "typical_p": 0.5,
    "echo": True,
    "chat_template": "x",
    "response_format": {"type": "json_object"},
    "truncate_prompt_tokens": 5,
    "max_new_tokens": 5,
}
OWN: dict[str, tuple[str, ...]] = {
    CHAT: ("n", "logprobs", "stop", "response_format"),
    COMPLETIONS: ("n", "logprobs", "stop", "response_format", "echo"),
}


@pytest.mark.parametrize("path", PATHS)
def test_what_would_change_the_answer_and_is_not_done_is_refused_by_its_name(path: str) -> None:
    for name, value in CHANGED.items():
        if name in OWN.get(path, ()):
            continue
        made, _ = ask(path, "x", **{name: value})
        assert (made.status, name in made.json["error"]["message"]) == (400, True), name
        assert path == MESSAGES or made.json["error"]["param"] == name


@pytest.mark.parametrize("path", PATHS)
def test_what_changes_nothing_is_passed_over(path: str) -> None:
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    neutral |= {"user": "me", "store": True, "service_tier": "auto", "nonsense": [1]}
    kept = {"logprobs", "max_tokens"}  # false is no number, and there must be one
    for name, value in neutral.items():
        made, _ = ask(path, "x", **{name: value})
        assert name in kept or made.status == 200, (name, made.body)
    assert said(path, ask(path, "x", **dict.fromkeys(CHANGED))[0]) == "x"


def test_the_other_dialects_take_what_a_chat_takes() -> None:
    never = {str(identity("x")): -100}
    for path in PATHS:
        assert "x" not in said(path, ask(path, "xxx", logit_bias=never, ignore_eos=False)[0])
        _, swarm = ask(path, "x", repetition_penalty=1.5)
        assert swarm.sessions[0].wishes[0].penalised
        if path != COMPLETIONS:
            _, swarm = ask(path, "x", chat_template_kwargs={"mood": "gay"})
            assert swarm.prompts == ["<user>Higay<assistant>"]


def test_log_probabilities_of_responses_are_refused() -> None:
    for fields in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}):
        assert ask(RESPONSES, "x", **fields)[0].status == 400
    made, _ = ask(RESPONSES, "x", include=["reasoning.encrypted_content"], top_logprobs=0)
    assert made.status == 200


def byte_level() -> Tokens:
    """Tokens that are parts of characters, some with whole ones beside them."""
    pieces = [
        "<end>",
        "a",
        "\u0120\u00f0\u0141",
        "\u013a",
        "\u0122",
        "\u00e9",
        "a\u00ef\u00bf\u00bd",
    ]
    made = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    made.decoder = decoders.ByteLevel()
    return Tokens({"tokenizer.json": made.to_str().encode()})


def test_the_bytes_of_a_token_are_its_own() -> None:
    tokens = byte_level()
    parts = [tokens.bytes_of(token) for token in range(1, 7)]
    assert parts == [b"a", b" \xf0\x9f", b"\x98", b"\x80", b"\xe9", b"a\xef\xbf\xbd"]
    assert b"".join(parts[1:4]).decode() == " \N{GRINNING FACE}"
    assert tokens.bytes_of(99) == b""
    vocabulary = {"<unk>": 0, "<0xF0>": 1, "\u2581a": 2}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fallback = Tokens({"tokenizer.json": made.to_str().encode()})
    assert fallback.bytes_of(1) == b"\xf0"


def test_parts_of_a_character_are_told_as_their_bytes() -> None:
    wanted = list("\N{GRINNING FACE}".encode())
    parts = ["\u00f0", "\u0141", "\u013a", "\u0122"]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 9}
    asking = {**body, "prompt": [6, 7], "logprobs": 2}
    (choice,) = asked(PiecesSwarm(parts), COMPLETIONS, asking).json["choices"]
    assert choice["text"] == "\N{GRINNING FACE}"
    names = [f"bytes:\\x{byte:02x}" for byte in wanted]
    assert choice["logprobs"]["tokens"][:4] == names
    assert names[0] in choice["logprobs"]["top_logprobs"][0]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2
    chat = {**body, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    swarm = PiecesSwarm(parts)
    for fields in ({}, {"stream": True}):
        made = asked(swarm, CHAT, {**chat, **fields})
        events = made.events[:-1] if fields else [made.json]
        logs = [c["logprobs"]["content"] for e in events for c in e["choices"] if c["logprobs"]]
        entries = [entry for each in logs for entry in each]
        assert [byte for entry in entries for byte in entry["bytes"]][:4] == wanted
        assert entries[0]["top_logprobs"][0]["bytes"] == wanted[:1]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"guided_choice": ["One", "On\x1f"]}, r"no tokens to say 'On\x1f'"),
        ({"guided_regex": "\x1f+"}, "allows no token"),
    ],
)
def test_a_form_that_cannot_be_said_is_refused_before_a_stream_has_begun(
    form: dict[str, Any], told: str, is_streamed: bool
) -> None:
    body = {"model": MODEL, "prompt": "x", "stream": is_streamed, **form}
    made = asked(ScriptedSwarm("yes"), "/v1/completions", body)
    assert made.status == 400, made.body
    assert told in made.json["error"]["message"]


def test_stop_ids_beyond_the_vocabulary_never_come_and_are_asked_of_no_server() -> None:
    card = ScriptedSwarm("yes").model.card
    beyond = card.vocabulary_size
    request = CompletionRequest(model=MODEL, prompt="Hi", stop_token_ids=[1, beyond], min_tokens=1)
    made = ask_of(request, [[5]], 9, card, GatewaySettings())
    assert 1 in made.choices[0].settings.end_ids
    assert max(made.choices[0].settings.end_ids | made.stop_ids) < beyond
