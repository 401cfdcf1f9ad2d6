"""Positions that are computed by the length of a text: a swarm says what `generate` says."""

import copy
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import trio
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blocks.checkpoint import model_card, open_checkpoint
from blocks.config import length_scaling
from blocks.executor import Executor
from blocks.load import load_stack
from blocks.thread import ComputeThread
from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, Generation, generate
from swarm.identity import Identity
from swarm.memory import MemoryNetwork
from swarm.model_card import ModelCard
from swarm.prefix import PAGE_POSITIONS
from swarm.server import Room, Server

BLOCKS, VOCABULARY, ORIGINAL, TOKENS = 3, 96, 300, 10
CUTS = (("0:3",), ("0:1", "1:3"), ("0:1", "1:2", "2:3"))
COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 9.0, 17.0, 33.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "llama": {"rope_parameters": LONGROPE},  # keeps its cache where Phi-3 drops it
    "mistral": {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL},
}


class World:
    """A client and two servers of each span."""

    def __init__(self, folder: Path) -> None:
        self.fresh: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        card = json.dumps(model_card(open_checkpoint(folder))).encode()
        self.scaling = ModelCard.read(card).length_scaling
        self.hops: list[Hop] = []
        self.alive: set[str] = set()
        self.references: dict[tuple[tuple[int, ...], int], list[int]] = {}

    async def find(self, avoid: frozenset[str], _needed: int) -> Route:
        alive = [hop for hop in self.hops if hop.peer not in avoid and hop.peer in self.alive]
        return Route(tuple({hop.span: hop for hop in reversed(alive)}.values())[::-1], 0.1)

    def kill(self, hop: Hop) -> None:
        self.alive.remove(hop.peer)
        self.network.kill(hop.peer)

    async def says(
        self,
        prompt: Sequence[int],
        *,
        is_shared: bool = False,
        kill_at: int = 0,
        draft: Any = None,
        tokens: int = TOKENS,
    ) -> Generation:
        """Generate, and check the text."""
        heard = 0

        def on_token(_token: int) -> bool:
            nonlocal heard
            heard += 1
            if heard == kill_at:
                self.kill(self.hops[0])
            return False

        async with open_session(
            self.client,
            self.identity,
            self.find,
            fingerprint="f",
            max_tokens=len(prompt) + tokens,
            prompt=prompt if is_shared else (),
            length_scaling=self.scaling,
        ) as session:
            settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
            made = await generate(session, prompt, settings, on_token, draft)
        assert made.token_ids == self.alone(prompt, tokens)
        return made

    def alone(self, prompt: Sequence[int], tokens: int = TOKENS) -> list[int]:
        """What `generate` says on a model that has seen no other text."""
        known = self.references.get((tuple(prompt), tokens))
        if known is not None:
            return known
        out = copy.deepcopy(self.fresh).generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )
        said = list(out[0].tolist()[len(prompt) :])
        self.references[tuple(prompt), tokens] = said
        return said


@pytest.fixture(scope="module")
def thread() -> Iterator[ComputeThread]:
    with ComputeThread(1) as thread:
        yield thread


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = AutoConfig.for_model(request.param, **COMMON | MODELS[request.param])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    made = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(made)
    return made


@asynccontextmanager
async def world_of(
    folder: Path, thread: ComputeThread, spans: Sequence[str] = CUTS[1]
) -> AsyncIterator[World]:
    world = World(folder)
    checkpoint = open_checkpoint(folder)
    executors: list[Executor] = []
    async with MemoryNetwork(delay_seconds=0.001) as network, trio.open_nursery() as nursery:
        world.network = network
        world.identity = Identity(bytes([1]) * 32)
        world.client = network.attach(world.identity, is_listening=False)
        for number, text in enumerate([*spans, *spans]):
            span = Span.parse(text)
            host = network.attach(Identity(bytes([2 + number]) * 32))
            executors.append(Executor(load_stack(checkpoint, span.start, span.stop), thread))
            room = Room(span=span, fingerprint="f", cache_tokens=1 << 16)
            is_serving = trio.Event()
            nursery.start_soon(Server(host, executors[-1], room).run, is_serving)
            await is_serving.wait()
            world.alive.add(host.peer)
            world.hops.append(Hop(host.peer, span))
        network.introduce()
        yield world
        nursery.cancel_scope.cancel()
    for executor in executors:
        executor.close()


