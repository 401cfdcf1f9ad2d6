#!/usr/bin/env python3
"""Measure what a beginning that servers hold already saves: ratios within one run, on this machine.

    python scripts/prefix_bench.py [--json] [--rounds 7] [--prompt 400] [--layers 10] [--width 4]

Two servers on loopback, each half of the blocks of the demo grown as in `bench.py`, float32, one
compute thread each. Every round takes, in turn, prompts of random ids that nobody has seen:

plain    a session that offers nothing
offered  one that offers its pages, which nobody holds: what offering costs
again    the same prompt once more: what holding them saves
chat     prompt, answer and a question of 40 ids: the second turn of a chat
anew     a prompt as long as that of `chat`, offering nothing

Figures are of the seconds to the first token, medians over the rounds; ratios are taken within
each round: offered ÷ plain, again ÷ plain, chat ÷ anew. `digest_ms_per_mib`: what it costs to note
what was received.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import trio
from bench import entered, grow
from processes import ServerProcess, serving

from routing.route import Hop, Route
from routing.span import Span
from swarm.client import Client
from swarm.client_session import open_session
from swarm.generate import GenerateSettings, Generation, generate
from swarm.identity import Identity
from swarm.prefix import PAGE_POSITIONS, Digests
from swarm.wire import Tensor

ANSWER, QUESTION = 24, 40


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        grow(folder / "model", asked.layers, asked.width)
        half = asked.layers // 2
        with serving(home, folder / "model", [f"0:{half}", f"{half}:{asked.layers}"]) as servers:
            made = trio.run(measured, servers, home, asked)
    made["digest_ms_per_mib"] = digest_seconds() * 1000
    if asked.json:
        print(json.dumps(made))
        return
    for name, value in made.items():
        print(f"{name:22} {value:.4g}" if isinstance(value, float) else f"{name:22} {value}")


async def measured(
    servers: list[ServerProcess], home: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Take each way once a round."""
    ways: dict[str, list[float]] = {w: [] for w in ("plain", "offered", "again", "chat", "anew")}
    rng, reused = Random(6), 0
    async with entered(servers, home) as (client, identity):

        def fresh(count: int) -> list[int]:
            return [rng.randrange(3, client.model.card.vocabulary_size) for _ in range(count)]

        async def take(way: str, prompt: Sequence[int], *, offers: bool = True) -> Generation:
            made = await say(client, identity, servers, prompt, offers=offers)
            ways[way].append(made.first_token_seconds)
            return made

        for _ in range(asked.rounds + 1):
            await take("plain", fresh(asked.prompt), offers=False)
            prompt = fresh(asked.prompt)
            said = (await take("offered", prompt)).token_ids
            again = await take("again", prompt)
            if again.token_ids != said:
                raise SystemExit("what was reused changed the text")
            following = [*prompt, *said, *fresh(QUESTION)]
            reused = (await take("chat", following)).reused_tokens
            await take("anew", fresh(len(following)), offers=False)

    def ratio(way: str, other: str) -> float:  # the first round warms up
        return median(a / b for a, b in zip(ways[way][1:], ways[other][1:], strict=True))

    return {
        "offered_over_plain": ratio("offered", "plain"),
        "again_over_plain": ratio("again", "plain"),
        "chat_over_anew": ratio("chat", "anew"),
        **{f"{way}_ttft_ms": median(seconds[1:]) * 1000 for way, seconds in ways.items()},
        "chat_reused_tokens": reused,
        "prompt": asked.prompt,
        "model": f"{asked.layers} blocks, demo x {asked.width}, float32, one thread a process",
        "rounds": asked.rounds,
    }


async def say(
    client: Client,
    identity: Identity,
    way: list[ServerProcess],
    prompt: Sequence[int],
    *,
    offers: bool,
) -> Generation:
    """Generate an answer over these servers."""
    route = Route(tuple(Hop(server.peer, Span.parse(server.span)) for server in way), 0.1)

    async def find(_avoid: frozenset[str], _needed: int) -> Route:
        return route

    async with open_session(
        client.host,
        identity,
        find,
        fingerprint=client.model.fingerprint,
        max_tokens=len(prompt) + ANSWER,
        prompt=prompt if offers else (),
    ) as session:
        settings = GenerateSettings(most_tokens=ANSWER, end_ids=frozenset())
        made = await generate(session, prompt, settings)
        if session.journal.failovers:
            raise SystemExit("a route failed while it was measured")
    return made


def digest_seconds(hidden: int = 4096, rounds: int = 9) -> float:
    """Seconds to note one MiB of hidden states in bfloat16, by one position at a time."""
    positions = (1 << 20) // (2 * hidden)
    step = {"hidden": Tensor("bfloat16", (1, 1, hidden), bytes(2 * hidden))}
    times = []
    for _ in range(rounds):
        digests, began = Digests("f", PAGE_POSITIONS), time.perf_counter()
        for position in range(positions):
            digests.add(position, step)
        times.append(time.perf_counter() - began)
    return median(times)


if __name__ == "__main__":
    main()
