"""One session as the client drives it: over a route, and over a fresh one when that fails.

1. Every repair ends: with a route, or within the route's deadline with an error that names the
   blocks nobody serves.
2. Whom a trouble accuses is avoided for as long as somebody else can serve its blocks; the oldest
   suspect is forgiven first, and the longer the failures go on the later. Who has no room is not
   asked before the time it named; if nobody else can serve, the session waits for it.
3. A session that leaves its `async with` is closed on every hop that can still be reached.
"""

import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import trio

from routing import repair
from routing.route import Hop, Route
from routing.span import Span
from swarm.chain import Dial, Payload, Send, Shut
from swarm.errors import NoRoute, Unreachable
from swarm.identity import Identity
from swarm.links import Links
from swarm.messages import AnyMessage, FaultKind, HopName, Open, Output, Wanted, Wish
from swarm.model_card import ANY_LENGTH, LengthScaling
from swarm.prefix import prefix_of
from swarm.pulse import Pulse
from swarm.session import Action, Deliver, Session, Trouble
from swarm.suspects import Suspects
from swarm.tasks import open_tasks
from swarm.transport import Host
from swarm.troubles import (
    as_routing,
    has_no_room,
    is_passing,
    is_refusal,
    named_hops,
    refusal_of,
)

OPEN_VALID_SECONDS = 60.0
ANSWER_SECONDS = 600.0
RETRY_SECONDS = 0.25
LOOK_SECONDS = 1.0  # between two looks for others, while those of the route have no room
CLOSE_SECONDS = 2.0
# A session that fails this often without a single output in between is not worth another try.
MOST_REPAIRS = 16
MOST_MENDS = 6  # without an output in between; then a fresh route is the surer way
MOST_REST_SECONDS = 2.0  # before the only server of a block is tried again
MOST_TROUBLES = 64  # a hop may complain without end

FindRoute = Callable[[frozenset[str], int], Awaitable[Route]]
"""Finds a route avoiding these peers, with room for so many tokens. NoRoute of `swarm.errors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A route in trouble, as `routing.repair` sees it. `suspects`: oldest first.

    `full`: who has no room, and must not be taken.
    """

    hops: tuple[Hop, ...]
    troubles: tuple[repair.Trouble, ...]
    retried: repair.Retried
    suspects: tuple[str, ...]
    full: frozenset[str] = frozenset()


RepairRoute = Callable[[Broken, int], Awaitable[repair.Repair]]
"""Replaces lost hops, with room for so many tokens. NoRoute of `swarm.errors`."""


@dataclass(slots=True)
class Journal:
    """What happened to a session, for the one who asked."""

    failovers: int = 0
    replayed_tokens: int = 0
    outputs: int = 0
    troubles: list[Trouble] = field(default_factory=list)


