from collections.abc import Sequence
from math import dist, inf, nan
from random import Random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.coordinates import (
    DIMENSIONS,
    LEAST_HEIGHT_SECONDS,
    MOST_ERROR,
    MOST_PUSH_SECONDS,
    MOST_RTT_SECONDS,
    PUSH_GAIN,
    Coordinate,
    PredictedLinks,
    distance,
    steady_rtt,
    update,
)
from routing.cost import CLIENT, MeasuredLinks

Matrix = list[list[float]]
FAR_LIE = Coordinate((MOST_RTT_SECONDS,) * DIMENSIONS, LEAST_HEIGHT_SECONDS, 0.0)


@st.composite
def coordinates(draw: st.DrawFn) -> Coordinate:
    axis = st.floats(-MOST_RTT_SECONDS, MOST_RTT_SECONDS)
    return Coordinate(
        tuple(draw(axis) for _ in range(DIMENSIONS)),
        draw(st.floats(LEAST_HEIGHT_SECONDS, MOST_RTT_SECONDS)),
        draw(st.floats(0, MOST_ERROR)),
    )


def internet(peers: int, seed: int) -> Matrix:
    """Round trips of peers on a plane 150 x 80 ms wide, with access lines of 0.5 to 30 ms."""
    random = Random(seed)
    places = [(random.uniform(0, 0.15), random.uniform(0, 0.08)) for _ in range(peers)]
    access = [
        random.choice([0.001, 0.003, 0.01, 0.02]) * random.uniform(0.5, 1.5) for _ in range(peers)
    ]
    return [
        [
            dist(places[one], places[other]) + access[one] + access[other] if one != other else 0.0
            for other in range(peers)
        ]
        for one in range(peers)
    ]


def settled(
    matrix: Matrix, rounds: int, *, liars: int = 0, spikes: float = 0.0, samples: int = 1
) -> list[Coordinate]:
    """Each round every peer measures one other, drawn by chance; the first `liars` lie."""
    random = Random(7)
    found = [Coordinate() for _ in matrix]
    for _ in range(rounds):
        for own in range(len(matrix)):
            other = random.choice([peer for peer in range(len(matrix)) if peer != own])
            rtts = [
                matrix[own][other] * (5 if random.random() < spikes else 1) for _ in range(samples)
            ]
            claimed = FAR_LIE if other < liars else found[other]
            seed = random.getrandbits(32)
            found[own] = update(found[own], claimed, steady_rtt(rtts), seed=seed)
    return found


