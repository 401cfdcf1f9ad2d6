from random import Random

import pytest
from swarm_builders import offer, random_swarm

from routing.coverage import coverage, uncovered
from routing.span import Span

MIXED = [
    offer("a", "0:4", decode=0.05),  # 5 tokens/s
    offer("b", "2:6", decode=0.025),  # 10
    offer("c", "5:8", decode=0.1, head=0.2),  # 2
    offer("joins", "4:8", decode=0.0625, is_online=False, is_joining=True),  # 4
    offer("drains", "0:8", decode=0.001, is_online=False),
    offer("lies", "6:9", decode=0.001),
]


def test_a_blocks_coverage_is_the_sum_of_its_online_servers() -> None:
    assert coverage(MIXED, 8) == pytest.approx((5, 5, 15, 15, 10, 12, 2, 2))


def test_joining_servers_count_where_asked_for_and_draining_ones_never() -> None:
    assert coverage(MIXED, 8, with_joining=True) == pytest.approx((5, 5, 15, 15, 14, 16, 6, 6))


def test_an_empty_swarm_covers_nothing() -> None:
    assert coverage([], 3) == (0.0, 0.0, 0.0)
    assert uncovered([], 3) == (Span(0, 3),)


def test_gaps_are_named_as_the_longest_spans() -> None:
    offers = [offer("a", "2:4"), offer("b", "5:6"), offer("lies", "6:99")]
    assert uncovered(offers, 8) == (Span(0, 2), Span(4, 5), Span(6, 8))


def test_the_order_of_offers_changes_nothing_and_gaps_are_where_coverage_is_zero() -> None:
    random = Random(1)
    for _ in range(200):
        offers = random_swarm(random, blocks=8, peers=6)
        served = coverage(offers, 8)
        gaps = [block for span in uncovered(offers, 8) for block in span.blocks]
        assert gaps == [block for block, rate in enumerate(served) if rate == 0]
        random.shuffle(offers)
        assert coverage(offers, 8) == served
