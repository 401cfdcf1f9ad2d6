"""Sessions that begin alike, on real stacks: same words, and no position computed twice."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import trio
import trio.testing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blocks.checkpoint import open_checkpoint
from blocks.executor import Done, Executor, ForkJob, FreeJob, StepJob
from blocks.load import load_stack
from blocks.thread import ComputeThread
from routing.route import Hop, Route
from routing.span import Span
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, Generation, generate
from swarm.identity import Identity
from swarm.memory import MemoryHost, MemoryNetwork
from swarm.prefix import PAGE_POSITIONS
from swarm.server import Room, Server

PAGE = PAGE_POSITIONS
VOCABULARY, BLOCKS, TOKENS = 96, 4, 8
SPANS = ("0:2", "2:4")
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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention"] * BLOCKS},
    "deepseek_v3": {
        "head_dim": 4,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


class Counting:
    """An executor that counts the positions it is given."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.positions = 0
        self.fileno = executor.fileno

    def submit(self, job: StepJob | ForkJob | FreeJob) -> None:
        if isinstance(job, StepJob):
            self.positions += next(iter(job.payload.values()))[1][1]
        self.executor.submit(job)

    def collect(self) -> list[Done]:
        return self.executor.collect()


class World:
    """A client, and a server of each span."""

    def __init__(self, whole: PreTrainedModel, client: MemoryHost, identity: Identity) -> None:
        self.whole = whole
        self.client = client
        self.identity = identity
        self.executors: list[Counting] = []
        self.hops: list[Hop] = []

    async def find(self, _avoid: frozenset[str], _needed: int) -> Route:
        return Route(tuple(self.hops), 0.1)

    async def say(
        self, prompt: Sequence[int], tokens: int = TOKENS
    ) -> tuple[Generation, list[int]]:
        """Generate, check the text, and tell what each hop computed."""
        before = [executor.positions for executor in self.executors]
        async with open_session(
            self.client,
            self.identity,
            self.find,
            fingerprint="f",
            max_tokens=len(prompt) + tokens,
            prompt=prompt,
        ) as session:
            settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
            made = await generate(session, prompt, settings)
        assert made.token_ids == self.alone(prompt, tokens)
        await trio.testing.wait_all_tasks_blocked(0.05)  # until it is closed everywhere
        after = [executor.positions for executor in self.executors]
        return made, [late - early for late, early in zip(after, before, strict=True)]

    def alone(self, prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        out = self.whole.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        return list(out[0].tolist()[len(prompt) :])


@pytest.fixture(scope="module")
def thread() -> Iterator[ComputeThread]:
    with ComputeThread(1) as thread:
        yield thread


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    name: str = request.param
    config = AutoConfig.for_model(name, **COMMON | FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    return folder


@asynccontextmanager
async def world_of(folder: Path, thread: ComputeThread) -> AsyncIterator[World]:
    identities = [Identity(bytes([seed]) * 32) for seed in range(1, 4)]
    checkpoint = open_checkpoint(folder)
    async with MemoryNetwork(delay_seconds=0.001) as network, trio.open_nursery() as nursery:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        world = World(whole, network.attach(identities[0], is_listening=False), identities[0])
        for text, identity in zip(SPANS, identities[1:], strict=True):
            span, host = Span.parse(text), network.attach(identity)
            executor = Counting(Executor(load_stack(checkpoint, span.start, span.stop), thread))
            room = Room(span=span, fingerprint="f", cache_tokens=1 << 16)
            is_serving = trio.Event()
            nursery.start_soon(Server(host, executor, room).run, is_serving)
            await is_serving.wait()
            world.executors.append(executor)
            world.hops.append(Hop(host.peer, span))
        network.introduce()
        yield world
        nursery.cancel_scope.cancel()
    for executor in world.executors:
        executor.executor.close()


def text(count: int, seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def test_a_beginning_that_was_computed_is_taken_over_where_the_family_can(
    family: Path, thread: ComputeThread
) -> None:
    prompt = text(3 * PAGE + 20, seed=1)
    is_recurrent = family.name.startswith("qwen3_next")

    async def main() -> None:
        async with world_of(family, thread) as world:
            made, alone = await world.say(prompt)
            assert alone == [len(prompt) + TOKENS - 1] * 2
            following = [*prompt, *made.token_ids, *text(30, seed=2)]  # of a chat
            made, positions = await world.say(following)
            pages = 0 if is_recurrent else (len(prompt) + TOKENS - 1) // PAGE
            assert made.reused_tokens == pages * PAGE
            assert positions == [len(following) + TOKENS - 1 - pages * PAGE] * 2
            again, _ = await world.say(following)  # of a leg that began with another's pages
            assert again.reused_tokens == (0 if is_recurrent else len(following) // PAGE * PAGE)
            branch = [*following[: 3 * PAGE], *text(9, seed=3)]
            await world.say(branch)  # whatever a sliding layer has forgotten

    trio.run(main)
