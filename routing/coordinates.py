"""Where peers are, so that links nobody measured have a price: Vivaldi with heights.

After Dabek, Cox, Kaashoek, Morris: Vivaldi, a decentralized network coordinate system (SIGCOMM
2004), sections 2.5 and 5.4, with the constants, the latency filter and the gravity of HashiCorp's
Serf (its package `coordinate`), which follows Ledlie, Gardner, Seltzer: Network coordinates in the
wild (NSDI 2007). Where the two differ, on how a push is shared with the height, this follows the
paper: there a push of f seconds changes the predicted round trip by exactly f.

Invariants:
1. a coordinate is finite and bounded; an impossible one cannot be built, so a peer that lies about
   its own can only send a possible one;
2. whatever the other claims, one measurement moves a coordinate by at most PUSH_GAIN of the round
   trip measured and at most MOST_PUSH_SECONDS, its gravity aside;
3. a measured round trip beats a predicted one, and that the default;
4. `update` is a function of its arguments: all randomness comes from the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import dist, hypot, isfinite
from random import Random
from statistics import median_low

from routing.cost import MeasuredLinks

DIMENSIONS = 4  # a few are enough for the Internet (paper, section 5.3), a record stays small
MOST_RTT_SECONDS = 10.0  # Serf refuses what is longer; also the bound of each number here
MOST_ERROR = 1.5  # relative; of a peer that knows nothing yet (Serf: VivaldiErrorMax)
LEAST_HEIGHT_SECONDS = 10e-6  # Serf: HeightMin
ERROR_GAIN = 0.25  # most that one measurement may change the error (Serf: VivaldiCE)
PUSH_GAIN = 0.25  # most of its surprise that one measurement may correct (Serf: VivaldiCC)
GRAVITY_SECONDS = 150.0  # pull to the origin against drift, (distance / this)^2 (Serf: GravityRho)
LATENCY_SAMPLES = 3  # Serf: LatencyFilterSize

# Ours, against liars: nobody is believed to be surer than this, no measurement pushes further, and
# who claims to be far but answers soon pulls no more than a far peer could push. With one liar in
# ten the median error is half of what it is without. Honest peers lose next to nothing: an error
# below 5 % is rare, and a quarter of a round trip is less.
LEAST_CLAIMED_ERROR = 0.05
MOST_PUSH_SECONDS = 0.05

# Who is not surer than this is taken as unknown: a newcomer sits at the origin, near everybody.
MOST_USEFUL_ERROR = 0.75

_SAME_PLACE_SECONDS = 1e-6  # closer than this there is no direction (Serf: zeroThreshold)


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A place such that distances are round trips in seconds, and how sure it is.

    `height` is the way from the peer to the core of the net, on top of the distance in the core.
    """

    vector: tuple[float, ...] = (0.0,) * DIMENSIONS
    height: float = LEAST_HEIGHT_SECONDS
    error: float = MOST_ERROR  # expected relative error of predictions

    def __post_init__(self) -> None:
        """Raise ValueError for a coordinate that no honest peer has."""
        if len(self.vector) != DIMENSIONS:
            raise ValueError(f"a coordinate has {DIMENSIONS} axes, not {len(self.vector)}")
        for name, figure, least, most in (
            *(("an axis", axis, -MOST_RTT_SECONDS, MOST_RTT_SECONDS) for axis in self.vector),
            ("a height", self.height, LEAST_HEIGHT_SECONDS, MOST_RTT_SECONDS),
            ("an error", self.error, 0.0, MOST_ERROR),
        ):
            if not (isfinite(figure) and least <= figure <= most):
                raise ValueError(f"{name} lies between {least} and {most}, not at {figure}")


def distance(one: Coordinate, other: Coordinate) -> float:
    """Return the round trip in seconds that two coordinates predict."""
    return dist(one.vector, other.vector) + one.height + other.height


