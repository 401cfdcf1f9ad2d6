"""A peer that serves: takes sessions on its span, within its room, from whom it may.

1. Nothing a peer sends is acted on before its Open is checked: signature, time, place, sender.
2. A leg is admitted only if all tokens it may ever hold fit beside those promised before.
3. A lost up stream costs nothing for one grace time; after it nothing of the leg is left.
4. What sessions can make us hold beside their tokens is bounded: legs, hints, the size of a result.
5. Histories beyond their room are dropped, of the leg that was idle longest first, as far as they
   were sent on: their sessions go on, and only a repair that would need them replays ids instead.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from routing.span import Span
from swarm.chain import Dial, Send, Shut, histories_to_drop
from swarm.errors import PeerFault, SwarmError
from swarm.identity import verify
from swarm.leg import Action, Compute, Forget, Grace
from swarm.legs import Legs
from swarm.links import Links
from swarm.messages import (
    CHAIN_PROTOCOL,
    AnyMessage,
    Attach,
    FaultKind,
    HopTime,
    Open,
    Prepare,
    Refused,
    payload_bytes,
)
from swarm.pulse import Pulse
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import DEFAULT_LIMITS
from swarm.worker import Executor, Worker, payload_of

if TYPE_CHECKING:
    from blocks.executor import Done

log = logging.getLogger(__name__)

FIRST_MESSAGE_SECONDS = 10.0
GRACE_SECONDS = 30.0
RETRY_SECONDS = 5.0
# How wrong the clocks of two machines may be before one refuses the other's Open.
CLOCK_SLACK_SECONDS = 300.0
PREPARE_SECONDS = 10.0
MOST_PREPARED = 32  # neighbours being dialled on a client's hint, at a time
MOST_LEGS = 4096  # a leg without tokens takes memory too
# Enough for the histories of a few long conversations; who knows the machine can say better.
HISTORY_BYTES = 1 << 30
# A result travels in one frame beside its header.
MOST_RESULT_BYTES = DEFAULT_LIMITS.frame_bytes - DEFAULT_LIMITS.header_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a server takes on: its span, for one model, up to so many tokens of cache.

    `history_bytes` of host memory are for what the sessions' steps came to and was sent on.
    """

    span: Span
    fingerprint: str
    cache_tokens: int
    history_bytes: int = HISTORY_BYTES


