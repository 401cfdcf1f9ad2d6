"""Silent peers are noticed: ping and pong a few times a second, on a stream of their own.

`Heart` judges one peer and has no clock; `Pulse` asks, answers and tells.

1. Only an unanswered question makes a peer silent. A stream that cannot be opened, or ends, is
   asked for again; what that means is judged by the same clock.
2. Any byte received is life, whatever stream it came on: pongs are only there for lack of others.
3. Our own lateness accuses nobody: it is measured and added to what a peer is given.
4. A peer may ask for more time by naming its own lag, up to MOST_SECONDS in all, never for ever.
5. What a peer can make us do is bounded: one stream for each asker, so many pongs a second, small
   frames. So are the streams that we hold.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import trio

from swarm.errors import PeerFault, SwarmError, Unreachable
from swarm.messages import Number
from swarm.probe import PROBE_PROTOCOL
from swarm.transport import Host, MessageStream, Stream
from swarm.wire import Frame, Limits

PULSE_PROTOCOL = "/swarm/pulse/1"

Verdict = Literal["alive", "late", "silent"]

BEAT_SECONDS = 0.25  # between pings
# How long an overdue answer is waited for. A lost packet is sent again after a round trip and at
# least 0.2 s; with the beat before the first unanswered ping it makes silence cost one second.
PATIENCE_SECONDS = 0.75
MOST_SECONDS = 10.0  # what slow answers and a peer's word can win it
LAG_SECONDS = 5.0  # how long the worst lag is remembered: it takes a while to show again
MOST_WATCHED = 512  # peers asked at a time; the others wait for their turn

# RFC 6298, sections 2.1 to 2.3: the wait before any round trip is known, and the gains.
_FIRST_SECONDS = 1.0
_VARIATIONS = 4.0
_GAIN = 1 / 8
_VARIATION_GAIN = 1 / 4

_TICK_SECONDS = 0.05  # between looks at all hearts; the RFC's granularity
_DIAL_SECONDS = 5.0
_OPEN_SECONDS = 5.0
_MOST_PAUSE_SECONDS = 2.0  # between tries to get a stream
_IDLE_SECONDS = 30.0
_MOST_UNANSWERED = 64  # pings on one stream: 16 seconds; also what an honest burst can bring
_PONG_SECONDS = 0.125  # a peer may ask for one in this time: twice as often as it should
_LIMITS = Limits(frame_bytes=256, header_bytes=256, tensors=0)

_logger = logging.getLogger(__name__)


class Heart:
    """How long one peer may be silent, from how it answered so far. Seconds, and no clock."""

    def __init__(self) -> None:
        self._asked_at: float | None = None  # the first ping since the last byte
        self._round_trip: float | None = None
        self._variation = 0.0
        self._their_lag = 0.0

    def sent(self, now: float) -> None:
        """A ping is being sent, or could not be."""
        if self._asked_at is None:
            self._asked_at = now

    def excuse(self, seconds: float) -> None:
        """For so long we could not have heard it: that does not count. `verdict` mends excess."""
        if self._asked_at is not None:
            self._asked_at += seconds

    def heard(self, round_trip: float | None = None, their_lag: float | None = None) -> None:
        """A byte came; as part of a pong it tells its round trip and the peer's worst lag."""
        self._asked_at = None
        if their_lag is not None:
            self._their_lag = their_lag
        if round_trip is not None:
            self._smooth(min(max(round_trip, 0.0), MOST_SECONDS))

    def verdict(self, now: float, own_lag: float) -> Verdict:
        """Late: the answer is overdue for this peer. Silent: so long that it is given up.

        `own_lag` is our own worst lag; it counts in full, since no peer can stretch it.
        """
        if self._asked_at is None:
            return "alive"
        self._asked_at = min(self._asked_at, now)  # a clock set back starts the wait anew
        waited = now - self._asked_at
        if waited > self.silent_after(own_lag):
            return "silent"
        return "late" if waited > self._late_after() + own_lag else "alive"

    def silent_after(self, own_lag: float) -> float:
        """Seconds between an unanswered ping and the verdict that the peer is silent."""
        return min(self._late_after() + PATIENCE_SECONDS, MOST_SECONDS) + own_lag

    def _late_after(self) -> float:
        expected = _FIRST_SECONDS
        if self._round_trip is not None:
            expected = self._round_trip + max(_TICK_SECONDS, _VARIATIONS * self._variation)
        return expected + self._their_lag

    def _smooth(self, sample: float) -> None:
        if self._round_trip is None:
            self._round_trip, self._variation = sample, sample / 2
            return
        error = abs(self._round_trip - sample)
        self._variation += _VARIATION_GAIN * (error - self._variation)
        self._round_trip += _GAIN * (sample - self._round_trip)


