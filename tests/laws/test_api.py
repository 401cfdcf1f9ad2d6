"""The official `openai` client, unmodified, against a real `swarm serve --api`."""

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import anthropic
import openai
import pydantic
import pytest
from api_swarm import PROMPT, ApiSwarm, api_swarm, logs
from openai import OpenAI
from preloaded import swarm

KEY = "a-key-of-the-tests"
MESSAGES = [{"role": "user", "content": "Tell me of a girl and her dog."}]
LONG = {
    "model": "demo",
    "messages": MESSAGES,
    "max_tokens": 120,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiSwarm]:
    home = tmp_path_factory.mktemp("home")
    with api_swarm(home, "0:4", ["4:8", "4:8"], "--api-key", KEY) as found:
        yield found
    assert "Traceback" not in logs(home)


@pytest.fixture
def client(served: ApiSwarm) -> Iterator[OpenAI]:
    with asking(served) as made:
        yield made


def asking(served: ApiSwarm, **options: object) -> OpenAI:
    given = {"api_key": KEY, "max_retries": 0, "timeout": 60.0, **options}
    return OpenAI(base_url=f"{served.url}/v1", **given)  # type: ignore[arg-type]


def metric(served: ApiSwarm, name: str) -> float:
    asked = urllib.request.Request(
        f"{served.url}/metrics", headers={"authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_the_model_is_listed_and_found_by_its_name(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "demo"


def test_a_greedy_completion_is_what_swarm_generate_says(served: ApiSwarm, client: OpenAI) -> None:
    said = swarm(served.home, "generate", PROMPT, "--join", served.join, "-n", "24", "--json")
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    assert made.choices[0].text == json.loads(said.stdout)["text"]
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 24)
    assert made.x_swarm["route"][0]["span"] == "0:4"  # type: ignore[attr-defined]


def test_a_stream_holds_what_the_whole_answer_holds(client: OpenAI) -> None:
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert said[0].delta.role == "assistant"
    assert "".join(each.delta.content or "" for each in said) == whole.choices[0].message.content
    assert [each.finish_reason for each in said if each.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text  # type: ignore[call-overload]
    stop = text[len(text) // 2 :][:6]
    ended = client.completions.create(**asked, stop=[stop, "never"]).choices[0]  # type: ignore[call-overload]
    streamed = list(client.completions.create(**asked, stop=stop, stream=True))  # type: ignore[call-overload]
    assert ended.text == text[: text.index(stop)]
    assert ended.finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in streamed) == ended.text


def test_a_seed_gives_the_same_answers_and_several_differ(client: OpenAI) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 16, "n": 3, "seed": 11}
    first, again = (client.completions.create(**asked) for _ in range(2))  # type: ignore[call-overload]
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_log_probabilities_are_told_and_the_bias_moves_them(client: OpenAI) -> None:
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 3}
    made = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    first = made.choices[0].logprobs.content[0]
    assert first.token == first.top_logprobs[0].token
    assert first.top_logprobs[0].logprob >= first.top_logprobs[1].logprob > -20
    assert first.logprob < 0
    ids = [str(token) for token in range(1000, 1010)]
    bias = dict.fromkeys(ids, 100.0)
    moved = client.chat.completions.create(**asked, logit_bias=bias)  # type: ignore[call-overload]
    assert all(entry.logprob > -5 for entry in moved.choices[0].logprobs.content)
    assert moved.choices[0].message.content != made.choices[0].message.content


def test_penalties_keep_the_model_from_repeating_itself(client: OpenAI) -> None:
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    plain = client.completions.create(**asked).choices[0].text.split()  # type: ignore[call-overload]
    penalties = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    other = client.completions.create(**asked, **penalties).choices[0].text.split()  # type: ignore[call-overload]
    assert len(set(other)) / len(other) > len(set(plain)) / len(plain)


