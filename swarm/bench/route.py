"""`swarm bench route`: how fast a route through a running swarm is, and where the time goes.

1. Prompts are random ids, others each time: no server can have met them before.
2. Both tests are repeated in turn; a first round warms up and counts for nothing.
3. Only what a token's time is made of is measured elsewhere (links, frames), never the time itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from swarm.bench.parts import codec_seconds, link_times
from swarm.bench.rows import (
    Row,
    TokenTimes,
    breakdown,
    breakdown_table,
    hop_means,
    speed_text,
    table_of,
)
from swarm.bench.speaker import (
    WISH,
    Speaker,
    check_room,
    model_name,
    open_bench_client,
    open_speaker,
    random_ids,
)
from swarm.client import Client
from swarm.console import Console
from swarm.messages import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

PROMPT_TOKENS = 512

_Route = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """What to ask of a route. `prompt_tokens` None: PROMPT_TOKENS, or a shorter context's whole."""

    prompt_tokens: int | None = None
    tokens: int = 128
    repetitions: int = 5
    seed: int = 0
    patience_seconds: float = 30.0


@dataclass(slots=True)
class _Found:
    """What the repetitions gave so far."""

    prefilled: list[float] = field(default_factory=list)  # tokens per second
    decoded: list[float] = field(default_factory=list)
    times: list[TokenTimes] = field(default_factory=list)
    routes: list[_Route] = field(default_factory=list)
    failovers: int = 0


async def run_route(settings: RouteSettings, join: str | None, console: Console) -> dict[str, Any]:
    """Measure a route through the swarm; return the report of `swarm bench route --json`.

    BadInput for more tokens than the context, NoRoute, Refusal and Unreachable as a session.
    """
    async with open_bench_client(join) as client:
        return await bench_route(client, settings, console)


async def bench_route(client: Client, settings: RouteSettings, console: Console) -> dict[str, Any]:
    """As `run_route`, for a client that has entered."""
    card, random = client.model.card, Random(settings.seed)
    asked = settings.prompt_tokens
    prompt = min(PROMPT_TOKENS, card.context_length) if asked is None else asked
    check_room(client, max(prompt, settings.tokens + 2), "--prompt and --tokens")
    console.note(f"measuring a route, {settings.repetitions} repetitions")
    await _repeat(client, settings, prompt, random, _Found())  # warms up
    found = _Found()
    for _ in range(settings.repetitions):
        last = await _repeat(client, settings, prompt, random, found)
    rows = (
        Row(test=f"pp{prompt}", users=1, tokens=prompt, samples=tuple(found.prefilled)),
        Row(
            test=f"tg{settings.tokens}",
            users=1,
            tokens=settings.tokens,
            samples=tuple(found.decoded),
        ),
    )
    return {
        "model": model_name(client),
        "repetitions": settings.repetitions,
        "rows": [row.facts() for row in rows],
        "failovers": found.failovers,
        "routes": len(set(found.routes)),
        **await _parts(client, found, last),
    }


async def _repeat(
    client: Client, settings: RouteSettings, prompt: int, random: Random, found: _Found
) -> Output:
    """Run both tests once, each in a session of its own; return the last answer."""
    patience = settings.patience_seconds
    async with open_speaker(client, random_ids(client, random, prompt), 0, patience) as speaker:
        found.prefilled.append(prompt / await speaker.prefill())
        found.failovers += speaker.session.journal.failovers
    first, room = random_ids(client, random, 1), settings.tokens + 1
    async with open_speaker(client, first, room, patience) as speaker:
        last = await _say(speaker, settings.tokens)
        found.failovers += speaker.session.journal.failovers
        found.routes.append(speaker.session.route)
    found.times += speaker.times
    seconds = speaker.times[-1].ended - speaker.times[0].began
    found.decoded.append(settings.tokens / seconds)
    return last


async def _say(speaker: Speaker, tokens: int) -> Output:
    """Say a first token, which pays for opening the streams, and then so many that are timed."""
    await speaker.prefill()
    for _ in range(tokens - 1):
        await speaker.decode()
    return await speaker.decode()


async def _parts(client: Client, found: _Found, last: Output) -> dict[str, Any]:
    """The route, and the parts of a token's time, in milliseconds."""
    route = found.routes[-1]
    await client.measure()
    links = link_times(client, [peer for peer, _ in route])
    codec = codec_seconds(client, route, WISH, last)
    parts = breakdown(found.times, sum(link.seconds for link in links), codec)
    hops = []
    for (peer, span), mean in zip(route, hop_means(found.times, len(route)), strict=False):
        record = client.record_of(peer)
        hop = {"peer": peer, "span": span, "name": record.name if record else ""}
        hops.append({**hop, "computed_ms": mean.computed * 1000, "waited_ms": mean.waited * 1000})
    return {
        "route": hops,
        "links": [link.facts() for link in links],
        "per_token_ms": {name: seconds * 1000 for name, seconds in parts.items()},
    }


def rendered(report: Mapping[str, Any]) -> "RenderableType":
    """Return the report for a terminal."""
    from rich.console import Group
    from rich.text import Text

    rows, route = report["rows"], report["route"]
    speeds = table_of(
        {
            "model": [report["model"] for _ in rows],
            "hops": [str(len(route)) for _ in rows],
            "test": [row["test"] for row in rows],
            "t/s": [speed_text(row) for row in rows],
        }
    )
    hops = table_of(
        {
            "hop": [f"…{hop['peer'][-8:]}" for hop in route],
            "name": [hop["name"] for hop in route],
            "blocks": [hop["span"] for hop in route],
            "ms from the one before": [
                "?" if link["source"] == "unknown" else f"{link['one_way_ms']:.2f}"
                for link in report["links"][: len(route)]
            ],
            "computes ms": [f"{hop['computed_ms']:.2f}" for hop in route],
            "queue ms": [f"{hop['waited_ms']:.2f}" for hop in route],
        },
        left=3,
    )
    notes = []
    if report["routes"] > 1:
        notes.append(f"{report['routes']} routes were taken; this is the last")
    if report["failovers"]:
        notes.append(f"{report['failovers']} repairs fell into the measurement")
    lines = map(Text, notes)
    return Group(speeds, Text(), hops, Text(), breakdown_table(report["per_token_ms"]), *lines)