class Lag:
    """The worst lateness of the last LAG_SECONDS."""

    def __init__(self) -> None:
        self._worst: deque[tuple[float, float]] = deque()  # later ones are smaller

    def note(self, now: float, seconds: float) -> None:
        """We were so many seconds late."""
        while self._worst and self._worst[-1][1] <= seconds:
            self._worst.pop()
        self._worst.append((now, seconds))

    def worst(self, now: float) -> float:
        """Return the worst in seconds, 0 if nothing was noted lately."""
        while self._worst and self._worst[0][0] < now - LAG_SECONDS:
            self._worst.popleft()
        return self._worst[0][1] if self._worst else 0.0


@dataclass(slots=True, eq=False)
class Watch:
    """One caller's interest in a peer. Made by `Pulse.watch`, given back by `release`."""

    peer: str
    on_silent: Callable[[str], None]
    since: float
    end: Callable[["Watch"], None]
    is_told: bool = False

    def release(self) -> None:
        """Be told nothing any more, from now on. May be called again, and from `on_silent`."""
        self.end(self)


@dataclass(slots=True, eq=False)
class _Watched:
    peer: str
    heart: Heart
    watches: list[Watch] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class _Beat(msgspec.Struct, frozen=True):
    """A ping or its pong: its number and the sender's own worst lag in seconds.

    `swarm.probe` names the number alike, so that a peer without a pulse can be asked by probes.
    """

    round: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    lag: Number = 0.0


