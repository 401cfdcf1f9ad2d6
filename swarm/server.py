"""A peer that serves: takes sessions on its span, within its room, from whom it may.

1. Nothing a peer sends is acted on before its Open is checked: signature, time, place, sender.
2. A leg is admitted only if what it brings fits, and its steps run as memory for them is there:
   see `swarm.budget`. Caches of idle sessions give way; their sessions replay.
3. A lost up stream costs nothing for one grace time; after it nothing of the leg is left.
4. What sessions can make us hold beside their tokens is bounded: legs, hints, the size of a result,
   the steps that wait.
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
from swarm.budget import IDLE_SECONDS, Budget
from swarm.caches import Caches
from swarm.chain import Dial, Send, Shut, histories_to_drop
from swarm.errors import PeerFault, SwarmError
from swarm.identity import verify
from swarm.leg import Action, Begun, Compute, Forget, Fork, Grace, Keep
from swarm.legs import WAITING_BYTES, Legs
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
from swarm.sharing import KEEP_SECONDS, MOST_KEPT, Sharing
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import DEFAULT_LIMITS
from swarm.worker import Executor, Worker, payload_of

if TYPE_CHECKING:
    from blocks.executor import Done

log = logging.getLogger(__name__)

FIRST_MESSAGE_SECONDS = 10.0
GRACE_SECONDS = 30.0
RETRY_SECONDS = 5.0  # before who found all legs taken asks again
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

    These take `cache_bytes` of memory; 0 if that is not known, and what caches really take is not
    looked at. `history_bytes` of host memory are for what the sessions' steps came to and was sent
    on, `waiting_bytes` for steps that wait. A session without a step for `idle_seconds` is idle.
    What of `most_kept` sessions that are over is left may stay, for others that begin alike.
    """

    span: Span
    fingerprint: str
    cache_tokens: int
    cache_bytes: int = 0
    history_bytes: int = HISTORY_BYTES
    waiting_bytes: int = WAITING_BYTES
    idle_seconds: float = IDLE_SECONDS
    most_kept: int = MOST_KEPT


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
        budget = Budget(
            room.cache_tokens,
            room.cache_bytes or room.cache_tokens,
            idle_seconds=room.idle_seconds,
        )
        self._caches = Caches(budget, room.span, self._worker, self._evict)
        self._sharing = Sharing(room.fingerprint, most_kept=room.most_kept)
        self._graces: dict[int, trio.CancelScope] = {}
        self._preparing: set[str] = set()

    @property
    def free_tokens(self) -> int:
        """The length of the longest session that would be admitted now."""
        return self._caches.free_tokens if self.sessions < MOST_LEGS else 0

    @property
    def sessions(self) -> int:
        """How many legs are held."""
        return len(self._legs)

    @property
    def history_bytes(self) -> int:
        """Bytes of host memory that the histories of all legs take, and of those kept."""
        return self._legs.history_bytes + self._sharing.history_bytes

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
            waiting = self.room.waiting_bytes
            self._legs = Legs(self._admit, self._links.new_number, waiting, self._sharing)
            nursery.start_soon(self._worker.run)
            nursery.start_soon(self._caches.run)
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
        if self.sessions >= MOST_LEGS:
            held = f"{self.sessions} sessions are held here"
            return Refused(reason="full", message=held, retry_seconds=RETRY_SECONDS)
        if self._worker.waiting_bytes > self.room.waiting_bytes:  # also of sessions that ended
            held = "more steps wait here than there is memory for"
            return Refused(reason="full", message=held, retry_seconds=RETRY_SECONDS)
        seconds = self._caches.refusal(opened, span)
        if seconds is None:
            return None
        left = f"room for {self.free_tokens} tokens is left"
        return Refused(reason="full", message=left, retry_seconds=seconds)

    def _evict(self, leg: int, retry_seconds: float) -> None:
        """Free the cache of a leg, and have its client told when that matters to it."""
        why = "the memory was needed for others"
        self._carry_out(self._legs.evict(leg, why, retry_seconds))

    def _carry_out(self, actions: list[Action]) -> None:
        self._act(actions)
        self._settle()

    def _act(self, actions: list[Action]) -> None:
        if self._is_ending:
            return
        for action in actions:
            match action:
                case Dial() | Send() | Shut():
                    self._links.carry_out(action)
                case Begun(leg=number, opened=opened):
                    self._caches.begun(number, opened)
                case Compute():
                    self._caches.compute(action)
                case Fork(leg=number, of=donor, length=length):
                    self._caches.fork(number, donor, length)
                case Keep(leg=number):
                    self._caches.keep(number)
                    self._begin_grace(number, KEEP_SECONDS)
                case Forget(leg=number):
                    self._caches.forget(number)
                case Grace(leg=number, is_running=True):
                    self._begin_grace(number, self._grace_seconds)
                case Grace(leg=number):
                    if number in self._graces:
                        self._graces.pop(number).cancel()

    def _settle(self) -> None:
        if not self._is_ending:
            self._caches.settle()
            self._save_memory()

    def _save_memory(self) -> None:
        excess = self.history_bytes - self.room.history_bytes
        if excess > 0:
            dropped = histories_to_drop(self._legs.spares(), excess)
            actions = [action for number in dropped for action in self._legs.drop_history(number)]
            if actions:  # kept legs go altogether
                self._carry_out(actions)

    def _begin_grace(self, number: int, seconds: float) -> None:
        scope = self._graces[number] = trio.CancelScope()
        self._nursery.start_soon(self._wait_grace, number, seconds, scope)

    async def _wait_grace(self, number: int, seconds: float, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(seconds)
            del self._graces[number]
            self._carry_out(self._legs.grace_over(number))

    def _done(self, done: "Done") -> None:
        leg = done.key
        if not isinstance(leg, int):
            raise TypeError(f"a result for {leg!r}, which no leg asked for")
        if done.serial == 0:  # the leg's cache was to begin as another's, which is no more
            self._carry_out(self._legs.evict(leg, "what it began with is gone", 0.0))
            return
        payload = payload_of(done.output)
        error, size = done.error, payload_bytes(payload)
        if error is None and size > MOST_RESULT_BYTES:
            error = f"a result of {size} bytes fits no frame: send shorter steps"
        if error is None:
            time_spent = HopTime(done.seconds, done.waited)
            actions = self._legs.computed(leg, done.serial, payload, time_spent, done.shortest_fork)
        else:
            log.warning("a step failed: %s", error)
            actions = self._legs.failed(leg, error)
        self._act(actions)  # first: somebody waits for the result
        self._caches.done(leg, done.length, done.cache_bytes if self.room.cache_bytes else 0)
        self._settle()
