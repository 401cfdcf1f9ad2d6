#!/usr/bin/env python3
"""Measure what a swarm costs beside its compute: ratios within one run, on this machine.

    python scripts/bench.py [--json] [--rounds 7] [--tokens 48] [--layers 10] [--width 4]
                            [--only chain|users]

The model is the demo's, grown to `layers` blocks of `width` times its hidden size, in float32.
Servers are processes of their own on loopback with one compute thread each; every round takes each
way once, in turn, so that a noisy neighbour meets them all. Figures are medians over the rounds.

overhead_ms_per_hop   (time per token - the stacks' own time) / hops, over two servers
split_over_single     speed of two servers / speed of one
split_over_local      speed of two servers / speed of transformers' `generate`, same threads
users_4, users_16 ...  see `bench_users`: one server in bfloat16, 4 and 16 clients at once
import_seconds        what a thin client imports, in a fresh process
status_seconds        `swarm status --json` against a running daemon, the whole command
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import trio
from bench_users import users_figures
from processes import ServerProcess, end, environment, serving, start, swarm, wait_ready

from routing.route import Hop, Route
from routing.span import Span
from swarm.client import Client, open_client
from swarm.client_session import open_session
from swarm.files import FileCache
from swarm.generate import GenerateSettings, Generation, generate
from swarm.host import open_host
from swarm.identity import Identity, new_identity
from swarm.invite import decode_invite
from swarm.settings import DEMO_FOLDER

AskLocal = Callable[[list[int], int], dict[str, Any]]
"""(prompt ids, tokens) -> {"seconds": per token, "ids": ...}"""

PROMPT = "Once upon a time, there was a little girl named Lily."
REPOSITORY = Path(__file__).parent.parent

LOCAL = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    ids = torch.tensor([asked["ids"]])
    stamps = []
    class Clock:
        def put(self, value): stamps.append(time.perf_counter())
        def end(self): pass
    options = dict(do_sample=False, max_new_tokens=asked["tokens"], eos_token_id=None)
    # without a mask `generate` guesses one, and takes the first token for padding
    out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Clock(), **options)
    made = out[0].tolist()[len(asked["ids"]):]
    # the streamer's first call is the prompt, the second the first token
    seconds = (stamps[-1] - stamps[1]) / (len(made) - 1)
    print(json.dumps({"seconds": seconds, "ids": made}), flush=True)
"""


@dataclass
class Figures:
    """Seconds per token by way, one entry a round."""

    single: list[float] = field(default_factory=list)
    split: list[float] = field(default_factory=list)
    local: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)  # seconds per hop
    single_overhead: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--only", choices=("chain", "users"), help="leave the other out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        made: dict[str, Any] = {} if asked.only == "users" else measured(Path(folder), asked)
        if asked.only != "chain":
            made |= measured_users(Path(folder), asked)
    if asked.json:
        print(json.dumps(made))
    else:
        for name, value in made.items():
            print(f"{name:22} {value:.4g}" if isinstance(value, float) else f"{name:22} {value}")