class ClientSession:
    """One conversation over a route that is repaired when it fails. Made by `open_session`."""

    def __init__(
        self,
        host: Host,
        identity: Identity,
        find_route: FindRoute,
        nursery: trio.Nursery,
        *,
        repair_route: RepairRoute | None,
        pulse: Pulse | None,
        suspects: Suspects,
        fingerprint: str,
        max_tokens: int,
        prompt: Sequence[int],
        length_scaling: LengthScaling,
        wall_clock: Callable[[], float],
        route_seconds: float,
    ) -> None:
        self.journal = Journal()
        self.max_tokens = max_tokens
        self.length_scaling = length_scaling
        prompt_regime = length_scaling.regime(len(prompt))
        self._identity = identity
        self._find_route = find_route
        self._wall_clock = wall_clock
        self._route_seconds = route_seconds
        self._repair_route = repair_route
        self._links = Links(host, nursery, self, pulse, is_shielded=True)
        self._session = Session(
            session=os.urandom(16),
            client=identity.peer,
            fingerprint=fingerprint,
            max_tokens=max_tokens,
            sign=self._sign,
            new_link=self._links.new_number,
            prefix=prefix_of(prompt, fingerprint, sequence_length=prompt_regime),
        )
        self._suspects = suspects
        self._troubles: list[Trouble] = []
        self._outputs: deque[Output] = deque()
        self._news = trio.Event()
        self._positions = 0
        self._retried = repair.NOTHING_RETRIED
        self._repairs = 0
        self._is_answered = True  # no trouble since the last output
        self._deadline = float("inf")  # of finding a route, since the last output

    @property
    def route(self) -> tuple[tuple[str, str], ...]:
        """The (peer, span) of the current hops."""
        return tuple((hop.peer, hop.span) for hop in self._session.route)

    @property
    def pages(self) -> int:
        """How many of the first steps are to be a page of the prompt each."""
        return self._session.pages

    @property
    def reused_tokens(self) -> int:
        """How many positions of the prompt the first hop did not compute: others had brought it
        the same.
        """
        return self._session.shared

    async def open(self) -> None:
        """Find the first route and open the session on it. NoRoute after the deadline."""
        self._deadline = trio.current_time() + self._route_seconds
        await self._take_route()

    def step(
        self,
        start: int,
        payload: Payload,
        wanted: Wanted,
        wish: Wish | None = None,
        sequence_length: int = 0,
    ) -> None:
        """Send inputs for positions from `start` on; never waits.

        `sequence_length`: of the text that they are a part of, 0 if they end it. ValueError if they
        reach beyond `max_tokens`.
        """
        length = next(iter(payload.values())).shape[1]
        if start + length > self.max_tokens:
            raise ValueError(f"the session has room for {self.max_tokens} positions")
        self._positions = start + length
        regime = self.length_scaling.regime(max(sequence_length, start + length))
        self._carry_out(self._session.step(start, payload, wanted, wish, regime))

    async def next_output(self) -> Output:
        """Return the next output, repairing the route as often as it takes.

        Raises NoRoute when no route is found in time, Unreachable when routes fail again and again
        or nothing comes over one that is alive, and Refusal when the servers go on refusing.
        """
        deadline = trio.current_time() + ANSWER_SECONDS
        while not self._outputs:
            if self._troubles:
                await self._repair()
            self._news = trio.Event()
            with trio.move_on_at(deadline) as scope:
                if not self._outputs and not self._troubles:
                    await self._news.wait()
            if scope.cancelled_caught:
                raise Unreachable(f"no answer came for {ANSWER_SECONDS:g} seconds")
        self._repairs = 0
        self._is_answered = True
        self._retried = repair.NOTHING_RETRIED
        return self._outputs.popleft()

    def close(self) -> None:
        """End the session on all its hops; never waits."""
        self._carry_out(self._session.close())

    async def wait_closed(self) -> None:
        """Return when no stream of this session is open or being closed; soon, and also when
        cancelled: its hops would keep what they hold for their grace time.
        """
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_SECONDS):
            await self._links.wait_empty()
        self._links.end()

    def received(self, link: int, message: AnyMessage) -> None:
        """A message came over a chain stream."""
        self._carry_out(self._session.received(link, message))

    def ended(self, link: int, failure: FaultKind, message: str) -> None:
        """A chain stream ended."""
        self._carry_out(self._session.ended(link, failure, message))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Dial() | Send() | Shut():
                    self._links.carry_out(action)
                case Deliver(output=output):
                    self.journal.outputs += 1
                    self._outputs.append(output)
                    self._news.set()
                case Trouble():
                    if len(self._troubles) < MOST_TROUBLES:
                        self._troubles.append(action)
                    self._news.set()

    async def _repair(self) -> None:
        """Act on all troubles at once: repair the route in place or, in doubt, take a fresh one."""
        now = trio.current_time()
        if self._is_answered:
            self._is_answered = False
            self._deadline = now + self._route_seconds
        troubles, self._troubles = self._troubles, []
        self.journal.troubles += troubles
        last = troubles[-1]
        is_full = all(map(is_passing, troubles)) and any(map(has_no_room, troubles))
        self._repairs += not is_full  # these are no failures, and the deadline ends them
        if is_refusal(last) and (now >= self._deadline or self._repairs > MOST_REPAIRS):
            raise refusal_of(last)
        if self._repairs > MOST_REPAIRS:
            raise Unreachable(f"the route failed {MOST_REPAIRS} times in a row: {last.message}")
        self.journal.failovers += 1
        for trouble in troubles:
            if has_no_room(trouble):
                self._suspects.leave_alone(trouble.peer, now + trouble.retry_seconds)
        if await self._mend(troubles, now):
            return
        if is_full:
            await self._wait_for_room(troubles)
            return
        for trouble in troubles:
            if trouble.peer and not is_passing(trouble):
                self._suspect(trouble.peer, now, trouble.retry_seconds)
        self.journal.replayed_tokens += self._positions
        await self._take_route(last)
        self._troubles.clear()  # they were of the route just left

    async def _wait_for_room(self, troubles: Sequence[Trouble]) -> None:
        """Wait until all hops of the route may have room, and take it up again; the others keep
        what they have. Meanwhile others are looked for. Refusal if that is too late.

        Ends early if something else goes wrong: all is a trouble again then.
        """
        full = self._suspects.full_at(trio.current_time())
        until = max(full.get(trouble.peer, 0.0) for trouble in troubles)
        while (now := trio.current_time()) < until:
            if now >= self._deadline:
                raise refusal_of(troubles[-1])
            with trio.move_on_at(min(until, self._deadline, now + LOOK_SECONDS)):
                self._news = trio.Event()
                if not self._troubles:
                    await self._news.wait()
            if self._troubles:
                left = max(until - trio.current_time(), RETRY_SECONDS)
                waiting = [replace(each, retry_seconds=left) for each in troubles]
                self._troubles = [*waiting, *self._troubles]
                return
            if await self._mend(troubles, trio.current_time()):
                return
        hops = [HopName(hop.peer, hop.span, "keep") for hop in self._session.route]
        is_forgotten = any(trouble.failure == "forgotten" for trouble in troubles)
        self.journal.replayed_tokens += self._positions
        self._carry_out(self._session.reroute(hops, attach=is_forgotten))

    async def _mend(self, troubles: Sequence[Trouble], now: float) -> bool:
        """Replace the lost hops only. False where that is in doubt, or finds no server."""
        in_doubt = any(trouble.failure in ("broke_word", "dropped") for trouble in troubles)
        if self._repair_route is None or in_doubt or self._repairs > MOST_MENDS:
            return False
        route = self._session.route
        broken = Broken(
            hops=tuple(Hop(hop.peer, Span.parse(hop.span)) for hop in route),
            troubles=tuple(seen for trouble in troubles for seen in as_routing(trouble)),
            retried=self._retried,
            suspects=self._suspects.at(now),
            full=frozenset(self._suspects.full_at(now)),
        )
        try:
            mended = await self._repair_route(broken, self.max_tokens)
        except NoRoute:
            return False
        self._retried = mended.retried
        for trouble in troubles:
            has_left = trouble.failure in ("refused", "draining") and not has_no_room(trouble)
            if trouble.peer in mended.blamed or has_left:
                self._suspect(trouble.peer, now, trouble.retry_seconds)
        for peer in sorted(mended.blamed - {trouble.peer for trouble in troubles}):
            self._suspect(peer, now)  # for what it said of others
        hops = named_hops(mended.hops, troubles)
        if any(hop.mode != "keep" for hop in hops):
            self.journal.replayed_tokens += self._positions
        is_forgotten = any(trouble.failure == "forgotten" for trouble in troubles)
        self._carry_out(self._session.reroute(hops, attach=is_forgotten))
        return True

    def _suspect(self, peer: str, now: float, retry_seconds: float = 0.0) -> None:
        # The first time a false accusation is likelier than a peer that needs a rest.
        rest = min(RETRY_SECONDS * 2 ** (self._repairs - 2), MOST_REST_SECONDS)
        rest = 0.0 if self._repairs == 1 else rest
        self._suspects.add(peer, now, max(rest, retry_seconds))

    async def _take_route(self, last: Trouble | None = None) -> None:
        """Find a route, forgiving suspects oldest first, until the deadline.

        Then NoRoute, or the Refusal that was the last trouble.
        """
        while True:
            now = trio.current_time()
            avoid = frozenset((*self._suspects.at(now), *self._suspects.full_at(now)))
            try:
                route = await self._find_route(avoid, self.max_tokens)
                break
            except NoRoute:
                if not self._suspects.forgive_one(trio.current_time()):
                    if trio.current_time() >= self._deadline:
                        if last is not None and is_refusal(last):
                            raise refusal_of(last) from None
                        raise
                    await trio.sleep(RETRY_SECONDS)
        hops = [(hop.peer, str(hop.span)) for hop in route.hops]
        self._carry_out(self._session.take_route(hops))

    def _sign(self, opened: Open) -> Open:
        dated = msgspec.structs.replace(opened, valid_until=self._wall_clock() + OPEN_VALID_SECONDS)
        return msgspec.structs.replace(dated, signature=self._identity.sign(dated.signed_bytes()))


