"""`swarm bench chaos`: a swarm of real processes on loopback, hurt while it speaks.

What each prompt's text is undisturbed is asked of the swarm itself, first. Then the same texts are
asked again, and at planned tokens a hop of the route in use is hurt: `close` (SIGTERM: it drains
and leaves), `kill` (SIGKILL), `stop` (SIGSTOP) or `cut` (its cable, see `swarm.cable`). Before the
next blow the swarm is made whole again, while the session waits.

1. No process outlives the run, however it ends, unless this process is itself killed by force.
2. The run hurts servers and replaces them; in no other way does it help the session. What a
   session does about a blow is what any client's session does.
"""

import json
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from routing.span import Span, even_spans
from swarm.chaos_plan import Blow, ChaosSettings, Plan, Said, Undisturbed, plan_of, report_of
from swarm.client import Client, open_client
from swarm.client_session import ClientSession
from swarm.console import Console
from swarm.errors import BadInput, SwarmError, Unreachable
from swarm.files import FileCache
from swarm.host import open_host
from swarm.identity import new_identity
from swarm.invite import decode_invite
from swarm.replicas import Replicas, open_replicas, why_no_cut
from swarm.sampling import SamplingSettings, candidates_from, choose, wish_for
from swarm.tasks import open_tasks
from swarm.wire import Tensor

if TYPE_CHECKING:
    from rich.console import RenderableType

TOKEN_SECONDS = 60.0  # a session that has not recovered by then will hardly do so
KNOWN_SECONDS = 60.0  # until a fresh server has come round to the client
LOOK_SECONDS = 0.2
LONGEST_TEXT = 200
GREEDY = SamplingSettings()
WISH = wish_for(GREEDY, (), count=2)  # the best, and how far above the next
PROMPTS = (
    "Once upon a time",
    "One day, a little girl",
    "The dog was",
    "Tom and his mom went to",
    "There was a big",
    "Lily wanted to",
    "In the park",
    "A boy named Tim",
    "The cat and the bird",
    "Once there was a king",
)

Before = Callable[[int], Awaitable[None]]
"""Called with each token's place in the text before its step is sent."""


async def run_chaos(settings: ChaosSettings, console: Console) -> dict[str, Any]:
    """Run it all and return the report, see `report_of`; `unavailable` says which kinds were left
    out and why.

    BadInput if nothing can be done of what was asked; a SwarmError if servers do not start.
    """
    settings, unavailable = available(settings)
    spans = even_spans(blocks_of(settings.model), settings.hops)
    began = trio.current_time()
    with tempfile.TemporaryDirectory(prefix="swarm-chaos-") as name:
        async with ended_when_told():
            console.note(f"starting {settings.replicas} servers for each of {_listed(spans)}")
            async with open_replicas(
                settings.model,
                spans,
                settings.replicas,
                Path(name),
                has_cables="cut" in settings.kinds,
            ) as replicas:
                run = _Run(settings, replicas, Path(name) / "files", console)
                made = await run.make()
    return {
        **made,
        "unavailable": unavailable,
        "replicas": settings.replicas,
        "hops": len(spans),
        "seed": settings.seed,
        "seconds": trio.current_time() - began,
    }


def available(settings: ChaosSettings) -> tuple[ChaosSettings, dict[str, str]]:
    """Leave out the kinds that cannot be had here, and say why. BadInput if none is left."""
    reason = why_no_cut()
    if reason is None or "cut" not in settings.kinds:
        return settings, {}
    kinds = tuple(kind for kind in settings.kinds if kind != "cut")
    if not kinds:
        raise BadInput(f"cables cannot be cut here: {reason}")
    return replace(settings, kinds=kinds), {"cut": reason}


