"""A text that is told while something is done to its hops, and what that costs whom."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio
from session_worlds import BLOCKS, FINGERPRINT, NOW, Served, World

from routing.cost import CostModel, MeasuredLinks, Work
from routing.offer import Offer
from routing.repair import Repair, repair
from routing.route import NoRoute as Gap
from swarm.client import no_route
from swarm.client_session import Broken, ClientSession, FindRoute, open_session
from swarm.generate import Draft, GenerateSettings, generate
from swarm.memory import MemoryHost
from swarm.messages import CHAIN_PROTOCOL
from swarm.pipes import MemoryStream
from swarm.pulse import Pulse
from swarm.wire import Decoder

PROMPT = [3, 14, 15, 92]
TOKENS = 30
HURT_AT = 12
COST = CostModel(
    MeasuredLinks({}, 0.02), Work(blocks=BLOCKS, tokens=1, bytes_per_token=4, is_prefill=False)
)

Hurt = Callable[[World, ClientSession], None]


@dataclass
class Told:
    """What came of it; `times` says when each token came."""

    session: ClientSession
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    @property
    def longest_gap(self) -> float:
        return max(
            after - before for before, after in zip(self.times, self.times[1:], strict=False)
        )

    @property
    def peers(self) -> list[str]:
        return [peer for peer, _ in self.session.route]

    @property
    def failures(self) -> Counter[str]:
        return Counter(trouble.failure for trouble in self.session.journal.troubles)

    @property
    def blamed(self) -> set[str]:
        return {peer for made in self.repairs for peer in made.blamed}


async def mended(world: World, broken: Broken, needed_tokens: int) -> Repair:
    """Repair as `Client` does; who was added first is the fastest."""
    offers = [
        Offer(
            peer=served.peer,
            span=served.span,
            decode_seconds_per_block=0.001 * (1 + place),
            prefill_seconds_per_block_token=0.001,
            free_tokens=4096,
        )
        for place, served in enumerate(world.servers)
        if served.peer not in broken.full
    ]
    try:
        return repair(
            broken.hops,
            broken.troubles,
            offers,
            BLOCKS,
            COST,
            retried=broken.retried,
            suspects=broken.suspects,
            needed_tokens=needed_tokens,
        )
    except Gap as gap:
        raise no_route(gap) from gap


async def told(
    world: World,
    hurts: Hurt | Mapping[int, Hurt],
    *,
    prompt: Sequence[int] = PROMPT,
    tokens: int = TOKENS,
    draft: Draft | None = None,
    pulse: Pulse | None = None,
    find: FindRoute | None = None,
    host: "CountingHost | None" = None,
) -> Told:
    """Generate, and hurt something after so many tokens (0: as the prompt is sent)."""
    at = hurts if isinstance(hurts, Mapping) else {HURT_AT: hurts}
    repairs: list[Repair] = []

    async def mend(broken: Broken, needed: int) -> Repair:
        repairs.append(await mended(world, broken, needed))
        return repairs[-1]

    async with open_session(
        host or world.host,
        world.identity,
        find or world.find,
        repair_route=mend,
        pulse=pulse,
        fingerprint=FINGERPRINT,
        max_tokens=len(prompt) + tokens,
        wall_clock=lambda: NOW,
    ) as session:
        made = Told(session, repairs=repairs)

        def on_token(token: int) -> bool:
            made.ids.append(token)
            made.times.append(trio.current_time())
            if len(made.ids) in at:
                at[len(made.ids)](world, session)
            return False

        if 0 in at:
            at[0](world, session)
        settings = GenerateSettings(most_tokens=tokens, end_ids=frozenset())
        await generate(session, prompt, settings, on_token, draft)
        return made


def nothing(_world: World, _session: ClientSession) -> None:
    """Hurt nobody."""


def kill(*places: int) -> Hurt:
    def hurt(world: World, session: ClientSession) -> None:
        for peer in [session.route[place][0] for place in places]:
            world.network.kill(peer)

    return hurt


def cut_off(world: World, victim: str, *, but_for: Sequence[str] = ()) -> None:
    """Let nothing pass between this peer and all others."""
    for other in [world.host.peer, *(served.peer for served in world.servers)]:
        if other not in (victim, *but_for):
            world.network.cut(victim, other)


def after(seconds: float, hurt: Hurt) -> Hurt:
    """The same so much later, while something is under way."""

    def begin(world: World, session: ClientSession) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            hurt(world, session)

        world.nursery.start_soon(wait)

    return begin


def watched(world: World, servers: Sequence[Served]) -> Pulse:
    """Give everybody a pulse; return the client's."""
    pulse = Pulse(world.host)
    world.nursery.start_soon(pulse.run)
    for served in servers:
        theirs = Pulse(served.host)
        world.nursery.start_soon(theirs.run)
        served.server._links._pulse = theirs
    return pulse


class CountingHost:
    """The client's host: counts what it writes along the chain, and knows the newest downlink."""

    def __init__(self, host: MemoryHost) -> None:
        self._host = host
        self.payload_bytes = 0
        self.bytes = 0
        self.downlink: MemoryStream | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._host, name)

    async def open(self, peer: str, protocol: str, *, within: float) -> MemoryStream:
        stream = await self._host.open(peer, protocol, within=within)
        assert isinstance(stream, MemoryStream)
        if protocol == CHAIN_PROTOCOL:
            write, decoder = stream.send_all, Decoder()

            async def send_all(data: bytes) -> None:
                self.bytes += len(data)
                for frame in decoder.feed(data):
                    self.payload_bytes += sum(len(each.data) for each in frame.tensors.values())
                    if frame.header["k"] == "attach":
                        self.downlink = stream
                await write(data)

            stream.send_all = send_all  # type: ignore[method-assign]
            stream.post = lambda data: False  # type: ignore[method-assign]
        return stream
