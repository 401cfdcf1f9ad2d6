#!/usr/bin/env python3
"""Let many clients ask a swarm of real processes for a while, and see what gives.

    python scripts/soak.py --minutes 15 --clients 32 [--json] [--spans 0:4,4:8] [--seed 0]

The servers are processes on loopback with the demo model in float32, its context made longer for
the longest prompts. Each client has a key, a host and links of its own; it asks for one text after
the other, prompts of 5 to 600 tokens in any order, pauses, and sometimes leaves in the middle,
with a word or without one, or has its streams closed underfoot and goes on. Each token is compared
with what the prompt has alone. The exit code is 1 if anything does not hold (see `soak_report`).

1. No process outlives the run, however it ends, unless this one is killed by force.
2. Nothing here helps a session: what it does about its troubles is what any client's does.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import trio
from soak_report import LONGEST, Alone, Errand, Memory, Tally, compare, errands, report_of, table

from routing.span import Span
from swarm.bench.rows import mixed_lengths
from swarm.chaos import PROMPTS, ended_when_told, say
from swarm.chaos_plan import Said, Undisturbed
from swarm.client import Client, open_client
from swarm.console import readable_errors
from swarm.errors import SwarmError, Unreachable
from swarm.files import FileCache
from swarm.generate import GenerateSettings, Generation, generate
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.invite import decode_invite
from swarm.messages import CHAIN_PROTOCOL
from swarm.replicas import Replicas, open_replicas
from swarm.settings import DEMO_FOLDER
from swarm.tasks import open_tasks
from swarm.transport import Host, Stream

CONTEXT = 1024
LEAST_PROMPT, MOST_PROMPT = 5, 600
SAMPLE_SECONDS = 1.0
TELL_SECONDS = 20.0
ARRIVAL_SECONDS = 5.0  # within which the clients come
ENTER_SECONDS = 120.0  # for all servers to be known, and a client to be in
TEXT_SECONDS = 60.0  # a text that is not there by then is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakSettings:
    """How long, how many, over which spans, with how many different prompts."""

    minutes: float = 15.0
    clients: int = 32
    seed: int = 0
    spans: tuple[Span, ...] = (Span(0, 4), Span(4, 8))
    prompts: int = 16
    left_seconds: float = 60.0  # for what clients left without a word: twice the servers' grace


class CutStream:
    """A stream that can be cut: its reader learns of it as of a broken connection."""

    def __init__(self, stream: Stream) -> None:
        self.peer = stream.peer
        self.protocol = stream.protocol
        self._stream = stream
        self._is_cut = False
        self._reading = trio.CancelScope()

    async def send_all(self, data: bytes) -> None:
        if self._is_cut:
            raise Unreachable("cut")
        await self._stream.send_all(data)

    def post(self, data: bytes) -> bool:
        return not self._is_cut and self._stream.post(data)

    async def receive_some(self) -> bytes:
        self._reading = trio.CancelScope()
        with self._reading:
            if not self._is_cut:
                return await self._stream.receive_some()
        raise Unreachable("cut")

    async def close(self) -> None:
        await self._stream.close()

    def cut(self) -> None:
        self._is_cut = True
        self._reading.cancel()


class CutHost:
    """A host whose chain streams can be cut; all else is the host's own."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._streams: list[CutStream] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def open(self, peer: str, protocol: str, *, within: float) -> Any:
        stream = await self._host.open(peer, protocol, within=within)
        if protocol != CHAIN_PROTOCOL:
            return stream
        self._streams.append(CutStream(stream))
        return self._streams[-1]

    def cut(self) -> None:
        """Cut all streams of the session at hand; whoever opened them closes them."""
        for stream in self._streams:
            stream.cut()
        self._streams.clear()

    def forget(self) -> None:
        """The session has ended."""
        self._streams.clear()


@dataclass(slots=True)
class Watch:
    """The memory of some processes, sampled."""

    pids: dict[str, int]
    began: float
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            now = trio.current_time() - self.began
            for name, pid in self.pids.items():
                self.samples.setdefault(name, []).append((now, resident_bytes(pid)))
            await trio.sleep(SAMPLE_SECONDS)

    def memories(self) -> list[Memory]:
        return [Memory(name, tuple(samples)) for name, samples in self.samples.items()]


