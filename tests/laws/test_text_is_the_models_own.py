"""The main law, over real processes and sockets: a swarm says what the whole model would say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from bench import entered
from preloaded import serving, swarm
from processes import ServerProcess, environment

from routing.route import Hop, Route
from routing.span import Span
from swarm.client import Client
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, Generation, generate
from swarm.settings import DEMO_FOLDER

TOKENS = 64
PROMPTS = [
    "Once upon a time",
    "One day, a little girl",
    "The dog was",
    "Tom and his mom went to",
    "There was a big",
    "Lily wanted to",
    "In the park",
    "The sun",
    "A boy named Tim",
    "It was raining and",
    "The cat and the bird",
    "Mom said",
    "Once there was a king",
    "Ben liked to play",
    "The little fish",
    "They all",
]


@pytest.fixture(scope="module", params=["stories260K", "demo"])
def model(request: pytest.FixtureRequest) -> Path:
    if request.param == "demo":
        return DEMO_FOLDER
    shared: Path = request.getfixturevalue("shared_data")
    return shared / "stories260K"


class Told:
    """A swarm of processes, and what the whole model says by itself."""

    def __init__(self, servers: list[ServerProcess], blocks: int, model: Path, home: Path) -> None:
        self.servers = servers
        self.blocks = blocks
        self.model = model
        self.home = home
        self.prompts, self.references = _references(model)

    def holder(self, span: str) -> str:
        return next(server.peer for server in self.servers if server.span == span)

    def route(self, *hops: tuple[str, str]) -> Route:
        """Hops as (span of the server, part of it that is used)."""
        return Route(tuple(Hop(self.holder(held), Span.parse(part)) for held, part in hops), 0.1)


def _references(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    said = []
    for ids in prompts:
        out = whole.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        said.append(out[0].tolist()[len(ids) :])
    return prompts, said


@pytest.fixture(scope="module")
def told(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    home = tmp_path_factory.mktemp("home")
    blocks = 5 if model.name == "stories260K" else 8
    spans = ["0:2", f"2:{blocks}", f"0:{blocks}", "1:3", f"3:{blocks}"]
    with serving(home, model, spans) as servers:
        yield Told(servers, blocks, model, home)


async def say(
    client: Client, identity: Any, route: Route, prompt: list[int], on_token: Any = None
) -> tuple[Generation, Any]:
    taken = [route]

    async def find(avoid: frozenset[str], needed: int) -> Route:
        return taken.pop() if taken else await client.find_route(avoid, needed)

    settings = GenerateSettings(
        most_tokens=TOKENS, end_ids=frozenset(client.model.card.end_of_sequence_ids)
    )
    async with open_session(
        client.host,
        identity,
        find,
        fingerprint=client.model.fingerprint,
        max_tokens=len(prompt) + TOKENS,
    ) as session:
        made = await generate(session, prompt, settings, on_token or (lambda _token: False))
        return made, session


@pytest.mark.parametrize("hops", [1, 2, 3, 5])
def test_greedy_text_through_any_number_of_processes_is_that_of_generate(
    told: Told, hops: int
) -> None:
    blocks = told.blocks
    whole, rest, tail = f"0:{blocks}", f"2:{blocks}", f"3:{blocks}"
    route = {
        1: [(whole, whole)],
        2: [("0:2", "0:2"), (rest, rest)],
        3: [("0:2", "0:2"), ("1:3", "2:3"), (tail, tail)],
        5: [("0:2", "0:1"), ("1:3", "1:2"), (rest, "2:3"), (tail, "3:4"), (whole, f"4:{blocks}")],
    }[hops]

    async def main() -> None:
        async with entered(told.servers, told.home) as (client, identity):
            said: dict[int, list[int]] = {}

            async def one(number: int) -> None:
                prompt = told.prompts[number]
                made, session = await say(client, identity, told.route(*route), prompt)
                assert session.journal.failovers == 0
                said[number] = made.token_ids

            for four in range(0, len(PROMPTS), 4):
                async with trio.open_nursery() as nursery:
                    for number in range(four, four + 4):
                        nursery.start_soon(one, number)
            assert [said[number] for number in range(len(PROMPTS))] == told.references

    trio.run(main)


def test_the_command_prints_the_models_own_text_with_an_empty_home(
    told: Told, tmp_path: Path
) -> None:
    made = swarm(
        tmp_path, "generate", PROMPTS[0], "--join", told.servers[0].join, "--json", "-n", "64"
    )
    answer = json.loads(made.stdout)
    assert answer["token_ids"] == told.references[0], made.stderr
    assert answer["tokens"] == len(answer["token_ids"])
    assert answer["failovers"] == 0


def test_a_real_generation_imports_no_torch(told: Told, tmp_path: Path) -> None:
    program = """
import sys
import cli
code = cli.run(sys.argv[1:])
heavy = {"torch", "transformers", "bitsandbytes", "safetensors"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    made = subprocess.run(
        [sys.executable, "-c", program, "generate", "Once", "--join", told.servers[0].join],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip()


def test_a_server_killed_in_mid_generation_changes_nothing_in_the_text(told: Told) -> None:
    """Last in this file: it takes a server away."""
    blocks = told.blocks
    rest = f"2:{blocks}"
    victim = next(server for server in told.servers if server.span == rest)
    route = told.route(("0:2", "0:2"), (rest, rest))

    async def main() -> None:
        async with entered(told.servers, told.home) as (client, identity):
            spoken = 0

            def on_token(_token: int) -> bool:
                nonlocal spoken
                spoken += 1
                if spoken == TOKENS // 2:
                    victim.kill()
                return False

            made, session = await say(client, identity, route, told.prompts[0], on_token)
            assert made.token_ids == told.references[0]
            assert session.journal.failovers == 1
            assert victim.peer not in {peer for peer, _ in session.route}

    trio.run(main)