@asynccontextmanager
async def open_session(
    host: Host,
    identity: Identity,
    find_route: FindRoute,
    *,
    repair_route: RepairRoute | None = None,
    pulse: Pulse | None = None,
    suspects: Suspects | None = None,
    fingerprint: str,
    max_tokens: int,
    prompt: Sequence[int] = (),
    length_scaling: LengthScaling = ANY_LENGTH,
    wall_clock: Callable[[], float] = time.time,
    route_seconds: float = 30.0,
) -> AsyncIterator[ClientSession]:
    """Open a session for at most `max_tokens` positions; close it on the way out.

    With `prompt`, the ids it will begin with, hops that hold the same beginning need not compute it
    again; its first `pages` steps must then be a page of the prompt each, as `generate` sends them.
    `length_scaling` is the model card's. With `repair_route` a trouble costs the lost hops only,
    else a fresh route and a whole replay; `pulse` alone tells of hops that fall silent; sessions
    of a client may share `suspects`. NoRoute if no route is found within `route_seconds`.
    """
    async with open_tasks() as nursery:
        session = ClientSession(
            host,
            identity,
            find_route,
            nursery,
            repair_route=repair_route,
            pulse=pulse,
            suspects=suspects or Suspects(),
            fingerprint=fingerprint,
            max_tokens=max_tokens,
            prompt=prompt,
            length_scaling=length_scaling,
            wall_clock=wall_clock,
            route_seconds=route_seconds,
        )
        try:
            await session.open()
            yield session
        finally:
            session.close()
            await session.wait_closed()
