"""Sessions on a server whose memory is a budget, in a time of its own: nothing but arithmetic.

Each session brings its prompt, then decodes in steps until it has said all; some pause between. One
that is evicted begins anew with all it had, when it is told to or as soon as it goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from swarm.budget import Asked, Budget, Evict

STEP_SECONDS = 0.05
MOST_EVENTS = 100_000


@dataclass(frozen=True, slots=True)
class Plan:
    """A session as its user means it: it begins, says so much, and pauses once at some length."""

    at: float
    prompt: int
    length: int
    promise: int
    pause_at: int = 0
    pause_seconds: float = 0.0


@dataclass(slots=True)
class Told:
    """What became of it."""

    plan: Plan
    held: int = 0  # positions it has said and must replay when it begins anew
    leg: int | None = None
    evictions: int = 0
    refusals: int = 0
    ended: float | None = None
    has_paused: bool = False
    is_pausing: bool = False


@dataclass(slots=True)
class Server:
    """One budget, an executor that does one step after the other, and its clock."""

    budget: Budget
    capacity: int
    sessions: list[Told]
    token_bytes: int = 1
    tells_bytes: bool = True
    now: float = 0.0
    busy_until: float = 0.0
    evicted_running: bool = False
    most_charged: int = 0
    _look_at: float = -1.0
    _events: list[tuple[float, int, str, int]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _legs: dict[int, Told] = field(default_factory=dict)
    _steps: dict[int, list[int]] = field(default_factory=dict)  # waiting lengths, by leg
    _running: dict[int, list[int]] = field(default_factory=dict)

    def run(self) -> None:
        """Until nothing more happens. AssertionError if that takes for ever."""
        for place, told in enumerate(self.sessions):
            self._at(told.plan.at, "begin", place)
        for _ in range(MOST_EVENTS):
            if not self._events:
                return
            self.now, _, what, which = heappop(self._events)
            getattr(self, f"_{what}")(which)
            self._settle()
        raise AssertionError("it goes on without end")

    def _at(self, when: float, what: str, which: int) -> None:
        heappush(self._events, (when, next(self._order), what, which))

    def _begin(self, place: int) -> None:
        told = self.sessions[place]
        asked = Asked(session=place, promise=told.plan.promise, positions=told.held)
        seconds = self.budget.refusal(asked, self.now)
        if seconds is not None:
            assert seconds > 0
            told.refusals += 1
            self._at(self.now + seconds, "begin", place)
            return
        told.leg = next(self._numbers)
        self._legs[told.leg] = told
        self.budget.begun(told.leg, asked, self.now)
        self._settle()
        self._send(told, max(told.held, told.plan.prompt))

    def _send(self, told: Told, length: int) -> None:
        assert told.leg is not None
        self._steps.setdefault(told.leg, []).append(length)
        self.budget.ask(told.leg, length, self.now)

    def _done(self, leg: int) -> None:
        length = self._running[leg].pop(0)
        told = self._legs.get(leg)
        taken = length * self.token_bytes if self.tells_bytes else 0
        self.budget.done(leg, length, taken, self.now)
        if told is None:
            return
        told.held = max(told.held, length)
        plan = told.plan
        if told.held >= plan.length:
            told.ended = self.now
            self.budget.forget(leg)
            del self._legs[leg]
        elif plan.pause_at and told.held >= plan.pause_at and not told.has_paused:
            told.has_paused = told.is_pausing = True
            self._at(self.now + plan.pause_seconds, "go_on", self.sessions.index(told))
        else:
            self._go_on(self.sessions.index(told))

    def _go_on(self, place: int) -> None:
        told = self.sessions[place]
        told.is_pausing = False
        if told.leg not in self._legs:  # it was evicted while it paused
            self._begin(place)
        else:
            self._send(told, min(told.held + 8, told.plan.length))

    def _look(self, _which: int) -> None:
        pass

    def _settle(self) -> None:
        for decision in self.budget.settle(self.now):
            leg = decision.leg
            if isinstance(decision, Evict):
                self._evicted(decision)
                continue
            length = self._steps[leg].pop(0)
            self._running.setdefault(leg, []).append(length)
            self.busy_until = max(self.busy_until, self.now) + STEP_SECONDS
            self._at(self.busy_until, "done", leg)
        self.most_charged = max(self.most_charged, self.budget._charged)
        delay = self.budget.next_look(self.now)
        if delay is not None and not self.now < self._look_at <= self.now + delay:
            self._look_at = self.now + delay
            self._at(self._look_at, "look", 0)

    def _evicted(self, evict: Evict) -> None:
        told = self._legs.pop(evict.leg)
        self.evicted_running |= bool(self._running.get(evict.leg))
        told.evictions += 1
        self._steps.pop(evict.leg, None)
        if not told.is_pausing:
            self._at(self.now + evict.retry_seconds, "begin", self.sessions.index(told))


def serve(plans: Sequence[Plan], tokens: int, **changes: object) -> Server:
    """Let all of them be served by one server with room for so many tokens."""
    server = Server(Budget(tokens, tokens), tokens, [Told(plan) for plan in plans], **changes)  # type: ignore[arg-type]
    server.run()
    return server