def measured(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures by name."""
    model, home = folder / "model", folder / "home"
    home.mkdir()
    grow(model, asked.layers, asked.width)
    half = asked.layers // 2
    spans = [f"0:{asked.layers}", f"0:{half}", f"{half}:{asked.layers}"]
    with serving(home, model, spans) as servers, local_model(model) as ask_local:
        figures = trio.run(measure_ways, servers, home, ask_local, asked.rounds, asked.tokens)
        status = [timed(lambda: swarm(home, "status", "--json")) for _ in range(5)]
    imports = [timed(import_client) for _ in range(5)]
    return {
        "overhead_ms_per_hop": median(figures.overhead) * 1000,
        "overhead_ms_one_hop": median(figures.single_overhead) * 1000,
        "split_over_single": median(
            one / two for one, two in zip(figures.single, figures.split, strict=True)
        ),
        "split_over_local": median(
            one / two for one, two in zip(figures.local, figures.split, strict=True)
        ),
        "split_ms_per_token": median(figures.split) * 1000,
        "local_ms_per_token": median(figures.local) * 1000,
        "import_seconds": median(imports),
        "status_seconds": median(status),
        "model": f"{asked.layers} blocks, demo x {asked.width}, float32, one thread a process",
        "rounds": asked.rounds,
    }


def measured_users(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Run one server and its clients, and return their figures by name."""
    model, home = folder / "model-bfloat16", folder / "home-users"
    home.mkdir()
    grow(model, asked.layers, asked.width, "bfloat16")
    span = f"0:{asked.layers}"
    process = start(home, str(model), "--dtype", "bfloat16", "--blocks", span)
    try:
        server = wait_ready(process)
        return trio.run(users_figures, entered, server, model, home, asked.rounds, asked.tokens)
    finally:
        end([process])


def grow(out: Path, layers: int, width: int, dtype: str = "float32") -> None:
    """Make the model that is measured."""
    script = REPOSITORY / "scripts" / "grow.py"
    command = [sys.executable, str(script), str(DEMO_FOLDER), str(out), "--dtype", dtype]
    subprocess.run(
        [*command, "--layers", str(layers), "--width", str(width)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def local_model(model: Path) -> Iterator[AskLocal]:
    """Run a process with the whole model in transformers; give a function to ask it."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL, str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(model.parent),
    )
    asking, answering = process.stdin, process.stdout
    if asking is None or answering is None:
        raise RuntimeError("the local model has no pipes")

    def ask(ids: list[int], tokens: int) -> dict[str, Any]:
        asking.write(json.dumps({"ids": ids, "tokens": tokens}) + "\n")
        asking.flush()
        answer: dict[str, Any] = json.loads(answering.readline())
        return answer

    try:
        answering.readline()
        yield ask
    finally:
        process.kill()
        process.wait(10)


@asynccontextmanager
async def entered(
    servers: list[ServerProcess], home: Path
) -> AsyncIterator[tuple[Client, Identity]]:
    invite, identity = decode_invite(servers[0].join), new_identity()
    async with (
        open_host(identity, invite.secret, listen=None) as host,
        open_client(host, identity, invite, FileCache(home / "files")) as client,
    ):
        with trio.fail_after(30):
            while len(client.records()) < len(servers):
                await trio.sleep(0.1)
                await client.refresh()
        yield client, identity


async def measure_ways(
    servers: list[ServerProcess],
    home: Path,
    ask_local: AskLocal,
    rounds: int,
    tokens: int,
) -> Figures:
    """Take each way once a round, and check that all say the same."""
    figures = Figures()
    async with entered(servers, home) as (client, identity):
        ids = client.model.tokens.encode(PROMPT)
        for number in range(rounds + 1):
            local = await trio.to_thread.run_sync(ask_local, ids, tokens)
            single = await say(client, identity, servers[:1], ids, tokens)
            split = await say(client, identity, servers[1:], ids, tokens)
            if not single.token_ids == split.token_ids == local["ids"]:
                raise SystemExit("the swarm does not say what the whole model says")
            if number == 0:
                continue  # the first round warms up
            later = tokens - 1
            figures.local.append(local["seconds"])
            figures.single.append(single.decode_seconds / later)
            figures.split.append(split.decode_seconds / later)
            figures.overhead.append((split.decode_seconds - split.computed_seconds) / later / 2)
            figures.single_overhead.append(
                (single.decode_seconds - single.computed_seconds) / later
            )
    return figures


async def say(
    client: Client, identity: Identity, way: list[ServerProcess], ids: list[int], tokens: int
) -> Generation:
    """Generate over these servers, each with its whole span."""
    route = Route(tuple(Hop(server.peer, Span.parse(server.span)) for server in way), 0.1)

    async def find(_avoid: frozenset[str], _needed: int) -> Route:
        return route

    fingerprint = client.model.fingerprint
    async with open_session(
        client.host, identity, find, fingerprint=fingerprint, max_tokens=len(ids) + tokens
    ) as session:
        settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
        made = await generate(session, ids, settings)
        if session.journal.failovers:
            raise SystemExit("a route failed while it was measured")
        return made


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def import_client() -> None:
    subprocess.run([sys.executable, "-c", "import swarm.prompt, swarm.host"], check=True)


if __name__ == "__main__":
    main()
