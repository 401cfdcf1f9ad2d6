"""How soon sessions come back after an answer, and whether a joint pass should wait for them.

Sessions near by come back within milliseconds, but one after the other. If a pass begins with the
first to come, the others fall into a pass of their own, and so they go on: two passes for what one
could hold. It is worth a moment's wait to be in step, if the moment is short beside a pass.
`scripts/queue_bench.py window` tells what is won and lost. Pure: the time is told.

1. No wait is longer than `MOST_SHARE` of a pass, nor than `MOST_SECONDS`.
2. Only who usually comes back within that is waited for, and not much longer than usual: who is far
   away, or has gone, holds nobody up.
"""

from collections.abc import Hashable
from dataclasses import dataclass

MOST_SHARE = 0.25
# Of slow passes a quarter is long, and the more legs are in one the less another pass costs more.
MOST_SECONDS = 0.010
# So many times its usual, and a little more, after which a session is not waited for.
_SLACK = 2.0
_SLACK_SECONDS = 0.001
_WEIGHT = 0.25  # of the last return in what is usual


@dataclass(slots=True)
class _Leg:
    """`out`: when its last answer was given, None as long as a step of it waits."""

    usual: float | None = None
    out: float | None = None
    steps: int = 0  # that wait


class Returns:
    """The legs that are between an answer and their next step. Not safe between threads."""

    def __init__(self) -> None:
        self._legs: dict[Hashable, _Leg] = {}

    def __len__(self) -> int:
        return len(self._legs)

    def came(self, leg: Hashable, now: float) -> None:
        """A step of this leg has come."""
        known = self._legs.setdefault(leg, _Leg())
        known.steps += 1
        if known.out is not None:
            seconds, known.out = now - known.out, None
            usual = seconds if known.usual is None else known.usual
            known.usual = usual + _WEIGHT * (seconds - usual)

    def went(self, leg: Hashable, now: float) -> None:
        """A step of this leg was answered."""
        known = self._legs.get(leg)
        if known is not None:
            known.steps -= 1
            known.out = now if known.steps <= 0 else None

    def forget(self, leg: Hashable) -> None:
        """The leg is no more; unknown ones are none's fault."""
        self._legs.pop(leg, None)

    def worth_waiting(self, now: float, pass_seconds: float) -> float:
        """Seconds from now until those are here who are worth the wait, 0 if nobody is."""
        most = min(MOST_SHARE * pass_seconds, MOST_SECONDS)
        waits = (
            leg.out + _SLACK * leg.usual + _SLACK_SECONDS - now
            for leg in self._legs.values()
            if leg.out is not None and leg.usual is not None and leg.usual <= most
        )
        return max(0.0, min(max(waits, default=0.0), most))