def test_errors_are_those_that_the_client_has_names_for(served: ApiSwarm, client: OpenAI) -> None:
    ask = client.completions.create
    with pytest.raises(openai.NotFoundError, match="other"):
        ask(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        ask(model="demo", prompt=PROMPT, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="512") as long:
        ask(model="demo", prompt="word " * 600)
    assert long.value.code == "context_length_exceeded"
    with asking(served, api_key="another") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.APIStatusError) as large:
        ask(model="demo", prompt="x" * (9 << 20))
    assert large.value.status_code == 413


def test_sixteen_at_once_are_answered_alike(served: ApiSwarm) -> None:
    def ask(_number: int) -> str:
        with asking(served) as one:
            chunks = one.completions.create(
                model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stream=True
            )
            return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(16)))
    assert len(set(texts)) == 1
    assert len(texts[0]) > 40


def test_whoever_hangs_up_leaves_nothing_running(served: ApiSwarm) -> None:
    for is_streamed in (True, False):
        before = metric(served, "generation_tokens_total")
        hung_up(served, is_streamed=is_streamed)
        deadline = time.monotonic() + 10
        while metric(served, "num_requests_running"):
            assert time.monotonic() < deadline
        assert metric(served, "generation_tokens_total") - before < 400


def hung_up(served: ApiSwarm, *, is_streamed: bool) -> None:
    """Ask for a long answer and close the socket when it has begun."""
    asked = {"model": "demo", "prompt": PROMPT, "max_tokens": 500, "temperature": 0}
    asked |= {"extra_body": {"ignore_eos": True}}
    if is_streamed:
        with asking(served) as one:
            stream = one.completions.create(**asked, stream=True)  # type: ignore[call-overload]
            next(iter(stream))
            stream.close()
        return
    with asking(served, timeout=0.5) as one, pytest.raises(openai.APITimeoutError):
        one.completions.create(**asked)  # type: ignore[call-overload]


