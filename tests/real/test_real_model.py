"""A real chat model of 30 blocks in a real swarm: what it says is what transformers says of it.

`scripts/real_model.py` makes its folder, `scripts/test -m real` runs this. Each process computes
with one thread.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import real_model
import torch
import trio
from bench import entered
from openai import OpenAI
from preloaded import Preloaded, serving
from processes import ServerProcess, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from blocks.checkpoint import open_checkpoint
from blocks.load import Dtype, load_stack
from blocks.quantize import Quant
from blocks.stack import Stack
from routing.route import Hop, Route
from routing.span import Span
from swarm.client import Client
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, generate
from swarm.text import Tokens

pytestmark = [pytest.mark.real, pytest.mark.slow]

TOKENS = 32
END = 2  # <|im_end|>
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json")
QUESTIONS = (
    "What is the capital of France?",
    "Count from 1 to 12, please.",
    "Write a haiku about the sea in 1998.",
)
SPANS = ["0:30", "0:15", "15:30", "6:18", "12:24"]
ROUTES = {  # hops as (the span of the server, the part of it that is used)
    1: [("0:30", "0:30")],
    2: [("0:15", "0:15"), ("15:30", "15:30")],
    5: [
        ("0:15", "0:6"),
        ("6:18", "6:12"),
        ("12:24", "12:18"),
        ("15:30", "18:24"),
        ("0:30", "24:30"),
    ],
}
FORMATS = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "float32", "--quant", "int8"),
    "nf4": ("--dtype", "float32", "--quant", "nf4"),
}

Kill = Callable[[int], None]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = real_model.default_folder()
    if not (found / "config.json").is_file():
        pytest.skip(f"no model at {found}: scripts/real_model.py makes it, or set SWARM_REAL_MODEL")
    return found


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def servers(
    form: str, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[ServerProcess], Path]]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, folder, SPANS, FORMATS[form]) as found:
        yield found, home


@pytest.fixture(scope="module")
def right(form: str, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers says in float32; elsewhere, where it rounds otherwise, one stack of ours.

    In bfloat16 two ids often have the same logit, or one a rounding apart: the last test.
    """
    if form == "float32":
        return [whole(folder, form, prompt).said for prompt in prompts]
    stack = one_stack(folder, form)
    return [greedy(stack, prompt) for prompt in prompts]


class Whole(NamedTuple):
    said: list[int]
    logits: list[torch.Tensor]  # [vocabulary], of each id said


def whole(folder: Path, dtype: str, prompt: list[int]) -> Whole:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, **wanted)
    said = made.sequences[0, len(prompt) :].tolist()
    return Whole(said, [logits[0].float() for logits in made.logits])


def one_stack(folder: Path, form: str) -> Stack:
    checkpoint = open_checkpoint(folder)
    options = dict(zip(*[iter(FORMATS[form])] * 2, strict=True))
    dtype, quant = cast(Dtype, options["--dtype"]), cast(Quant, options.get("--quant", "none"))
    return load_stack(checkpoint, 0, checkpoint.blocks, dtype=dtype, quant=quant)


def greedy(stack: Stack, prompt: list[int], forced: Sequence[int] = ()) -> list[int]:
    """The likeliest ids to the end, or of each position when the answer is `forced`."""
    cache, ids, said = stack.new_cache(), prompt, list[int]()
    while len(said) < (len(forced) or TOKENS) and (forced or said[-1:] != [END]):
        start = cache.length
        logits = stack.run(torch.tensor([ids]), cache=cache, start=start, logits_for=1)
        said.append(int(logits[0, -1].argmax()))
        ids = [forced[len(said) - 1]] if forced else said[-1:]
    return said


def said_by(
    servers: tuple[list[ServerProcess], Path],
    hops: int,
    prompts: Sequence[list[int]],
    on_spoken: Kill = lambda _count: None,
) -> tuple[list[list[int]], int]:
    """The answers through so many servers, and how many failovers that took."""
    found, home = servers
    peers = {server.span: server.peer for server in found}
    route = Route(
        tuple(Hop(peers[held], Span.parse(part)) for held, part in ROUTES[hops]), seconds=0.1
    )

    async def main() -> tuple[list[list[int]], int]:
        async with entered(found, home) as (client, identity):
            answers, failovers = [], 0
            for prompt in prompts:
                made, lost = await one(client, identity, route, prompt, on_spoken)
                answers.append(made)
                failovers += lost
            return answers, failovers

    return trio.run(main)