def blocks_of(model: Path) -> int:
    """Return how many blocks the model in this folder has. BadInput if it does not say."""
    try:
        config: dict[str, Any] = json.loads((model / "config.json").read_bytes())
        return int(config.get("text_config", config)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{model} holds no model whose blocks can be counted") from error


@asynccontextmanager
async def ended_when_told() -> AsyncIterator[None]:
    """Take SIGTERM and a closed terminal for Ctrl-C, which ends all that was started."""

    async def wait(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            raise KeyboardInterrupt

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async with open_tasks() as nursery:
            nursery.start_soon(wait, signals)
            yield


def _listed(spans: Sequence[Span]) -> str:
    return ", ".join(map(str, spans))


async def say(
    session: ClientSession, prompt: Sequence[int], said: Said, length: int, before: Before
) -> list[float]:
    """Generate greedily `length` tokens into `said`; return the margins of the best logits.

    End-of-sequence ids are tokens like others: the text is as long as asked. Raises what
    `ClientSession.next_output` raises, and Unreachable if a token takes TOKEN_SECONDS; what was
    said by then is in `said`.
    """
    ids = list(prompt)
    margins = []
    for position in range(length):
        await before(position)
        chunk = ids if position == 0 else ids[-1:]
        data = np.asarray(chunk, "<i4").tobytes()
        payload = {"ids": Tensor("int32", (1, len(chunk)), data)}
        began = trio.current_time()
        session.step(len(ids) - len(chunk), payload, "last", WISH)
        try:
            with trio.move_on_after(TOKEN_SECONDS) as scope:
                output = await session.next_output()
        finally:
            said.seconds.append(trio.current_time() - began)
        if scope.cancelled_caught:
            raise Unreachable(f"no token came for {TOKEN_SECONDS:g} seconds")
        (candidates,) = candidates_from(output.payload, WISH)
        ids.append(choose(candidates, GREEDY, len(ids), {}))
        said.tokens.append(ids[-1])
        margins.append(float(candidates.logits[0] - candidates.logits[1]))
    return margins


@dataclass(slots=True)
class _Run:
    """The texts of one run, over its servers."""

    settings: ChaosSettings
    replicas: Replicas
    files: Path
    console: Console
    usual: float = 0.0
    waited: float = 0.0  # for the swarm to be whole
    dealt: int = 0

    async def make(self) -> dict[str, Any]:
        """Say every text undisturbed, then under blows; return the report."""
        async with self._entered() as client:
            prompts = [tuple(client.model.tokens.encode(text)) for text in PROMPTS]
            context = client.model.card.context_length
            plan = plan_of(self.settings, min(LONGEST_TEXT, context - max(map(len, prompts))))
            chosen = [prompts[number % len(prompts)] for number in range(plan.texts)]
            self.console.note(f"saying {plan.texts} texts of {plan.length} tokens undisturbed")
            whole = {p: await self._undisturbed(client, p, plan) for p in dict.fromkeys(chosen)}
        self.usual = median(second for text in whole.values() for second in text.seconds[1:])
        self.console.note(f"{self.usual * 1000:.1f} ms a token; now {len(plan.blows)} blows")
        texts = []
        for number, prompt in enumerate(chosen):
            said = Said(whole[prompt])
            texts.append(said)
            await self._disturbed(prompt, said, plan, number)
        return {**report_of(plan, texts), "waited_seconds": self.waited}

    @asynccontextmanager
    async def _entered(self) -> AsyncIterator[Client]:
        """A client of its own for each text, as for each `swarm generate`."""
        invite = decode_invite(self.replicas.serving()[-1].join)
        identity = new_identity()
        async with (
            open_host(identity, invite.secret, listen=None) as host,
            open_client(host, identity, invite, FileCache(self.files)) as client,
        ):
            yield client

    async def _undisturbed(
        self, client: Client, prompt: tuple[int, ...], plan: Plan
    ) -> Undisturbed:
        async def nothing(_position: int) -> None:
            """Hurt nobody."""

        said = Said(Undisturbed((), (), ()))
        async with client.session(len(prompt) + plan.length) as session:
            margins = await say(session, prompt, said, plan.length, nothing)
        return Undisturbed(tuple(said.tokens), tuple(said.seconds), tuple(margins))

    async def _disturbed(
        self, prompt: tuple[int, ...], said: Said, plan: Plan, number: int
    ) -> None:
        """Say one text while its blows fall. What ends it is noted in `said.error`."""
        blows = {blow.position: blow for blow in plan.blows if blow.text == number}
        await self.replicas.restore()
        try:
            async with self._entered() as client:
                room = len(prompt) + plan.length
                async with client.session(room) as session, open_tasks() as striking:

                    async def before(position: int) -> None:
                        if position + 1 in blows:  # the token between shows what the wait hid
                            await self._restore(client)
                        if position in blows:
                            striking.start_soon(self._strike, session, said, blows[position])

                    try:
                        await say(session, prompt, said, plan.length, before)
                    finally:
                        said.repairs = session.journal.failovers
                        said.replayed_tokens = session.journal.replayed_tokens
        except SwarmError as error:
            said.error = error.sentence()
        is_same = tuple(said.tokens) == said.undisturbed.tokens
        verdict = "as undisturbed" if is_same else f"NOT as undisturbed {said.error}"
        longest = max(said.seconds[1:], default=0.0)
        self.console.note(
            f"text {number + 1} of {plan.texts}: {verdict}; {said.repairs} repairs, "
            f"longest wait for a token {longest:.2f} s"
        )

    async def _strike(self, session: ClientSession, said: Said, blow: Blow) -> None:
        """Deal a blow while a token is under way."""
        await trio.sleep(blow.delay * self.usual)
        victim = self.replicas.strike(session.route, blow)
        self.dealt += 1
        if victim is None:
            self.console.note(f"blow {self.dealt}: no hop of the route was there to hurt")
            return
        said.struck.append((blow, str(victim.span)))
        self.console.note(
            f"blow {self.dealt} of {self.settings.kills}: {blow.kind:5} a server of {victim.span}, "
            f"text {blow.text + 1}, token {blow.position + 1}"
        )

    async def _restore(self, client: Client) -> None:
        """Make the swarm whole, and wait until the client can know."""
        began = trio.current_time()
        await self.replicas.restore()
        with trio.move_on_after(KNOWN_SECONDS) as scope:
            wanted = {replica.peer for replica in self.replicas.serving()}
            while not wanted <= {record.peer for record in client.records()}:
                await trio.sleep(LOOK_SECONDS)
                await client.refresh()
        if scope.cancelled_caught:
            raise Unreachable("fresh servers did not become known")
        self.waited += trio.current_time() - began


def rendered(report: dict[str, Any]) -> "RenderableType":
    """Return the report for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kind")
    for name in ("kills", "lost", "different", "near ties", "gap p50", "p99", "most"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, row in (*report["kinds"].items(), ("all", report)):
        counts = [str(row[name]) for name in ("kills", "lost", "different", "near_ties")]
        gaps = [f"{row[f'gap_{name}_seconds']:.3f} s" for name in ("p50", "p99", "most")]
        table.add_row(kind, *counts, *gaps)
    verdict = (
        "nothing lost, nothing different" if report["holds"] else "THE TEXT DID NOT SURVIVE ALL"
    )
    lines = [
        f"{report['kills']} of {report['planned']} kills over {report['tokens']} tokens: {verdict}",
        f"{report['repairs']} repairs, {report['replayed_tokens']} tokens replayed; "
        f"{report['usual_seconds'] * 1000:.1f} ms a token undisturbed",
        f"{report['tokens_short_handed']} tokens said while a server was missing; "
        f"{report['waited_seconds']:.0f} of {report['seconds']:.0f} s spent on fresh servers",
        *(f"no {kind}: {reason}" for kind, reason in report["unavailable"].items()),
        *(f"error: {error}" for error in report["errors"]),
    ]
    return Group(table, *map(Text, lines))