def test_json_of_a_schema_is_what_a_schema_was_given_for(client: OpenAI) -> None:
    kinds = {"enum": ["dog", "cat"]}
    schema = {"type": "object", "properties": {"kind": kinds, "age": {"type": "integer"}}}
    schema |= {"required": ["kind", "age"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    made = client.chat.completions.create(  # type: ignore[call-overload]
        model="demo", messages=MESSAGES, n=3, seed=1, response_format=form, max_tokens=200
    )
    for choice in made.choices:
        assert choice.finish_reason == "stop"
        told = json.loads(choice.message.content)
        assert told["kind"] in kinds["enum"]
        assert isinstance(told["age"], int)


def test_a_response_and_its_stream_say_what_the_chat_says(client: OpenAI) -> None:
    asked = {"model": "demo", "input": MESSAGES[0]["content"], "temperature": 0}
    asked |= {"max_output_tokens": 12}
    chat = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=12
    )  # type: ignore[call-overload]
    whole = client.responses.create(**asked)  # type: ignore[call-overload]
    events = list(client.responses.create(**asked, stream=True))  # type: ignore[call-overload]
    said = "".join(each.delta for each in events if each.type == "response.output_text.delta")
    assert chat.choices[0].message.content == whole.output_text == said
    assert events[-1].response.usage == whole.usage


def test_embeddings_of_like_texts_are_alike(client: OpenAI) -> None:
    texts = ["The dog ran home.", "A dog was running home.", "1 2 3 4 5 6"]
    made = client.embeddings.create(model="demo", input=texts)
    first, second, third = (each.embedding for each in made.data)
    assert sum(a * a for a in first) == pytest.approx(1, abs=1e-4)

    def likeness(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert likeness(first, second) > likeness(first, third)


def test_the_anthropic_client_is_answered_in_its_own_form(served: ApiSwarm) -> None:
    greedy = {"extra_body": {"temperature": 0}}
    asked = {"model": "demo", "max_tokens": 16, "messages": MESSAGES, "system": "Be kind."}
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
        whole = client.messages.create(**asked, **greedy)  # type: ignore[call-overload]
        with client.messages.stream(**asked, **greedy) as stream:  # type: ignore[arg-type]
            said = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        assert said == whole.content[0].text == streamed.content[0].text  # type: ignore[union-attr]
        assert whole.stop_reason == streamed.stop_reason == "max_tokens"
        assert whole.usage.output_tokens == streamed.usage.output_tokens == 16
        count = client.messages.count_tokens(model="demo", messages=MESSAGES, system="Be kind.")  # type: ignore[arg-type]
        assert count.input_tokens == whole.usage.input_tokens
        with pytest.raises(anthropic.NotFoundError, match="other"):
            client.messages.create(**{**asked, "model": "other"})  # type: ignore[call-overload]
    with (
        anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(**asked)  # type: ignore[call-overload]


class Pet(pydantic.BaseModel):
    """What the model is to describe."""

    kind: Literal["dog", "cat"]
    age: int


def test_the_anthropic_client_parses_what_it_asked_for(served: ApiSwarm) -> None:
    greedy = {"extra_body": {"temperature": 0}}
    asked = {"model": "demo", "max_tokens": 200, "messages": MESSAGES, **greedy}
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
        made = client.messages.parse(**asked, output_format=Pet)  # type: ignore[arg-type]
    assert made.parsed_output is not None
    assert made.parsed_output.kind in ("dog", "cat")


def test_an_answer_goes_on_from_the_assistants_words_as_a_completion_does(
    served: ApiSwarm, client: OpenAI
) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "There was a girl"}]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    prompt = f"User: {MESSAGES[0]['content']}\n\nAssistant: There was a girl"
    asked = {"model": "demo", "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(prompt=prompt, **asked).choices[0].text  # type: ignore[call-overload]
    chat = client.chat.completions.create(messages=begun, extra_body=flags, **asked)  # type: ignore[call-overload]
    assert chat.choices[0].message.content == plain
    asked["extra_body"] = {"temperature": asked.pop("temperature")}
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as other:
        message = other.messages.create(messages=begun, **asked)  # type: ignore[call-overload]
    assert message.content[0].text == plain


def test_a_crowd_is_answered_whole(served: ApiSwarm) -> None:
    def ask(_number: int) -> str:
        made = one.completions.create(model="demo", prompt=PROMPT, max_tokens=2, temperature=0)
        return made.choices[0].text

    with asking(served, timeout=300.0) as one, ThreadPoolExecutor(100) as pool:
        assert len(set(pool.map(ask, range(100)))) == 1


def test_health_needs_no_key(served: ApiSwarm) -> None:
    with urllib.request.urlopen(f"{served.url}/health", timeout=10) as answer:
        assert json.loads(answer.read()) == {"status": "ok", "uncovered": []}


def test_a_server_killed_in_the_middle_of_a_stream_leaves_the_text_as_it_was(
    served: ApiSwarm, client: OpenAI
) -> None:
    undisturbed = client.chat.completions.create(**LONG)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**LONG, stream=True)  # type: ignore[call-overload]
    said, last = [], {}
    for place, chunk in enumerate(stream):
        if place == 0:
            peer = chunk.x_swarm["route"][-1]["peer"]
            (victim,) = [other for other in served.others if other.peer == peer]
        if place == 20:
            victim.kill()
        said.append(chunk.choices[0].delta.content or "")
        last = getattr(chunk, "x_swarm", last)
    assert "".join(said) == undisturbed.choices[0].message.content
    assert last["failovers"] >= 1
    assert last["route"][-1]["peer"] != peer


@pytest.mark.slow
def test_a_route_that_is_lost_for_good_is_an_error_and_never_a_stop(tmp_path: Path) -> None:
    with (
        api_swarm(tmp_path, "0:4", ["4:8"]) as found,
        OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(**LONG, stream=True)  # type: ignore[call-overload]
        begun = [next(stream).choices[0].finish_reason for _ in range(10)]
        found.others[0].kill()
        reasons = iter(lambda: next(stream).choices[0].finish_reason, "")
        with pytest.raises(openai.APIError, match="4:8"):
            begun.extend(reasons)
        assert set(begun) == {None}
        time.sleep(60)  # its record is no longer valid
        with pytest.raises(openai.InternalServerError, match="4:8") as missing:
            client.chat.completions.create(**LONG)  # type: ignore[call-overload]
        assert missing.value.status_code == 503
    assert "Traceback" not in logs(tmp_path)