class Server:
    """Serves one span to whoever the host lets in. `run` is awaited by its owner."""

    def __init__(
        self,
        host: Host,
        executor: Executor,
        room: Room,
        *,
        pulse: Pulse | None = None,
        wall_clock: Callable[[], float] = time.time,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """`pulse` tells of neighbours that fall silent; its owner runs it."""
        self.room = room
        self.is_draining = False
        self._is_ending = False
        self._host = host
        self._pulse = pulse
        self._wall_clock = wall_clock
        self._grace_seconds = grace_seconds
        self._worker = Worker(executor, self._done)
        self._graces: dict[int, trio.CancelScope] = {}
        self._preparing: set[str] = set()

    @property
    def free_tokens(self) -> int:
        """Tokens of cache that no leg was promised."""
        return max(0, self.room.cache_tokens - sum(leg.max_tokens for leg in self._legs.legs()))

    @property
    def sessions(self) -> int:
        """How many legs are held."""
        return len(self._legs)

    @property
    def history_bytes(self) -> int:
        """Bytes of host memory that the histories of all legs take."""
        return self._legs.history_bytes

    @property
    def is_idle(self) -> bool:
        """True when nothing of any session is left here, no stream and no timer."""
        return self._legs.free_of_sessions and not len(self._links)

    def drain(self) -> None:
        """Take no new sessions, and ask the clients of those that run to go elsewhere."""
        self.is_draining = True
        self._carry_out(self._legs.drain())

    async def wait_idle(self) -> None:
        """Return when no session has a stream here."""
        await self._links.wait_empty()

    async def run(self, is_serving: trio.Event) -> None:
        """Serve until cancelled; set the event as soon as sessions can come."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._links = Links(self._host, nursery, self, self._pulse)
            self._legs = Legs(self._admit, self._links.new_number)
            nursery.start_soon(self._worker.run)
            self._host.serve(CHAIN_PROTOCOL, self._handle)
            is_serving.set()
            try:
                await trio.sleep_forever()
            finally:
                self._is_ending = True  # what still comes back starts nothing any more

    def received(self, link: int, message: AnyMessage) -> None:
        """A message came over a chain stream."""
        if self._is_ending:
            return
        if isinstance(message, Prepare):
            self._nursery.start_soon(self._prepare, message.peer)
        elif isinstance(message, Open) and (refused := self._check_place(message)) is not None:
            self._links.carry_out(Send(link, refused))
        else:
            self._carry_out(self._legs.received(link, message))

    def ended(self, link: int, failure: FaultKind, message: str) -> None:
        """A chain stream ended."""
        self._carry_out(self._legs.ended(link, failure, message))

    async def _handle(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        first = await messages.receive(within=FIRST_MESSAGE_SECONDS)
        match first:
            case Prepare():
                await self._prepare(first.peer)
            case Open():
                refused = self._check(first, stream.peer)
                if refused is not None:
                    await messages.send(refused)
                    return
                await self._adopt(messages, lambda link: self._legs.opened(link, first))
            case Attach():
                peer = stream.peer
                await self._adopt(messages, lambda link: self._legs.attached(link, peer, first))
            case _:
                raise PeerFault(f"{stream.peer} began a stream with {type(first).__name__}")

    async def _adopt(self, messages: MessageStream, begin: Callable[[int], list[Action]]) -> None:
        link = self._links.new_number()
        await self._links.adopt(link, messages, lambda: self._carry_out(begin(link)))

    async def _prepare(self, peer: str) -> None:
        if peer in self._preparing or len(self._preparing) >= MOST_PREPARED:
            return
        self._preparing.add(peer)
        try:
            await self._host.dial(peer, within=PREPARE_SECONDS)
        except SwarmError as error:
            log.debug("no link to %s yet: %s", peer, error)
        finally:
            self._preparing.discard(peer)

    def _check(self, opened: Open, sender: str) -> Refused | None:
        """Is this Open what its client signed, in time, and does it come from the hop before?"""
        before = opened.hops[opened.at - 1].peer if opened.at else opened.client
        if sender != before:
            return Refused(reason="not_allowed", message="the route names another sender")
        return self._check_place(opened)

    def _check_place(self, opened: Open) -> Refused | None:
        """Is this Open what its client signed, in time, and does it name us here?"""
        if opened.hops[opened.at].peer != self._host.peer:
            return Refused(reason="not_allowed", message="the route names another peer here")
        if opened.valid_until + CLOCK_SLACK_SECONDS < self._wall_clock():
            return Refused(
                reason="not_allowed", message="the route is too old, or a clock is wrong"
            )
        if not verify(opened.client, opened.signed_bytes(), opened.signature):
            return Refused(reason="not_allowed", message="the route is not signed by its client")
        return None

    def _admit(self, opened: Open) -> Refused | None:
        """May a new leg begin? None for yes."""
        if self.is_draining:
            return Refused(reason="draining", message="this server is leaving")
        if opened.fingerprint != self.room.fingerprint:
            return Refused(reason="wrong_model", message="another model is served here")
        try:
            span = Span.parse(opened.hops[opened.at].span)
        except ValueError:
            span = None
        if span is None or not self.room.span.covers(span):
            held = f"blocks {self.room.span} are held here"
            return Refused(reason="span_not_held", message=held)
        if opened.max_tokens > self.free_tokens or self.sessions >= MOST_LEGS:
            return Refused(
                reason="full",
                message=f"room for {self.free_tokens} tokens is left",
                retry_seconds=RETRY_SECONDS,
            )
        return None

    def _carry_out(self, actions: list[Action]) -> None:
        if self._is_ending:
            return
        for action in actions:
            match action:
                case Dial() | Send() | Shut():
                    self._links.carry_out(action)
                case Compute(leg=number, span=span, step=step):
                    self._worker.compute(number, Span.parse(span).blocks, step)
                case Forget(leg=number):
                    self._worker.forget(number)
                case Grace(leg=number, is_running=True):
                    scope = self._graces[number] = trio.CancelScope()
                    self._nursery.start_soon(self._wait_grace, number, scope)
                case Grace(leg=number):
                    if number in self._graces:
                        self._graces.pop(number).cancel()
        self._save_memory()

    def _save_memory(self) -> None:
        excess = self.history_bytes - self.room.history_bytes
        if excess > 0:
            for number in histories_to_drop(self._legs.spares(), excess):
                self._legs.drop_history(number)

    async def _wait_grace(self, number: int, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(self._grace_seconds)
            del self._graces[number]
            self._carry_out(self._legs.grace_over(number))

    def _done(self, done: "Done") -> None:
        leg = done.key
        if not isinstance(leg, int):
            raise TypeError(f"a result for {leg!r}, which no leg asked for")
        payload = payload_of(done.output)
        error = done.error
        if error is None and payload_bytes(payload) > MOST_RESULT_BYTES:
            error = f"a result of {payload_bytes(payload)} bytes fits no frame: send shorter steps"
        if error is None:
            time_spent = HopTime(done.seconds, done.waited)
            actions = self._legs.computed(leg, done.serial, payload, time_spent)
        else:
            log.warning("a step failed: %s", error)
            actions = self._legs.failed(leg, error)
        self._carry_out(actions)