class Pulse:
    """Asks the peers that are watched, and answers those that watch us. `run` is awaited once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lag = Lag()
        self._next_tick = float("inf")
        self._watched: dict[str, _Watched] = {}
        self._known: dict[str, Heart] = {}  # of peers no longer watched, the oldest first
        self._askers: dict[str, trio.CancelScope] = {}
        self._paid_until: dict[str, float] = {}  # by asker: see `_charge`
        self._nursery: trio.Nursery | None = None
        self._room = trio.Semaphore(MOST_WATCHED)
        self._is_needed = trio.Event()

    @property
    def watched(self) -> frozenset[str]:
        """The peers that somebody watches."""
        return frozenset(self._watched)

    def watch(self, peer: str, on_silent: Callable[[str], None]) -> Watch:
        """Watch a peer until the handle is released; a peer is asked once for all who watch it.

        `on_silent(peer)` is called once for each silence, on the trio thread, and must not wait:
        a reason to repair, never to blame. The peer is asked on, and may be heard again.
        """
        watched = self._watched.get(peer)
        if watched is None:
            watched = self._watched[peer] = _Watched(peer, self._known.pop(peer, Heart()))
            self._start(watched)
        watch = Watch(peer, on_silent, trio.current_time(), self._release)
        watched.watches.append(watch)
        return watch

    def heard(self, peer: str) -> None:
        """Some byte came from this peer, on any stream. Cheap, and without effect on strangers."""
        if peer in self._watched:
            self._watched[peer].heart.heard()

    def verdict(self, peer: str) -> Verdict:
        """How a peer stands now; alive if nobody watches it."""
        now = trio.current_time()
        watched = self._watched.get(peer)
        return watched.heart.verdict(now, self._own_lag(now)) if watched else "alive"

    async def run(self) -> None:
        """Answer, ask and tell until cancelled."""
        self._host.serve(PULSE_PROTOCOL, self._answer)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for watched in self._watched.values():
                    self._start(watched)
                await self._tick()
            finally:
                self._nursery = None

    def _start(self, watched: _Watched) -> None:
        self._is_needed.set()
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_asking, watched)

    def _release(self, watch: Watch) -> None:
        watched = self._watched.get(watch.peer)
        if watched is None or watch not in watched.watches:
            return
        watched.watches.remove(watch)
        if not watched.watches:
            del self._watched[watch.peer]
            watched.scope.cancel()
            watched.heart.heard()
            self._known[watch.peer] = watched.heart  # watched again, it is no stranger
            if len(self._known) > MOST_WATCHED:
                del self._known[next(iter(self._known))]

    # our own clock

    async def _tick(self) -> None:
        """Measure how late we are ourselves, and judge, while anybody asks or is asked."""
        while True:
            if not self._watched and not self._askers:
                self._next_tick = float("inf")
                self._is_needed = trio.Event()
                await self._is_needed.wait()
            self._next_tick = trio.current_time() + _TICK_SECONDS
            await trio.sleep_until(self._next_tick)
            now = trio.current_time()
            late = now - self._next_tick
            self._lag.note(now, late)
            for watched in tuple(self._watched.values()):
                watched.heart.excuse(late)
                self._judge(watched, now)

    def _own_lag(self, now: float) -> float:
        """Our worst lag in seconds: also what the tick that should be running would find."""
        return max(self._lag.worst(now), now - self._next_tick)

    def _judge(self, watched: _Watched, now: float) -> None:
        own_lag = self._own_lag(now)
        verdict = watched.heart.verdict(now, own_lag)
        for watch in tuple(watched.watches):
            if verdict != "silent":
                watch.is_told = False
                continue
            # Who begins to watch a silent peer gives it a wait of its own: it may be on its way.
            is_due = now - watch.since > watched.heart.silent_after(own_lag)
            if is_due and not watch.is_told and watch in watched.watches:
                watch.is_told = True
                watch.on_silent(watched.peer)

    # asking

    async def _keep_asking(self, watched: _Watched) -> None:
        pause = BEAT_SECONDS
        with watched.scope:
            async with self._room:
                while True:
                    if await self._ask(watched):
                        pause = BEAT_SECONDS
                    await trio.sleep(pause)
                    pause = min(2 * pause, _MOST_PAUSE_SECONDS)

    async def _ask(self, watched: _Watched) -> bool:
        """Ask as long as a stream lasts. False if no pong came."""
        try:
            if watched.peer not in self._host.links():
                # It takes many round trips, and ends by itself: not yet a question unanswered.
                await self._host.dial(watched.peer, within=_DIAL_SECONDS)
            for protocol in (PULSE_PROTOCOL, PROBE_PROTOCOL):
                if await self._ask_over(watched, protocol):
                    return True
        except SwarmError as error:
            _logger.debug("%s cannot be asked: %s", watched.peer, error)
        watched.heart.sent(trio.current_time())
        return False

    async def _ask_over(self, watched: _Watched, protocol: str) -> bool:
        """Ask over one stream until it ends. Unreachable if it could not be opened."""
        opened = await self._host.open(watched.peer, protocol, within=_OPEN_SECONDS)
        asking = _Asking(MessageStream(opened, _LIMITS), watched.heart, self._own_lag)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(asking.send_pings)
                await asking.take_pongs()
        except* SwarmError as group:
            _logger.debug("%s is asked no more over %s: %s", watched.peer, protocol, group)
        finally:
            await opened.close()
        return asking.is_answered

    # answering

    async def _answer(self, stream: Stream) -> None:
        """Answer the pings of one peer; its newest stream takes the place of the one before."""
        peer = stream.peer
        with trio.CancelScope() as scope:
            if peer in self._askers:
                self._askers[peer].cancel()
            self._askers[peer] = scope
            self._is_needed.set()
            now = trio.current_time()
            self._paid_until = {p: paid for p, paid in self._paid_until.items() if paid > now}
            try:
                await self._send_pongs(MessageStream(stream, _LIMITS))
            finally:
                if self._askers[peer] is scope:
                    del self._askers[peer]

    async def _send_pongs(self, stream: MessageStream) -> None:
        while True:
            ping = _beat_of(await stream.receive_frame(within=_IDLE_SECONDS), stream.peer)
            now = trio.current_time()
            self._charge(stream.peer, now)
            if stream.peer in self._watched:
                self._watched[stream.peer].heart.heard(their_lag=ping.lag)
            await stream.send_frame(_frame_of(ping.round, self._own_lag(now)))

    def _charge(self, peer: str, now: float) -> None:
        """Count one pong against its asker. PeerFault if it asks for more than its share."""
        paid_until = max(self._paid_until.get(peer, now), now) + _PONG_SECONDS
        if paid_until - now > _MOST_UNANSWERED * _PONG_SECONDS:
            raise PeerFault(f"{peer} asks for too many pongs")
        self._paid_until[peer] = paid_until


class _Asking:
    """One stream on which pings go out and pongs come back."""

    def __init__(
        self, stream: MessageStream, heart: Heart, own_lag: Callable[[float], float]
    ) -> None:
        self.is_answered = False
        self._stream = stream
        self._heart = heart
        self._own_lag = own_lag
        self._sent_at: dict[int, float] = {}

    async def send_pings(self) -> None:
        """Send one each beat, until too many are unanswered: then Unreachable."""
        number = 0
        while len(self._sent_at) < _MOST_UNANSWERED:
            now = self._sent_at[number] = trio.current_time()
            self._heart.sent(now)
            await self._stream.send_frame(_frame_of(number, self._own_lag(now)))
            number += 1
            await trio.sleep(BEAT_SECONDS)
        raise Unreachable(f"{self._stream.peer} left {_MOST_UNANSWERED} pings unanswered")

    async def take_pongs(self) -> None:
        """Take them until the stream ends: Unreachable, or PeerFault for a wrong one."""
        while True:
            pong = _beat_of(await self._stream.receive_frame(), self._stream.peer)
            sent_at = self._sent_at.pop(pong.round, None)
            if sent_at is None:
                raise PeerFault(f"{self._stream.peer} answered a ping that it was not sent")
            self.is_answered = True
            self._heart.heard(trio.current_time() - sent_at, pong.lag)


def _frame_of(number: int, lag: float) -> Frame:
    return Frame({"round": number, "lag": lag})


def _beat_of(frame: Frame, peer: str) -> _Beat:
    try:
        return msgspec.convert(frame.header, _Beat)
    except msgspec.ValidationError as error:
        raise PeerFault(f"{peer} sent a malformed ping or pong: {error}") from error