def update(own: Coordinate, other: Coordinate, rtt: float, *, seed: int) -> Coordinate:
    """Return the own coordinate after a round trip of `rtt` seconds to a peer at `other`.

    The move is a share of the surprise, larger the less sure we are and the surer the other is.
    `seed` chooses a direction where both are at one place. Give it the median of the peer's last
    round trips (`steady_rtt`). Raises ValueError for a round trip that is negative or too long.
    """
    if not 0 <= rtt <= MOST_RTT_SECONDS:
        raise ValueError(f"a round trip takes 0 to {MOST_RTT_SECONDS} seconds, not {rtt}")
    rtt = max(rtt, _SAME_PLACE_SECONDS)
    surprise = rtt - distance(own, other)
    weight = own.error / (own.error + max(other.error, LEAST_CLAIMED_ERROR))
    share = ERROR_GAIN * weight
    error = min(MOST_ERROR, share * abs(surprise) / rtt + (1 - share) * own.error)
    push = PUSH_GAIN * weight * max(-rtt, surprise)
    push = max(-MOST_PUSH_SECONDS, min(MOST_PUSH_SECONDS, push))
    moved = _pushed(own, other, push, seed)
    gravity = (distance(moved, Coordinate()) / GRAVITY_SECONDS) ** 2
    moved = _pushed(moved, Coordinate(), -gravity, seed)
    return Coordinate(moved.vector, moved.height, error)


def _pushed(own: Coordinate, other: Coordinate, push: float, seed: int) -> Coordinate:
    """Return the coordinate moved `push` seconds away from the other, or nearer if negative.

    The push is shared between vector and height as the distance is: the paper's unit vector.
    """
    apart = dist(own.vector, other.vector)
    if apart > _SAME_PLACE_SECONDS:
        whole = distance(own, other)
        away = [
            (mine - theirs) / whole for mine, theirs in zip(own.vector, other.vector, strict=True)
        ]
        rise = (own.height + other.height) / whole
    else:
        random = Random(seed)
        drawn = [random.gauss(0, 1) for _ in own.vector]
        length = hypot(*drawn) or 1.0
        away, rise = [axis / length for axis in drawn], 0.0
    return Coordinate(
        tuple(
            _within(axis + push * step, -MOST_RTT_SECONDS)
            for axis, step in zip(own.vector, away, strict=True)
        ),
        _within(own.height + push * rise, LEAST_HEIGHT_SECONDS),
        own.error,
    )


def _within(seconds: float, least: float) -> float:
    return max(least, min(MOST_RTT_SECONDS, seconds))


def steady_rtt(samples: Sequence[float]) -> float:
    """Return the median of the last LATENCY_SAMPLES round trips, of two the shorter.

    One slow answer among three says more of the moment than of the way. Raises ValueError for none.
    """
    if not samples:
        raise ValueError("no round trip was measured")
    return median_low(samples[-LATENCY_SAMPLES:])


@dataclass(frozen=True, slots=True)
class PredictedLinks:
    """Links by measurement; where there is none, by the coordinates of both ends; else the default.

    The client's own coordinate goes under the name CLIENT. Coordinates that are not sure enough
    count as unknown.
    """

    measured: MeasuredLinks
    coordinates: Mapping[str, Coordinate]

    def one_way_seconds(self, origin: str, peer: str) -> float:
        """Return half the round trip, measured or predicted; 0 from a peer to itself."""
        if origin != peer and not self.measured.is_measured(origin, peer):
            one, other = self.coordinates.get(origin), self.coordinates.get(peer)
            if one and other and max(one.error, other.error) <= MOST_USEFUL_ERROR:
                return distance(one, other) / 2
        return self.measured.one_way_seconds(origin, peer)

    def bytes_per_second(self, origin: str, peer: str) -> float:
        """Return the bandwidth that the measured links assume."""
        return self.measured.bytes_per_second(origin, peer)
