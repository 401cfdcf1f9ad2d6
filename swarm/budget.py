"""Whose cache may grow, who waits for memory, and who gives way. Sans-IO: the time is told.

A leg is charged for what its cache takes, or may take with a page more than its positions,
whichever is more. So sessions may together promise more than there is memory for, and those that
end early or pause never need it.

1. What legs are charged fits the memory there is, unless caches came out greater than planned.
2. When a leg cannot grow, caches that are kept of sessions that are over are evicted, then those
   of idle sessions, idle longest first; then, for an
   older leg only, that of the newest. Never one with a step in the executor: that is waited for.
3. So the oldest leg always goes on, and every session comes to its end. Who is newest waits, and
   gives way when that takes too long.
4. Who gave way comes back when all that it had fits, and before those who came later: an eviction
   is paid for by more room for others, never by another eviction alone.
5. Promises come to OVERCOMMIT times the memory at most, and none is greater than the whole.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from math import ceil

PAGE_TOKENS = 64  # a step of growth; what a cache has room for when it is made
OVERCOMMIT = 4  # most sessions use a fraction of what they promise; more would mean many replays
IDLE_SECONDS = 2.0  # no step for so long: a program that generates would have sent one
PATIENCE_SECONDS = 2.0  # a step waits so long for memory before its leg gives way
LEAST_RETRY_SECONDS = 0.5
MOST_RETRY_SECONDS = 30.0
# Who was told when to come back keeps its place in the line for so long beyond that.
PLACE_SECONDS = 5.0
KNOWN_SECONDS = 600.0  # so long one that comes back after its place was given up has it again
MOST_PLACES = 1024
_LEAST_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """Give the executor the next of the steps of this leg that wait."""

    leg: int


@dataclass(frozen=True, slots=True)
class Evict:
    """Free the cache of this leg; it may begin anew after so many seconds, 0 for at once."""

    leg: int
    retry_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an Open asks for: a session of so many tokens, of which `positions` come at once.

    `share`: the part of the server's blocks that it runs through.
    """

    session: Hashable
    promise: int
    positions: int = 0
    share: float = 1.0


@dataclass(slots=True)
class _Leg:
    """What the budget knows of a leg."""

    asked: Asked
    token_bytes: float  # what a position takes, room to grow included
    began: float
    touched: float  # when a step came or was done
    charge: int = 0
    length: int = 0  # positions of the steps given to the executor
    taken_bytes: int = 0  # by the cache, as the executor told ...
    taken_length: int = 0  # ... when it held so many positions
    running: int = 0
    steps: int = 0  # given to the executor so far
    is_kept: bool = False  # its session is over
    waiting: deque[tuple[int, float]] = field(default_factory=deque)  # length then, and since when

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def is_empty(self) -> bool:
        return not (self.is_busy or self.length or self.taken_bytes)

    def need(self, length: int) -> int:
        """Bytes to be charged for so many positions and a page to grow."""
        tokens = _paged(length, self.asked.promise)
        planned = ceil(tokens * self.token_bytes)
        if not self.taken_bytes:
            return planned
        # Room at most doubles; layers that keep a window only do not grow with each position.
        grown = 2 * self.taken_bytes + ceil((tokens - self.taken_length) * self.token_bytes)
        return max(self.taken_bytes, min(planned, grown))

    def ends_in(self, now: float) -> float:
        """Return the seconds until it may have said all it promised, a token with each step, at
        the pace it had so far.
        """
        return max(0, self.asked.promise - self.length) * (now - self.began) / max(self.steps, 1)


@dataclass(slots=True)
class _Place:
    """A session that gave way: what it needs to come back, and until when that is kept for it."""

    need: int
    promise: int
    until: float