async def one(
    client: Client, identity: Any, route: Route, prompt: list[int], on_spoken: Kill
) -> tuple[list[int], int]:
    taken, spoken = [route], 0

    async def find(avoid: frozenset[str], needed: int) -> Route:
        return taken.pop() if taken else await client.find_route(avoid, needed)

    def on_token(_token: int) -> bool:
        nonlocal spoken
        spoken += 1
        on_spoken(spoken)
        return False

    ends = frozenset(client.model.card.end_of_sequence_ids)
    settings = GenerateSettings(most_tokens=TOKENS, end_ids=ends)
    room = len(prompt) + TOKENS
    fingerprint = client.model.fingerprint
    async with open_session(
        client.host, identity, find, fingerprint=fingerprint, max_tokens=room
    ) as session:
        made = await generate(session, prompt, settings, on_token)
        return list(made.token_ids), session.journal.failovers


def test_each_digit_is_a_token_of_its_own_as_the_file_says(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = {name: (folder / name).read_bytes() for name in TOKEN_FILES}
    ours = Tokens(files)
    for text in ("In 2024", "x  12", "  1\n\n2 3", "\u0662\u0663 \u00b2"):
        ids = tokenizer(text).input_ids
        assert ours.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]


@pytest.mark.parametrize("hops", ROUTES)
def test_greedy_answers_through_any_number_of_servers_are_the_models_own(
    servers: tuple[list[ServerProcess], Path],
    prompts: list[list[int]],
    right: list[list[int]],
    hops: int,
) -> None:
    assert said_by(servers, hops, prompts) == (right, 0)


def test_a_chat_through_the_api_is_the_models_own(
    servers: tuple[list[ServerProcess], Path],
    folder: Path,
    right: list[list[int]],
    tmp_path: Path,
) -> None:
    found, home = servers
    words = ["api", "--join", found[0].join, "--port", "0", "--json"]
    gateway = Preloaded(words, environment(home), None, tmp_path / "api.log")
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(right, skip_special_tokens=True)
    try:
        url = json.loads(gateway.stdout.readline())["api"]
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            (model,) = client.models.list().data
            asked: dict[str, Any] = {"model": model.id, "temperature": 0, "max_tokens": TOKENS}
            for question, text in zip(QUESTIONS, texts, strict=True):
                chat = [{"role": "user", "content": question}]
                whole_answer = client.chat.completions.create(messages=chat, **asked)
                parts = client.chat.completions.create(messages=chat, stream=True, **asked)
                assert whole_answer.choices[0].message.content == text
                assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    finally:
        gateway.kill()
        gateway.stdout.close()


def test_a_server_killed_in_the_middle_changes_nothing_in_the_answer(
    servers: tuple[list[ServerProcess], Path], prompts: list[list[int]], right: list[list[int]]
) -> None:
    """The last of those with servers: it takes one away."""
    victim = next(server for server in servers[0] if server.span == "15:30")
    longest = max(range(len(right)), key=lambda number: len(right[number]))

    def kill(spoken: int) -> None:
        if spoken == len(right[longest]) // 2:
            victim.kill()

    assert said_by(servers, 2, [prompts[longest]], kill) == ([right[longest]], 1)


def test_in_bfloat16_another_id_than_transformers_is_one_whose_logit_is_a_rounding_away(
    folder: Path, prompts: list[list[int]]
) -> None:
    stack = one_stack(folder, "bfloat16")
    for prompt in prompts:
        said, logits = whole(folder, "bfloat16", prompt)
        ours = greedy(stack, prompt, forced=said)
        for theirs, mine, row in zip(said, ours, logits, strict=True):
            rounding = float(row[theirs].abs()) * torch.finfo(torch.bfloat16).eps
            assert float(row[theirs] - row[mine]) <= rounding
