"""Keys, names, health, figures, addresses, and the other forms of a chat."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from gateway_world import (
    MODEL,
    ScriptedSwarm,
    WorldSwarm,
    application_of,
    ask,
    asked,
    record,
)
from session_worlds import World, run

from swarm.errors import BadInput, NoRoute, PeerFault, Refusal, Unreachable
from swarm.gateway.desk import Desk
from swarm.gateway.faults import ApiError, anthropic_form, fault_of, openai_form
from swarm.gateway.settings import GatewaySettings, parse_address, read_keys

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}<assistant>"
)
CALL = 'I look. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        (":0", ("127.0.0.1", 0)),
        ("8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        ("box.local:80", ("box.local", 80)),
    ],
)
def test_an_address_without_a_host_is_on_loopback(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "1:2:3", "::1", "x:99999", "http://x:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--api"):
        parse_address(text)


def test_keys_come_from_flags_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n beta \n")
    assert read_keys(("x",), file) == ("x", "alpha", "beta")
    assert read_keys((), None) == ()
    file.write_text("# none\n")
    with pytest.raises(BadInput, match="no key"):
        read_keys((), file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_keys((), tmp_path / "none")
    with pytest.raises(BadInput, match="printable"):
        read_keys(("a b",), None)


def test_only_who_shows_a_key_is_answered() -> None:
    async def main() -> None:
        app = application_of(ScriptedSwarm("x"), keys=("first", "second"))
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic first"}, 401),
            ({"authorization": "Bearer first"}, 200),
            ({"authorization": "bearer second"}, 200),
            ({"x-api-key": "second"}, 200),
        ):
            assert (await ask(app, "/v1/models", headers=headers)).status == status
        told = await ask(app, "/metrics")
        assert (told.status, told.json["error"]["code"]) == (401, "invalid_api_key")
        assert (await ask(app, "/health")).status == 200

    trio.run(main)


def test_without_keys_only_who_names_this_machine_is_answered_on_loopback() -> None:
    """A page elsewhere can point its own name at our address, and then ask as a neighbour would."""

    async def main() -> None:
        own = [
            "localhost",
            "localhost:80",
            "LOCALHOST:8000",
            "127.0.0.1:8000",
            "[::1]:8000",
            "[::1]",
        ]
        app = application_of(ScriptedSwarm("x"))
        for host in own:
            assert (await ask(app, "/v1/models", headers={"host": host})).status == 200, host
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "10.0.0.1:8000",
        ):
            told = await ask(app, "/v1/models", headers={"host": host})
            assert (told.status, told.json["error"]["code"]) == (403, "host_not_allowed"), host
        for settings in ({"host": "0.0.0.0"}, {"keys": ("key",)}):
            opened = application_of(ScriptedSwarm("x"), **settings)
            headers = {"host": "evil.example", "x-api-key": "key"}
            assert (await ask(opened, "/v1/models", headers=headers)).status == 200

    trio.run(main)


def test_every_path_but_health_and_the_description_needs_the_key() -> None:
    async def main() -> None:
        app = application_of(ScriptedSwarm("x"), keys=("key",))
        paths = (await ask(app, "/openapi.json")).json["paths"]
        for path, methods in paths.items():
            made = await ask(app, path, {} if "post" in methods else None)
            assert made.status == (200 if path == "/health" else 401), path

    trio.run(main)


def test_the_model_bears_the_name_that_most_servers_give_it() -> None:
    class Named(ScriptedSwarm):
        def records(self) -> Any:
            hubs = ("org/good", "org/good", "org/bad")
            found = [record(f"p{n}", hub_name=hub) for n, hub in enumerate(hubs)]
            return (*found, record("p9", name="many"), record("p8"), record("p7"))

    swarm = Named("x")
    assert Desk(swarm, GatewaySettings()).model_name == "org/good"
    for name, status in (("org/good", 200), ("good", 200), ("org/bad", 404), ("", 404)):
        body = {"model": name, "messages": HELLO}
        assert asked(swarm, "/v1/chat/completions", body).status == status
    assert asked(swarm, "/v1/models/org/good").json["id"] == "org/good"


def test_a_model_that_nobody_serves_any_more_is_missing_and_not_unknown() -> None:
    async def body(world: World) -> None:
        servers = await world.add("0:4")
        app = application_of(WorldSwarm(world), route_seconds=1.0)
        asking = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
        world.servers.clear()
        never = await ask(app, "/v1/completions", asking)
        world.servers += servers
        assert (await ask(app, "/v1/completions", asking)).status == 200
        world.servers.clear()
        gone = await ask(app, "/v1/completions", asking)
        assert [never.status, gone.status] == [404, 503]

    run(body)


def test_health_names_the_blocks_that_nobody_serves() -> None:
    class Partial(ScriptedSwarm):
        def records(self) -> Any:
            return (record("p", "0:2"), record("q", "3:4"))

    made = asked(Partial("x"), "/health")
    assert (made.status, made.json) == (503, {"status": "uncovered", "uncovered": ["2:3"]})


def test_figures_count_what_was_said() -> None:
    async def main() -> None:
        app = application_of(ScriptedSwarm("Hello."))
        body = {"model": MODEL, "messages": HELLO, "temperature": 0, "n": 2}
        await ask(app, "/v1/chat/completions", body)
        await ask(app, "/v1/chat/completions", {"model": "other", "messages": HELLO})
        lines = (await ask(app, "/metrics")).body.decode().splitlines()
        for line in (
            "generation_tokens_total 14.0",
            "prompt_tokens_total 40.0",
            'request_success_total{finished_reason="stop"} 2.0',
            "time_to_first_token_seconds_count 2.0",
            "time_per_output_token_seconds_count 12.0",
            "num_requests_running 0.0",
            'http_responses_total{path="/v1/chat/completions",status="404"} 1.0',
        ):
            assert line in lines

    trio.run(main)


def test_what_is_not_there_is_told_in_the_same_form() -> None:
    assert asked(ScriptedSwarm("x"), "/nothing").json["error"]["type"] == "not_found_error"
    wrong = asked(ScriptedSwarm("x"), "/v1/models", {})
    assert (wrong.status, "GET" in wrong.headers["allow"]) == (405, True)


def test_a_body_that_a_page_could_send_unasked_is_refused() -> None:
    async def main() -> None:
        app = application_of(ScriptedSwarm("x"))
        body = {"model": MODEL, "messages": HELLO}
        for kind, status in (
            ("text/plain", 415),
            ("application/x-www-form-urlencoded", 415),
            ("application/json; charset=utf-8", 200),
        ):
            headers = {"content-type": kind}
            made = await ask(app, "/v1/chat/completions", body, headers=headers)
            assert made.status == status

    trio.run(main)


def test_a_bug_is_a_500_and_the_next_request_is_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        swarm = ScriptedSwarm("x")
        app = application_of(swarm)
        body = {"model": MODEL, "messages": HELLO, "temperature": 0}
        script, swarm.script = swarm.script, []  # our own double breaks
        broken = await ask(app, "/v1/chat/completions", body)
        swarm.script = script
        assert (broken.status, broken.json["error"]["type"]) == (500, "server_error")
        assert (await ask(app, "/v1/chat/completions", body)).status == 200

    trio.run(main)
    assert "failed" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (BadInput("x"), 400, None),
        (Refusal("x", retry_seconds=7.2), 429, "8"),
        (NoRoute("x", is_full=True), 429, "5"),
        (NoRoute("x", uncovered=("4:8",)), 503, "5"),
        (Unreachable("x"), 503, "5"),
        (PeerFault("x"), 503, "5"),
    ],
)
def test_errors_of_the_swarm_have_a_status_each(error: Any, status: int, retry: str | None) -> None:
    told = fault_of(error, ("0:4",))
    assert (told.status, told.headers.get("retry-after")) == (status, retry)
    assert "0:4" in openai_form(told)["error"]["message"]
    assert anthropic_form(ApiError(status, "x"))["type"] == "error"


def test_embeddings_are_the_mean_of_the_hidden_states_at_length_1() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        computed = served.executor._computed

        def hidden(job: Any) -> Any:
            computed(job)
            ids = np.frombuffer(job.payload["ids"][2], "<i4")
            states = np.stack([ids, np.full(len(ids), -3.0)], axis=1).astype("<f4")
            kind = type(next(iter(computed(job).values()), None))
            tensor = ("float32", (1, len(ids), 2), states.tobytes())
            return {"hidden": kind(*tensor) if kind is not type(None) else tensor}

        served.executor._computed = hidden  # type: ignore[method-assign]
        app = application_of(WorldSwarm(world))
        given = {"model": MODEL, "input": ["ab", "b" * 300]}
        made = await ask(app, "/v1/embeddings", given)
        assert made.status == 200, made.body
        first, second = (np.array(each["embedding"]) for each in made.json["data"])
        assert first == pytest.approx(np.array([66.5, -3]) / np.hypot(66.5, 3))
        assert second == pytest.approx(np.array([67, -3]) / np.hypot(67, 3))
        assert made.json["usage"]["prompt_tokens"] == 302
        packed = {"model": MODEL, "input": "ab", "encoding_format": "base64"}
        told = (await ask(app, "/v1/embeddings", packed)).json["data"][0]["embedding"]
        assert np.frombuffer(base64.b64decode(told), "<f4") == pytest.approx(first)
        for wrong in ({"dimensions": 5}, {"input": []}, {"input": "x" * 600}):
            assert (await ask(app, "/v1/embeddings", {**packed, **wrong})).status == 400

    run(body)


def test_embeddings_that_take_too_long_are_ended() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        served.executor.is_stuck = True
        app = application_of(WorldSwarm(world), answer_seconds=20.0)
        made = await ask(app, "/v1/embeddings", {"model": MODEL, "input": "ab"})
        assert (made.status, made.json["error"]["code"]) == (503, "timeout")
        await trio.sleep(1)
        assert served.server.is_idle

    run(body)


def test_ids_and_texts_are_turned_into_each_other() -> None:
    swarm = ScriptedSwarm("x")
    made = asked(swarm, "/tokenize", {"prompt": "Hi"}).json
    assert made == {"count": 2, "max_model_len": 512, "tokens": [41, 74]}
    assert asked(swarm, "/detokenize", {"tokens": [41, 74, 0]}).json == {"prompt": "Hi<end>"}
    assert asked(swarm, "/tokenize", {"messages": HELLO}).json["count"] == 20
    assert asked(swarm, "/tokenize", {}).status == 400


def messages(script: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, TEMPLATE)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 200, "temperature": 0, **fields}
    return asked(swarm, "/v1/messages", body), swarm


WEATHER = {"name": "weather", "input_schema": {"type": "object"}}


def test_anthropics_messages_reach_the_template_and_come_back_as_blocks() -> None:
    used = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rom"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "Rain"}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result, {"type": "text", "text": "And Oslo?"}]},
    ]
    made, swarm = messages(CALL, messages=given, system="Be kind.", tools=[WEATHER])
    assert swarm.prompts == [
        '[weather]<system>Be kind.<user>Hi<assistant>!weather{"city": "Rom"}'
        "<tool>Rain<user>And Oslo?<assistant>"
    ]
    text, use = made.json["content"]
    assert text == {"type": "text", "text": "I look."}
    assert (use["name"], use["input"]) == ("weather", {"city": "Oslo"})
    assert made.json["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("script", "fields", "reason", "stop"),
    [
        ("Hello.", {}, "end_turn", None),
        ("Hello.", {"max_tokens": 3}, "max_tokens", None),
        ("Hello. Bye.", {"stop_sequences": ["Bye"]}, "stop_sequence", "Bye"),
    ],
)
def test_anthropics_reasons(script: str, fields: Any, reason: str, stop: str | None) -> None:
    made, _ = messages(script, **fields)
    assert (made.json["stop_reason"], made.json["stop_sequence"]) == (reason, stop)


def test_anthropics_events_put_together_are_the_whole_message() -> None:
    whole, _ = messages(CALL, tools=[WEATHER])
    made, _ = messages(CALL, tools=[WEATHER], stream=True)
    events = made.events
    names = [line[7:] for line in made.body.decode().split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert starts == stops == [0, 1]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    text = "".join(delta.get("text", "") for delta in deltas)
    arguments = "".join(delta.get("partial_json", "") for delta in deltas)
    assert text == whole.json["content"][0]["text"]
    assert json.loads(arguments) == whole.json["content"][1]["input"]
    assert events[-2]["delta"]["stop_reason"] == whole.json["stop_reason"]
    assert events[-2]["usage"] == whole.json["usage"]
    assert (names[0], names[-1]) == ("message_start", "message_stop")


def test_what_anthropics_form_cannot_ask_for_is_refused_in_its_own() -> None:
    image = [{"role": "user", "content": [{"type": "image"}]}]
    for fields in (
        {"messages": image},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": [{"role": "user", "content": []}]},
        {"tool_choice": {"type": "tool", "name": "x"}},
    ):
        made, _ = messages("x", **fields)
        assert (made.status, made.json["type"]) == (400, "error"), fields
        assert made.json["error"]["type"] == "invalid_request_error"


def test_anthropics_tokens_are_counted_as_they_would_be_sent() -> None:
    swarm = ScriptedSwarm("x", TEMPLATE)
    made = asked(swarm, "/v1/messages/count_tokens", {"model": MODEL, "messages": HELLO})
    assert made.json == {"input_tokens": len("<user>Hi<assistant>")}


def responses(script: str, **fields: Any) -> tuple[Any, ScriptedSwarm]:
    swarm = ScriptedSwarm(script, TEMPLATE)
    body = {"model": MODEL, "input": "Hi", "temperature": 0, **fields}
    return asked(swarm, "/v1/responses", body), swarm


FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}}


def test_responses_take_items_and_give_items() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"a": 1}'}
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "Rain"},
    ]
    made, swarm = responses(CALL, input=given, instructions="Be kind.", tools=[FUNCTION])
    assert swarm.prompts == [
        '[weather]<system>Be kind.<user>Hi<assistant>!weather{"a": 1}<tool>Rain<assistant>'
    ]
    message, called = made.json["output"]
    assert message["content"][0]["text"] == "I look."
    assert (called["name"], json.loads(called["arguments"])) == ("weather", {"city": "Oslo"})
    assert made.json["status"] == "completed"


def test_the_events_of_a_response_end_with_the_whole_one() -> None:
    whole, _ = responses(CALL, tools=[FUNCTION])
    made, _ = responses(CALL, tools=[FUNCTION], stream=True)
    assert [event["sequence_number"] for event in made.events] == list(range(len(made.events)))
    last = made.events[-1]
    assert last["type"] == "response.completed"
    said = "".join(
        event["delta"] for event in made.events if event["type"] == "response.output_text.delta"
    )
    assert said == "I look." == last["response"]["output"][0]["content"][0]["text"]
    assert last["response"]["usage"] == whole.json["usage"]
    assert last["response"]["output"][1]["arguments"] == whole.json["output"][1]["arguments"]


def test_a_response_that_is_cut_is_incomplete() -> None:
    made, _ = responses("Hello.", max_output_tokens=3)
    assert made.json["status"] == "incomplete"
    assert made.json["incomplete_details"] == {"reason": "max_output_tokens"}
    streamed, _ = responses("Hello.", max_output_tokens=3, stream=True)
    assert streamed.events[-1]["type"] == "response.incomplete"


def test_a_response_may_have_to_be_json() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema |= {"additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    made, _ = responses("No.", text=form)
    assert json.loads(made.json["output"][0]["content"][0]["text"]) == {"a": 1}


def test_what_responses_cannot_do_is_refused() -> None:
    for fields in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"input": [{"type": "item_reference"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": []},
    ):
        made, _ = responses("x", **fields)
        assert made.status == 400, fields
