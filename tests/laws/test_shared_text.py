"""Sessions that begin alike, over real processes: what is reused changes no word."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from bench import entered
from preloaded import serving, swarm
from processes import ServerProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.generate import GenerateSettings, generate
from swarm.prefix import PAGE_POSITIONS
from swarm.settings import DEMO_FOLDER

TOKENS = 24
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park "
    "with her friends. One day, she saw a big red ball under a tree. She wanted to play with it, "
    "but a dog came and took the ball away. Lily was very sad. Her mom said, Do not cry, Lily. We "
    "will find a new ball for you. They went to the shop and"
)


class Whole:
    """The model by itself."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
        self.model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def says(self, ids: list[int], count: int = TOKENS) -> list[int]:
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return list(out[0].tolist()[len(ids) :])


@pytest.fixture(scope="module")
def whole() -> Whole:
    return Whole()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[ServerProcess], Path]]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, DEMO_FOLDER, ["0:4", "4:8", "4:8"]) as servers:
        yield servers, home


def generated(home: Path, join: str, prompt: str) -> dict[str, Any]:
    ended = swarm(home, "generate", prompt, "--join", join, "-n", str(TOKENS), "--json")
    assert ended.returncode == 0, ended.stderr
    facts: dict[str, Any] = json.loads(ended.stdout)
    return facts


def pages(count: int) -> int:
    """Positions of the whole pages before the last of so many."""
    return (count - 1) // PAGE_POSITIONS * PAGE_POSITIONS


def test_what_processes_reuse_changes_no_word(
    served: tuple[list[ServerProcess], Path], whole: Whole
) -> None:
    servers, home = served
    join, prompt = servers[0].join, whole.ids(STORY)
    assert pages(len(prompt)) > 0
    first = generated(home, join, STORY)
    again = generated(home, join, STORY)
    assert first["token_ids"] == again["token_ids"] == whole.says(prompt)
    assert (first["reused_tokens"], again["reused_tokens"]) == (0, pages(len(prompt)))
    other = STORY.replace("They went to the shop and", "He said he")
    branched = generated(home, join, other)
    assert branched["token_ids"] == whole.says(whole.ids(other))


def test_a_hop_that_dies_in_a_session_that_reused_changes_no_word(
    served: tuple[list[ServerProcess], Path], whole: Whole
) -> None:
    """Last in this file: it takes a server away."""
    servers, home = served
    victims = {server.peer: server for server in servers[1:]}
    start = whole.ids(STORY)
    count = 2 * TOKENS

    async def main() -> None:
        async with entered(servers, home) as (client, _):
            # the next question of a chat: the first answer is a part of what is reused
            async with client.session(len(start) + count, prompt=start) as session:
                settings = GenerateSettings(most_tokens=count, end_ids=frozenset())
                said = (await generate(session, start, settings)).token_ids
            prompt = [*start, *said, *whole.ids("The next day")]
            spoken = 0
            async with client.session(len(prompt) + TOKENS, prompt=prompt) as session:

                def on_token(_token: int) -> bool:
                    nonlocal spoken
                    spoken += 1
                    if spoken == TOKENS // 2:
                        victims[session.route[1][0]].kill()
                    return False

                settings = GenerateSettings(most_tokens=TOKENS, end_ids=frozenset())
                made = await generate(session, prompt, settings, on_token)
                assert made.reused_tokens == pages(len(start) + len(said)) > pages(len(start))
                assert session.journal.failovers >= 1
            ids = torch.tensor([prompt])
            expected = whole.model.generate(
                ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
            )
            assert made.token_ids == expected[0].tolist()[len(prompt) :]

    trio.run(main)