def text(count: int, seed: int = 1) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def test_a_client_tells_lengths_apart_as_the_servers_do(folder: Path) -> None:
    own, theirs = World(folder).scaling, length_scaling(open_checkpoint(folder).config)
    assert theirs is not None
    assert [own.regime(n) for n in range(500)] == [theirs.regime(n) for n in range(500)]


def test_a_prompt_in_chunks_is_one_text_of_its_length_through_any_number_of_stacks(
    folder: Path, thread: ComputeThread
) -> None:
    async def main() -> None:
        said = []
        for spans in CUTS:
            async with world_of(folder, thread, spans) as world:
                said.append((await world.says(text(370))).token_ids)
        assert len(said) == 3

    trio.run(main)


def test_texts_one_after_the_other_leave_nothing_to_each_other(
    folder: Path, thread: ComputeThread
) -> None:
    async def main() -> None:
        async with world_of(folder, thread) as world:
            for length in (370, ORIGINAL - 3, 40, ORIGINAL - 1, ORIGINAL):
                await world.says(text(length, seed=length), tokens=6)

    trio.run(main)


def test_a_long_text_spoils_no_short_one_beside_it(folder: Path, thread: ComputeThread) -> None:
    async def main() -> None:
        async with world_of(folder, thread) as world, trio.open_nursery() as nursery:
            for length in (370, 20, ORIGINAL - 4, 33):
                nursery.start_soon(partial(world.says, text(length, seed=length), tokens=12))

    trio.run(main)


def test_a_text_that_has_grown_long_outlives_a_server(folder: Path, thread: ComputeThread) -> None:
    async def main() -> None:
        async with world_of(folder, thread) as world:
            await world.says(text(ORIGINAL - 4), kill_at=8, tokens=14)
            assert len(world.alive) == 3

    trio.run(main)


def test_a_draft_is_verified_up_to_the_length_where_positions_change(
    folder: Path, thread: ComputeThread
) -> None:
    async def main() -> None:
        async with world_of(folder, thread) as world:
            prompt = text(ORIGINAL - 5)
            whole = [*prompt, *world.alone(prompt)]

            class Knows:
                def guess(self, ids: Sequence[int]) -> list[int]:
                    return whole[len(ids) : len(ids) + 4]

            made = await world.says(prompt, draft=Knows())
            assert made.steps < TOKENS

    trio.run(main)


def test_a_beginning_is_shared_with_texts_whose_positions_are_computed_alike_only(
    folder: Path, thread: ComputeThread
) -> None:
    async def main() -> None:
        async with world_of(folder, thread) as world:
            short, long = text(200), text(370)  # which begins as the short one
            await world.says(short, is_shared=True)
            assert (await world.says(long, is_shared=True)).reused_tokens == 0
            assert (await world.says(long, is_shared=True)).reused_tokens == 5 * PAGE_POSITIONS
            other = [*long[:250], *text(100, seed=2)]
            is_growing = world.scaling.grows_after is not None
            pages = 0 if is_growing else 250 // PAGE_POSITIONS
            made = await world.says(other, is_shared=True)
            assert made.reused_tokens == max(pages, 0) * PAGE_POSITIONS
            again = await world.says(short, is_shared=True)
            assert again.reused_tokens == 3 * PAGE_POSITIONS
            grown = await world.says(text(ORIGINAL - 5, seed=4), is_shared=True)
            chat = [*text(ORIGINAL - 5, seed=4), *grown.token_ids, *text(40, seed=5)]
            await world.says(chat, is_shared=True)

    trio.run(main)
