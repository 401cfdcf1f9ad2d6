"""How far others are: round trips measured here, and the own place among all peers.

1. The newest measurements of a peer count; a slow answer among three does not.
2. Whatever others claim of their places, ours stays possible (`routing.coordinates`).
"""

from collections import deque
from collections.abc import Collection, Mapping

from routing.coordinates import (
    LATENCY_SAMPLES,
    MOST_RTT_SECONDS,
    Coordinate,
    PredictedLinks,
    steady_rtt,
    update,
)
from routing.cost import CLIENT, MeasuredLinks


class Whereabouts:
    """What one peer measured. `seed` chooses directions where places are equal."""

    def __init__(self, seed: int) -> None:
        self.coordinate = Coordinate()
        self._seed = seed
        self._samples: dict[str, deque[float]] = {}

    @property
    def round_trips(self) -> Mapping[str, float]:
        """The round trip to each peer measured, in seconds."""
        return {peer: steady_rtt(tuple(samples)) for peer, samples in self._samples.items()}

    def note(self, peer: str, seconds: float, theirs: Coordinate | None, times: int = 1) -> None:
        """A round trip was measured to a peer that says it is at `theirs`.

        `times`: how often it pulls our own place; a newcomer lets each pull more than once.
        """
        samples = self._samples.setdefault(peer, deque(maxlen=LATENCY_SAMPLES))
        samples.append(min(seconds, MOST_RTT_SECONDS))
        if theirs is None:
            return
        for _ in range(times):
            self._seed += 1
            steady = steady_rtt(tuple(samples))
            self.coordinate = update(self.coordinate, theirs, steady, seed=self._seed)

    def keep_only(self, peers: Collection[str]) -> None:
        """Forget the round trips to all other peers."""
        self._samples = {peer: kept for peer, kept in self._samples.items() if peer in peers}

    def links(
        self, coordinates: Mapping[str, Coordinate], default_seconds: float
    ) -> PredictedLinks:
        """Price every link as seen from here: measured, else predicted, else the default."""
        measured = {(CLIENT, peer): seconds for peer, seconds in self.round_trips.items()}
        places = {**coordinates, CLIENT: self.coordinate}
        return PredictedLinks(MeasuredLinks(measured, default_seconds), places)