def resident_bytes(pid: int) -> int:
    """The memory of a process that lies in RAM. Linux tells."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def soak(settings: SoakSettings) -> dict[str, Any]:
    """Run it all and return the report. A SwarmError if servers do not start."""
    with tempfile.TemporaryDirectory(prefix="swarm-soak-") as name:
        folder = Path(name)
        model = lengthened(DEMO_FOLDER, folder / "model")
        async with (
            ended_when_told(),
            open_replicas(model, settings.spans, 1, folder, has_cables=False) as replicas,
        ):
            tell(f"servers of {', '.join(map(str, settings.spans))} run")
            return await _Soak(settings, replicas, FileCache(folder / "files")).run()


@dataclass(slots=True)
class _Soak:
    """One run, over its servers."""

    settings: SoakSettings
    replicas: Replicas
    files: FileCache
    deck: list[Alone] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)

    async def run(self) -> dict[str, Any]:
        """Say each prompt's text alone, then let the clients ask; return the report."""
        settings = self.settings
        async with self._entered() as (client, _):
            before = free_tokens(client)
            prompts = prompts_for(client, settings.prompts)
            tell(f"saying {len(prompts)} texts alone")
            self.deck = [await _alone(client, prompt) for prompt in prompts]
        self.tallies = [Tally() for _ in range(settings.clients)]
        began = trio.current_time()
        pids = {f"server {each.span}": each.process.pid for each in self.replicas.all}
        watch = Watch({**pids, f"{settings.clients} clients": os.getpid()}, began)
        over = began + settings.minutes * 60
        async with open_tasks() as watching:
            watching.start_soon(watch.run)
            watching.start_soon(self._tell_now_and_then)
            async with trio.open_nursery() as nursery:
                for number in range(settings.clients):
                    nursery.start_soon(self._client, number, over)
        report = report_of(self.tallies, watch.memories(), trio.current_time() - began)
        return {
            **report,
            "spans": [str(span) for span in settings.spans],
            "seed": settings.seed,
            "prompt_tokens": [len(each.prompt) for each in self.deck],
            "free_tokens": await self._free_tokens(before),
        }

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[tuple[Client, CutHost]]:
        """A client with a key and a host of its own, that knows all servers."""
        invite = decode_invite(self.replicas.all[0].join)
        identity = new_identity()
        async with open_host(identity, invite.secret, listen=None) as plain:
            host = CutHost(plain)
            async with open_client(host, identity, invite, self.files) as client:
                with trio.fail_after(ENTER_SECONDS):
                    while len(client.records()) < len(self.settings.spans):
                        await trio.sleep(0.2)
                        await client.refresh()
                yield client, host

    async def _client(self, number: int, over: float) -> None:
        """Come, ask for one text after the other, and go when the time is over."""
        random = Random(f"{self.settings.seed} {number}")
        tally = self.tallies[number]
        await trio.sleep(random.uniform(0, ARRIVAL_SECONDS))
        try:
            async with self._entered() as (client, host):
                for errand in errands(random, len(self.deck)):
                    await trio.sleep(errand.pause_seconds)
                    if trio.current_time() >= over:
                        return
                    await self._text(client, host, errand, tally)
        except (SwarmError, trio.TooSlowError) as error:
            tally.errors.append(f"client {number} could not enter: {error}")

    async def _text(self, client: Client, host: CutHost, errand: Errand, tally: Tally) -> None:
        """Ask for one text, and note what came of it."""
        alone = self.deck[errand.prompt]
        said: list[int] = []
        made: Generation | None = None
        began = trio.current_time()
        try:
            with trio.fail_after(TEXT_SECONDS):
                async with client.session(len(alone.prompt) + errand.length) as session:
                    try:
                        made = await _said(session, host, alone, errand, said)
                    finally:
                        tally.failovers += session.journal.failovers
                        kinds = (trouble.failure for trouble in session.journal.troubles)
                        tally.troubles.update(kinds)
            tally.endings[errand.ending] += 1
        except (SwarmError, trio.TooSlowError) as error:
            what = f"{errand.ending} at {errand.place}, {len(said)} of {errand.length} tokens"
            sentence = error.sentence() if isinstance(error, SwarmError) else "it took too long"
            tally.errors.append(f"a prompt of {len(alone.prompt)} ({what}): {sentence}")
        finally:
            host.forget()
        verdict = compare(said, alone)
        tally.different += verdict == "different"
        tally.near_ties += verdict == "near tie"
        tally.tokens += len(said)
        tally.seconds += made.seconds if made else trio.current_time() - began
        if made is not None:
            tally.decoded += len(made.token_ids) - 1
            tally.decode_seconds += made.decode_seconds

    async def _tell_now_and_then(self) -> None:
        while True:
            await trio.sleep(TELL_SECONDS)
            texts, tokens, errors, different = (
                sum(each.texts for each in self.tallies),
                sum(each.tokens for each in self.tallies),
                sum(len(each.errors) for each in self.tallies),
                sum(each.different for each in self.tallies),
            )
            tell(f"{texts} texts, {tokens} tokens, {errors} errors, {different} different")

    async def _free_tokens(self, before: dict[str, int]) -> dict[str, dict[str, int]]:
        """What each server had free, and has once the clients are gone, and all they left."""
        async with self._entered() as (client, _):
            with trio.move_on_after(self.settings.left_seconds):
                while any(free_tokens(client)[span] < before[span] for span in before):
                    await trio.sleep(1.0)
                    await client.refresh()
            after = free_tokens(client)
            return {span: {"before": before[span], "after": after[span]} for span in before}