def median_error(matrix: Matrix, found: Sequence[Coordinate], *, liars: int = 0) -> float:
    return median(
        abs(distance(found[one], found[other]) / matrix[one][other] - 1)
        for one in range(liars, len(matrix))
        for other in range(liars, one)
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_measurements_predict_half_the_pairs_within_ten_percent(seed: int) -> None:
    matrix = internet(40, seed)
    assert median_error(matrix, settled(matrix, 20)) < 0.35
    assert median_error(matrix, settled(matrix, 100)) < 0.1


def test_a_far_peer_does_not_distort_the_near_ones() -> None:
    matrix = internet(12, 1)
    for peer in range(1, 12):
        matrix[0][peer] = matrix[peer][0] = 0.6  # a satellite: the height takes it
    found = settled(matrix, 300)
    assert distance(found[0], found[5]) == pytest.approx(0.6, rel=0.1)
    assert median_error(matrix, found, liars=1) < 0.1


def test_the_median_of_three_holds_off_spikes_that_single_samples_let_in() -> None:
    matrix = internet(30, 2)
    single = median_error(matrix, settled(matrix, 100, spikes=0.1))
    steady = median_error(matrix, settled(matrix, 100, spikes=0.1, samples=3))
    assert steady < 0.2
    assert steady < single / 1.3


def test_one_liar_in_ten_leaves_half_the_pairs_within_a_quarter() -> None:
    matrix = internet(40, 0)
    assert median_error(matrix, settled(matrix, 100, liars=4), liars=4) < 0.25


@pytest.mark.parametrize(
    ("vector", "height", "error"),
    [
        ((0.0,) * 3, 0.01, 0.5),
        ((0.0, 0.0, 0.0, nan), 0.01, 0.5),
        ((0.0, 0.0, inf, 0.0), 0.01, 0.5),
        ((0.0, 0.0, 10.1, 0.0), 0.01, 0.5),
        ((0.0,) * 4, 0.0, 0.5),
        ((0.0,) * 4, -1.0, 0.5),
        ((0.0,) * 4, nan, 0.5),
        ((0.0,) * 4, 0.01, -0.1),
        ((0.0,) * 4, 0.01, 1.6),
    ],
)
def test_an_impossible_coordinate_cannot_be_built(
    vector: tuple[float, ...], height: float, error: float
) -> None:
    with pytest.raises(ValueError, match=r"lies between|has 4 axes"):
        Coordinate(vector, height, error)


@pytest.mark.parametrize("rtt", [-0.001, 10.1, nan, inf])
def test_an_impossible_round_trip_is_refused(rtt: float) -> None:
    with pytest.raises(ValueError, match="a round trip takes 0 to"):
        update(Coordinate(), Coordinate(), rtt, seed=0)


@given(coordinates(), coordinates(), st.floats(0, MOST_RTT_SECONDS), st.integers(0, 9))
def test_no_claim_moves_a_coordinate_further_than_its_bound(
    own: Coordinate, other: Coordinate, rtt: float, seed: int
) -> None:
    moved = update(own, other, rtt, seed=seed)
    gravity = (3 * MOST_RTT_SECONDS / 150) ** 2
    way = dist(own.vector, moved.vector) + abs(own.height - moved.height)
    most = min(MOST_PUSH_SECONDS, PUSH_GAIN * max(rtt, 1e-6))
    assert way <= 2**0.5 * most + gravity  # vector and height at right angles
    assert moved == update(own, other, rtt, seed=seed)


def test_a_push_changes_the_prediction_by_the_share_of_the_surprise() -> None:
    own = Coordinate((0.03, 0.0, 0.0, 0.0), 0.01, 0.3)
    other = Coordinate((0.0, 0.04, 0.0, 0.0), 0.02, 0.3)
    moved = update(own, other, 0.1, seed=0)
    assert distance(own, other) == pytest.approx(0.08)
    assert distance(moved, other) == pytest.approx(0.08 + 0.25 / 2 * 0.02, abs=1e-5)
    assert moved.height > own.height
    assert moved.error == pytest.approx(0.125 * 0.2 + 0.875 * 0.3)


def test_nobody_is_believed_to_be_surer_than_the_surest() -> None:
    own = Coordinate((0.03, 0.0, 0.0, 0.0), 0.01, 0.3)
    boastful, sure = (Coordinate((0.0,) * 4, 0.02, error) for error in (0.0, 0.05))
    assert update(own, boastful, 0.2, seed=0) == update(own, sure, 0.2, seed=0)


def test_two_newcomers_at_one_place_part_by_the_seed() -> None:
    first, second = (update(Coordinate(), Coordinate(), 0.1, seed=seed) for seed in (0, 1))
    assert first != second
    assert distance(first, Coordinate()) == pytest.approx(0.25 * 0.5 * 0.1, rel=0.01)


@pytest.mark.parametrize(
    ("samples", "rtt"),
    [([0.1], 0.1), ([0.1, 0.9], 0.1), ([0.1, 0.9, 0.2], 0.2), ([0.1, 0.1, 0.9, 0.9], 0.9)],
)
def test_the_steady_round_trip_is_the_median_of_the_last_three(
    samples: list[float], rtt: float
) -> None:
    assert steady_rtt(samples) == rtt


def test_no_samples_have_no_median() -> None:
    with pytest.raises(ValueError, match="no round trip"):
        steady_rtt([])


def test_measured_beats_predicted_beats_the_default() -> None:
    known = {
        CLIENT: Coordinate((0.0,) * 4, 0.01, 0.2),
        "a": Coordinate((0.03, 0.0, 0.0, 0.0), 0.01, 0.2),
        "b": Coordinate((0.0, 0.04, 0.0, 0.0), 0.02, 0.2),
        "newcomer": Coordinate(),
    }
    links = PredictedLinks(MeasuredLinks({(CLIENT, "a"): 0.2}, 1.0, bandwidth=5.0), known)
    assert links.one_way_seconds("a", CLIENT) == 0.1
    assert links.one_way_seconds("a", "b") == pytest.approx(0.04)
    assert links.one_way_seconds(CLIENT, "b") == pytest.approx(0.035)
    assert links.one_way_seconds("a", "newcomer") == 0.5  # sits at the origin, not near everybody
    assert links.one_way_seconds("a", "stranger") == 0.5
    assert links.one_way_seconds("b", "b") == 0.0
    assert links.bytes_per_second("a", "b") == 5.0