class Budget:
    """The memory for one server's caches: for `tokens` of all its blocks, in `byte_count` bytes."""

    def __init__(
        self,
        tokens: int,
        byte_count: int,
        *,
        idle_seconds: float = IDLE_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._tokens = tokens
        self._bytes = max(byte_count, 1)
        self._idle_seconds = idle_seconds
        self._patience_seconds = patience_seconds
        self._legs: dict[int, _Leg] = {}  # oldest first
        self._charged = 0
        self._waiting: set[int] = set()  # legs with steps that wait
        self._doomed: set[int] = set()  # legs to be evicted when nothing of them runs
        self._line: dict[Hashable, _Place] = {}  # in the order in which they were evicted

    # --- who may come --------------------------------------------------------------------------

    def free_tokens(self, now: float) -> int:
        """Return the length of the longest session that would be admitted now."""
        return self._most_promise(self._room(now) - self._kept_for_others(None, now), None, now)

    def refusal(self, asked: Asked, now: float) -> float | None:
        """Return None if this session may begin, else the seconds after which asking may help.

        What is idle counts as free: `begun` and `settle` evict it.
        """
        place = self._line.get(asked.session)
        before = self._kept_for_others(asked.session, now)
        room = self._room(now) - before
        need = self._new_leg(asked, now).need(asked.positions)
        if need <= room and asked.promise <= self._most_promise(room, asked.session, now):
            self._line.pop(asked.session, None)
            return None
        seconds = self._seconds_until(need + before, now)
        if asked.promise > self._tokens:
            seconds = MOST_RETRY_SECONDS
        if place is not None:
            place.until = now + seconds + PLACE_SECONDS
        return seconds

    def begun(self, leg: int, asked: Asked, now: float) -> None:
        """A leg with this number begins; it is charged for what it brings, and a page."""
        made = self._legs[leg] = self._new_leg(asked, now)
        self._charge(made, made.need(asked.positions))

    def forked(self, leg: int, length: int) -> None:
        """The leg begins with so many positions of another. It is charged for them, though nothing
        is copied yet: it holds on to them whatever becomes of the other.
        """
        one = self._legs[leg]
        one.length = length
        self._charge(one, max(one.charge, one.need(length)))

    # --- what happens to legs ------------------------------------------------------------------

    def ask(self, leg: int, length: int, now: float) -> None:
        """A step waits that brings the leg to so many positions."""
        one = self._legs[leg]
        one.waiting.append((length, now))
        one.touched = now
        self._waiting.add(leg)

    def done(self, leg: int, length: int, taken_bytes: int, now: float) -> None:
        """The executor has done a step of the leg, whose cache takes so much now, 0 if unknown."""
        one = self._legs.get(leg)
        if one is None:
            return
        one.running -= 1
        one.touched = now
        one.taken_bytes, one.taken_length = taken_bytes, length
        self._charge(one, one.need(one.length))

    def keep(self, leg: int) -> None:
        """The leg's session is over: it promises nothing, and its cache is the first to go."""
        one = self._legs[leg]
        one.is_kept, one.asked = True, replace(one.asked, promise=0)
        self._charge(one, one.taken_bytes or one.charge)

    def forget(self, leg: int) -> None:
        """The leg is no more, or its cache."""
        one = self._legs.pop(leg, None)
        if one is not None:
            self._charge(one, 0)
            self._waiting.discard(leg)

    def settle(self, now: float) -> list[Run | Evict]:
        """Decide what becomes of the steps that wait. To be called after all of the above."""
        made: list[Run | Evict] = []
        self._doomed.clear()
        while self._free < 0 and (idle := self._idle(now)) is not None:
            self._evict(idle, now, made)
        may_grow = True
        for number in sorted(self._waiting):  # the oldest first
            if number not in self._waiting or number in self._doomed:
                continue  # it gave way to an older one, or is about to
            if self._run_waiting(number, now, made, may_grow=may_grow):
                continue
            if not (may_grow and self._doomed):  # else it is being served
                self._lose_patience(number, now, made)
            if number in self._legs:
                may_grow = False  # nobody who is newer takes what this one waits for
        return made

    def next_look(self, now: float) -> float | None:
        """Return after how many seconds `settle` may decide otherwise by itself; None for never."""
        if not self._waiting:
            return None
        waiting = [self._legs[number].waiting[0] for number in self._waiting]
        times = [since + self._patience_seconds for _, since in waiting]
        times += [
            leg.touched + self._idle_seconds
            for leg in self._legs.values()
            if leg.charge and not leg.is_busy
        ]
        return max(min(times) - now, _LEAST_LOOK_SECONDS)

    # --- inside --------------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        return self._bytes - self._charged

    def _charge(self, leg: _Leg, charge: int) -> None:
        self._charged += charge - leg.charge
        leg.charge = charge

    def _new_leg(self, asked: Asked, now: float) -> _Leg:
        return _Leg(asked, self._bytes * asked.share / max(self._tokens, 1), now, now)

    def _is_idle(self, leg: _Leg, now: float) -> bool:
        return not leg.is_busy and (leg.is_kept or now - leg.touched >= self._idle_seconds)

    def _room(self, now: float) -> int:
        """What is free, or would be if all idle sessions were evicted."""
        idle = sum(leg.charge for leg in self._legs.values() if self._is_idle(leg, now))
        return self._free + idle

    def _kept_for_others(self, session: Hashable, now: float) -> int:
        """What is kept for those in the line before this session; all, if it has no place."""
        kept = 0
        for each, place in self._line.items():
            if each == session:
                break
            kept += place.need if place.until > now else 0
        return kept

    def _most_promise(self, room: int, session: Hashable, now: float) -> int:
        """The longest session that may come, given so much room."""
        if room <= 0:
            return 0
        promised = sum(leg.asked.promise for leg in self._legs.values())
        promised += sum(
            place.promise
            for each, place in self._line.items()
            if each != session and place.until > now
        )
        fitting = room * self._tokens // self._bytes
        if fitting >= PAGE_TOKENS:
            fitting *= OVERCOMMIT
        return max(0, min(self._tokens, fitting, OVERCOMMIT * self._tokens - promised))

    def _run_waiting(
        self, number: int, now: float, made: list[Run | Evict], *, may_grow: bool
    ) -> bool:
        """Let the leg's steps run for which there is room. False if some are left."""
        leg = self._legs[number]
        while leg.waiting:
            length = leg.waiting[0][0]
            more = max(leg.need(length) - leg.charge, 0)
            if more and not (may_grow and self._make_room(number, more, now, made)):
                return False
            self._charge(leg, leg.charge + more)
            leg.waiting.popleft()
            leg.length = length
            leg.running += 1
            leg.steps += 1
            made.append(Run(number))
        self._waiting.discard(number)
        return True

    def _make_room(self, number: int, more: int, now: float, made: list[Run | Evict]) -> bool:
        """Evict until so much is free. False if that is not to be had, or not yet.

        Nobody is evicted in vain.
        """
        if more <= self._free:
            return True
        others = [(each, leg) for each, leg in self._legs.items() if each != number and leg.charge]
        may_go = [leg.charge for each, leg in others if each > number or self._is_idle(leg, now)]
        if more > self._free + sum(may_go):
            return False
        while more > self._free:
            victim = self._idle(now, but=number)
            if victim is None:
                victim = max(each for each, leg in others if leg.charge and each in self._legs)
            if self._legs[victim].running:
                self._doomed.add(victim)
                return False
            self._evict(victim, now, made)
        return True

    def _idle(self, now: float, but: int | None = None) -> int | None:
        """The leg that has been idle longest, of those that are."""
        idle = [
            (not leg.is_kept, leg.touched, number)
            for number, leg in self._legs.items()
            if number != but and leg.charge and self._is_idle(leg, now)
        ]
        return min(idle)[2] if idle else None

    def _lose_patience(self, number: int, now: float, made: list[Run | Evict]) -> None:
        """Let a leg give way that has waited too long, unless something of it runs."""
        leg = self._legs[number]
        if not leg.running and now - leg.waiting[0][1] >= self._patience_seconds:
            self._evict(number, now, made)

    def _evict(self, number: int, now: float, made: list[Run | Evict]) -> None:
        leg = self._legs[number]
        if leg.is_empty:
            self._charge(leg, 0)  # there is nothing to evict: its first step will ask again
            return
        need = leg.need(leg.waiting[-1][0] if leg.waiting else leg.length)
        is_idle = self._is_idle(leg, now)
        self.forget(number)
        if leg.is_kept:  # nobody comes back for it
            made.append(Evict(number, 0.0))
            return
        seconds = 0.0 if is_idle else self._seconds_until(need, now)
        # Nothing is kept for an idle session, unless it comes back and is refused.
        until = now if is_idle else now + seconds + PLACE_SECONDS
        self._line.pop(leg.asked.session, None)
        self._line[leg.asked.session] = _Place(need, leg.asked.promise, until)
        self._forget_places(now)
        made.append(Evict(number, seconds))

    def _forget_places(self, now: float) -> None:
        for session, place in tuple(self._line.items()):
            if place.until + KNOWN_SECONDS <= now or len(self._line) > MOST_PLACES:
                del self._line[session]

    def _seconds_until(self, need: int, now: float) -> float:
        """Guess when so much may be free: as sessions fall idle, or come to their promised end."""
        coming: list[tuple[float, int]] = []
        for leg in self._legs.values():
            idle_in = self._idle_seconds - (now - leg.touched)
            is_pausing = not leg.is_busy and idle_in < self._idle_seconds / 2
            coming.append((max(idle_in, 0.0) if is_pausing else leg.ends_in(now), leg.charge))
        room, seconds = self._free, 0.0
        for after, charge in sorted(coming):
            if room >= need:
                break
            room, seconds = room + charge, after
        if room < need:
            return MOST_RETRY_SECONDS
        return min(max(seconds, LEAST_RETRY_SECONDS), MOST_RETRY_SECONDS)


def _paged(length: int, promise: int) -> int:
    """Whole pages for so many positions, and one more, within what was promised."""
    pages = -(-length // PAGE_TOKENS) + 1
    return max(min(pages * PAGE_TOKENS, promise), length)