def free_tokens(client: Client) -> dict[str, int]:
    """How many tokens each server has room for, by its span."""
    return {record.span: record.free_tokens for record in client.records()}


async def _said(
    session: Any, host: CutHost, alone: Alone, errand: Errand, said: list[int]
) -> Generation | None:
    """Generate into `said`, hurt as the errand says; None if its client vanished."""
    settings = GenerateSettings(most_tokens=errand.length, end_ids=frozenset())

    def on_token(token: int) -> bool:
        said.append(token)
        if len(said) != errand.place:
            return False
        if errand.ending in ("cut", "vanish"):
            host.cut()
        if errand.ending == "vanish":
            scope.cancel()
        return errand.ending == "leave"

    with trio.CancelScope() as scope:
        return await generate(session, alone.prompt, settings, on_token)
    return None


async def _alone(client: Client, prompt: tuple[int, ...]) -> Alone:
    async def nothing(_position: int) -> None:
        """Hurt nobody."""

    said = Said(Undisturbed((), (), ()))
    async with client.session(len(prompt) + LONGEST) as session:
        margins = await say(session, prompt, said, LONGEST, nothing)
    return Alone(prompt, tuple(said.tokens), tuple(margins))


def prompts_for(client: Client, count: int) -> list[tuple[int, ...]]:
    """So many prompts of mixed lengths, in English: each begins with another sentence."""
    ids = [client.model.tokens.encode(f"{text} ") for text in PROMPTS]
    prompts = []
    for number, length in enumerate(mixed_lengths(LEAST_PROMPT, MOST_PROMPT, count)):
        turn = number % len(ids)
        whole = [token for part in (*ids[turn:], *ids[:turn]) for token in part]
        prompts.append(tuple((whole * (length // len(whole) + 1))[:length]))
    return prompts


def lengthened(model: Path, out: Path) -> Path:
    """The model with a longer context: with rotary positions that is a figure in its config."""
    out.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return out


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spans", default="0:4,4:8", help="a server for each")
    parser.add_argument("--json", action="store_true", help="print one object")
    asked = parser.parse_args(words)
    settings = SoakSettings(
        minutes=asked.minutes,
        clients=asked.clients,
        seed=asked.seed,
        spans=tuple(Span.parse(span) for span in asked.spans.split(",")),
    )
    with readable_errors(is_json=asked.json):
        report = trio.run(soak, settings)
    print(json.dumps(report) if asked.json else table(report), flush=True)
    sys.exit(0 if report["holds"] else 1)


if __name__ == "__main__":
    main()
