from math import inf, nan

import pytest
from swarm_builders import offer

from routing.cost import CLIENT, CostModel, MeasuredLinks, Work
from routing.span import Span

SERVER = offer("p", "2:8", decode=0.01, prefill=0.002, head=0.5, wait=0.03)
LINKS = MeasuredLinks({(CLIENT, "p"): 0.2, ("q", "p"): 0.1}, 1.0, bandwidth=1000.0)


def work(*, tokens: int = 1, is_prefill: bool = False) -> Work:
    return Work(
        blocks=8,
        tokens=tokens,
        bytes_per_token=50,
        is_prefill=is_prefill,
        client_bytes_per_token=10,
        answer_bytes=20,
    )


@pytest.mark.parametrize(
    ("step", "origin", "part", "seconds"),
    [
        # one way + bytes + blocks + wait + penalty
        (work(), "q", "2:5", 0.05 + 0.05 + 3 * 0.01 + 0.03 + 0.001),
        (work(), "q", "2:8", 0.05 + 0.05 + 6 * 0.01 + 0.03 + 0.001 + 0.5),  # + head
        (work(), CLIENT, "2:5", 0.1 + 0.01 + 3 * 0.01 + 0.03 + 0.001),  # ids, not hidden states
        (work(tokens=4), "q", "2:5", 0.05 + 0.2 + 3 * 0.01 + 0.03 + 0.001),  # a draft to verify
        (work(tokens=100, is_prefill=True), "q", "2:5", 0.05 + 5 + 3 * 0.2 + 0.03 + 0.001),
        (work(tokens=2, is_prefill=True), "q", "2:5", 0.05 + 0.1 + 3 * 0.01 + 0.03 + 0.001),
        (work(), "stranger", "4:5", 0.5 + 0.05 + 0.01 + 0.03 + 0.001),  # unmeasured: the default
    ],
)
def test_a_hop_costs_link_bytes_blocks_head_wait_and_penalty(
    step: Work, origin: str, part: str, seconds: float
) -> None:
    cost = CostModel(LINKS, step, penalty_seconds=0.001)
    assert cost.hop_seconds(origin, SERVER, Span.parse(part)) == pytest.approx(seconds)


def test_the_way_back_carries_the_answer() -> None:
    assert CostModel(LINKS, work()).way_back_seconds("p") == pytest.approx(0.1 + 0.02)


def test_a_part_that_is_not_held_has_no_price() -> None:
    with pytest.raises(ValueError, match="p holds 2:8, not 1:4"):
        CostModel(LINKS, work()).hop_seconds("q", SERVER, Span(1, 4))


def test_a_measured_round_trip_beats_the_default_both_ways() -> None:
    links = MeasuredLinks({("a", "b"): 0.4, ("c", "a"): 0.1, ("a", "c"): 0.3}, 2.0)
    assert links.one_way_seconds("a", "b") == links.one_way_seconds("b", "a") == 0.2
    assert links.one_way_seconds("a", "c") == links.one_way_seconds("c", "a") == 0.05
    assert links.one_way_seconds("b", "c") == 1.0
    assert links.one_way_seconds("b", "b") == 0.0


@pytest.mark.parametrize("rtt", [-0.1, inf, nan])
def test_an_impossible_round_trip_or_penalty_is_refused(rtt: float) -> None:
    with pytest.raises(ValueError, match="a round trip must take a finite time"):
        MeasuredLinks({("a", "b"): rtt}, 1.0)
    with pytest.raises(ValueError, match="a round trip must take a finite time"):
        MeasuredLinks({}, rtt)
    with pytest.raises(ValueError, match="the penalty must take a finite time"):
        CostModel(LINKS, work(), penalty_seconds=rtt)


def test_links_without_bandwidth_are_refused() -> None:
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        MeasuredLinks({}, 1.0, bandwidth=0.0)


def test_a_step_without_tokens_or_with_negative_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="a step needs blocks and tokens"):
        work(tokens=0)
    with pytest.raises(ValueError, match="negative bytes"):
        Work(blocks=8, tokens=1, bytes_per_token=-1, is_prefill=False)
