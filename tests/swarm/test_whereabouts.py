"""Round trips are remembered, and a few of them tell how far the others are."""

from random import Random

import pytest

from routing.coordinates import Coordinate, distance, update
from routing.cost import CLIENT
from swarm.record import PeerRecord, place_of
from swarm.whereabouts import Whereabouts

PLACES = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.08), (0.1, 0.08), (0.05, 0.04), (0.02, 0.07)]
CLIENTS_PLACE = (0.09, 0.01)


def apart(one: tuple[float, float], other: tuple[float, float]) -> float:
    return 0.002 + ((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5


def settled() -> dict[str, Coordinate]:
    """Servers that have measured each other for a while."""
    rng = Random(1)
    found = {str(number): Coordinate() for number in range(len(PLACES))}
    for turn in range(4000):
        one, other = rng.sample(sorted(found), 2)
        rtt = apart(PLACES[int(one)], PLACES[int(other)])
        found[one] = update(found[one], found[other], rtt, seed=turn)
    return found


def test_a_slow_answer_among_three_does_not_count() -> None:
    here = Whereabouts(seed=0)
    for seconds in (0.02, 3.0, 0.021):
        here.note("a", seconds, None)
    assert here.round_trips == {"a": 0.021}


def test_links_to_peers_that_are_gone_are_forgotten() -> None:
    here = Whereabouts(seed=0)
    here.note("a", 0.1, None)
    here.note("b", 0.1, None)
    here.keep_only({"b"})
    assert set(here.round_trips) == {"b"}


def test_a_client_that_measured_a_few_knows_how_far_the_others_are() -> None:
    servers = settled()
    here = Whereabouts(seed=0)
    for peer in ("0", "1", "2", "3"):
        here.note(peer, apart(CLIENTS_PLACE, PLACES[int(peer)]), servers[peer], times=8)
    links = here.links(servers, default_seconds=1.0)
    for peer in ("4", "5"):
        true = apart(CLIENTS_PLACE, PLACES[int(peer)]) / 2
        assert links.one_way_seconds(CLIENT, peer) == pytest.approx(true, rel=0.35)
    between = distance(servers["4"], servers["5"]) / 2
    assert links.one_way_seconds("4", "5") == pytest.approx(between)


def test_what_was_measured_beats_what_is_predicted() -> None:
    servers = settled()
    here = Whereabouts(seed=0)
    here.note("4", 0.5, servers["4"], times=8)
    assert here.links(servers, 1.0).one_way_seconds(CLIENT, "4") == 0.25


def record(place: tuple[float, ...]) -> PeerRecord:
    return PeerRecord(
        peer="p",
        sequence=1,
        fingerprint="f",
        blocks=2,
        span="0:2",
        decode_seconds_per_block=0.1,
        prefill_seconds_per_block_token=0.1,
        place=place,
    )


def test_a_record_carries_the_place() -> None:
    place = settled()["3"]
    told = record(place_of(place)).coordinate
    assert told is not None
    assert told.vector == pytest.approx(place.vector, abs=1e-5)
    assert record(()).coordinate is None


@pytest.mark.parametrize("place", [(0.1,), (0.0,) * 5, (float("nan"),) * 6, (99.0,) * 6])
def test_a_record_with_an_impossible_place_cannot_be(place: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r".*"):
        record(place)
