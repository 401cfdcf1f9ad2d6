"""Whom a client avoids, since when, and how long at least. No clock.

1. Being suspected costs a peer our custom, never its place: it serves when nobody else can.
2. A suspicion ends after SUSPICION_SECONDS, when it is the oldest and somebody is needed, or when
   its peer has said something since.
3. Who has no room is no suspect: it is left alone until the time it named, and after that it is a
   peer like any other.
"""

from dataclasses import dataclass

SUSPICION_SECONDS = 60.0
# What a peer said just before it fell silent comes round by gossip within a second, and to the
# client when it next reads a table: every five. Heard of later, it lives.
LATE_NEWS_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class _Suspicion:
    """Since when a peer is avoided, and until when it is not to be asked in any case."""

    since: float
    until: float


class Suspects:
    """The peers avoided, oldest suspicion first, and those without room."""

    def __init__(self) -> None:
        self._suspicions: dict[str, _Suspicion] = {}
        self._full: dict[str, float] = {}  # until when

    def leave_alone(self, peer: str, until: float) -> None:
        """The peer has no room before this time."""
        self._full[peer] = max(until, self._full.get(peer, 0.0))

    def full_at(self, now: float) -> dict[str, float]:
        """Return who has no room now, and until when."""
        self._full = {peer: until for peer, until in self._full.items() if until > now}
        return dict(self._full)

    def add(self, peer: str, now: float, rest_seconds: float) -> None:
        """Avoid the peer from now on, and let it rest in any case."""
        self._suspicions.pop(peer, None)
        self._suspicions[peer] = _Suspicion(now, now + rest_seconds)

    def at(self, now: float) -> tuple[str, ...]:
        """Return who is avoided now, the oldest first."""
        self._suspicions = {
            peer: suspicion
            for peer, suspicion in self._suspicions.items()
            if now - suspicion.since < SUSPICION_SECONDS
        }
        return tuple(self._suspicions)

    def forgive_one(self, now: float) -> bool:
        """Suspect one peer less: the oldest that need not rest. False if there is none."""
        for peer, suspicion in self._suspicions.items():
            if suspicion.until <= now:
                del self._suspicions[peer]
                return True
        return False

    def heard_of(self, peer: str, now: float) -> None:
        """There is news of the peer: it lives, unless the news may be older than the suspicion.

        Its rest is left to it.
        """
        suspicion = self._suspicions.get(peer)
        if suspicion is None:
            return
        if now >= max(suspicion.until, suspicion.since + LATE_NEWS_SECONDS):
            del self._suspicions[peer]
