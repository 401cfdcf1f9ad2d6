from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

import pytest
from swarm_builders import decode_cost, offer, random_cost, random_swarm

from routing.cost import CLIENT, CostModel
from routing.offer import Offer
from routing.route import NoChain, NoRoute
from routing.search import NEAR_TIE, cheapest_chain, fastest_route
from routing.span import Span


def every_chain(
    offers: Sequence[Offer],
    end: int,
    cost: CostModel,
    block: int = 0,
    origin: str = CLIENT,
    target: str = CLIENT,
) -> Iterator[float]:
    """The seconds of every chain whatever its cuts, found without any of the search's ideas."""
    if block == end and origin != target:
        yield cost.transit_seconds(origin, target)
    for each in offers:
        if block in each.span and each.peer != origin:
            for stop in range(block + 1, min(each.span.stop, end) + 1):
                hop = cost.hop_seconds(origin, each, Span(block, stop))
                for rest in every_chain(offers, end, cost, stop, each.peer, target):
                    yield hop + rest


def way(offers: Sequence[Offer], blocks: int, cost: CostModel) -> list[tuple[str, str]]:
    return [(hop.peer, str(hop.span)) for hop in fastest_route(offers, blocks, cost).hops]


def small_swarm(seed: int) -> tuple[list[Offer], int, CostModel]:
    random = Random(seed)
    blocks = random.randint(1, 6)
    offers = random_swarm(random, blocks=blocks, peers=random.randint(2, 6))
    if random.random() < 0.6:  # most swarms are whole
        offers[0] = offer("p0", f"0:{blocks}", decode=random.uniform(0.001, 0.2))
    return offers, blocks, random_cost(random, offers, blocks=blocks)


def test_no_chain_of_all_chains_is_cheaper_over_thousands_of_swarms() -> None:
    whole = 0
    for seed in range(3000):
        offers, blocks, cost = small_swarm(seed)
        needed = seed % 2 * 100
        usable = [each for each in offers if each.is_online and each.free_tokens >= needed]
        cheapest = min(every_chain(usable, blocks, cost), default=None)
        if cheapest is None:
            with pytest.raises(NoRoute):
                fastest_route(offers, blocks, cost, needed_tokens=needed)
            continue
        whole += 1
        route = fastest_route(offers, blocks, cost, needed_tokens=needed)
        assert route.blocks == blocks
        assert route.seconds == pytest.approx(cheapest), seed
        assert all(before.peer != after.peer for before, after in pairwise(route.hops))
    assert whole > 1500


def test_no_chain_for_a_part_is_cheaper_whatever_is_before_and_after_it() -> None:
    found = 0
    for seed in range(1500):
        offers, blocks, cost = small_swarm(seed)
        random = Random(seed)
        names = [CLIENT, "elsewhere", *(each.peer for each in offers)]
        origin, target = random.choice(names), random.choice(names)
        start = random.randrange(blocks)
        part = Span(start, random.randint(start + 1, blocks))
        ends = (part.start, origin, target)
        cheapest = min(every_chain(offers, part.stop, cost, *ends), default=None)
        if cheapest is None:
            with pytest.raises(NoChain):
                cheapest_chain(offers, part, cost, origin=origin, target=target)
            continue
        found += 1
        chain = cheapest_chain(offers, part, cost, origin=origin, target=target)
        assert chain.seconds == pytest.approx(cheapest), seed
        spans = [hop.span for hop in chain.hops]
        assert (spans[0].start, spans[-1].stop) == (part.start, part.stop)
        peers = [origin, *(hop.peer for hop in chain.hops), target]
        assert all(before != after for before, after in pairwise(peers))
    assert 700 < found < 1500


def test_a_reluctant_peer_gives_way_to_one_that_is_nearly_as_cheap() -> None:
    offers = [offer("a", "0:8", decode=0.01), offer("b", "0:8", decode=0.0102)]
    part, cost = Span(0, 8), decode_cost(8)
    for seed in (None, 0, 1, 2):
        equal = [offers[0], offer("b", "0:8", decode=0.01)]
        chain = cheapest_chain(equal, part, cost, seed=seed, reluctant={"a"})
        assert chain.hops[0].peer == "b"
    assert cheapest_chain(offers, part, cost, reluctant={"a"}).hops[0].peer == "b"
    offers[1] = offer("b", "0:8", decode=0.012)
    assert cheapest_chain(offers, part, cost, reluctant={"a"}).hops[0].peer == "a"


def test_no_chain_says_between_whom() -> None:
    with pytest.raises(NoChain, match="runs 2:4 between a and the client"):
        cheapest_chain([offer("a", "0:4")], Span(2, 4), decode_cost(4), origin="a")


def test_a_seeded_route_costs_at_most_a_near_tie_more_and_says_its_true_seconds() -> None:
    for seed in range(500):
        offers, blocks, cost = small_swarm(seed)
        try:
            cheapest = fastest_route(offers, blocks, cost).seconds
        except NoRoute:
            continue
        for draw in range(5):
            route = fastest_route(offers, blocks, cost, seed=draw)
            by_peer = {each.peer: each for each in offers}
            true, origin = 0.0, CLIENT
            for hop in route.hops:
                true += cost.hop_seconds(origin, by_peer[hop.peer], hop.span)
                origin = hop.peer
            assert route.seconds == pytest.approx(true + cost.way_back_seconds(origin))
            assert cheapest * 0.999999 <= route.seconds <= cheapest * (1 + NEAR_TIE) * 1.000001


def test_the_order_of_the_offers_does_not_matter() -> None:
    random = Random(3)
    equal = [offer(f"p{index}", "0:4" if index % 2 else "4:8") for index in range(8)]
    for seed in (None, 0, 1, 2):
        expected = fastest_route(equal, 8, decode_cost(8), seed=seed)
        for _ in range(10):
            random.shuffle(equal)
            assert fastest_route(equal, 8, decode_cost(8), seed=seed) == expected


def test_clients_with_different_seeds_share_near_equal_servers_and_no_slow_one() -> None:
    servers = [offer(f"p{index}", "0:8", decode=0.01 + 0.00001 * index) for index in range(10)]
    servers.append(offer("slow", "0:8", decode=0.012))
    cost = decode_cost(8)
    chosen = [fastest_route(servers, 8, cost, seed=seed).hops[0].peer for seed in range(400)]
    counts = [chosen.count(f"p{index}") for index in range(10)]
    assert min(counts) >= 10  # 40 each, were they equal and the draws even
    assert "slow" not in chosen


def test_without_a_seed_exact_ties_go_to_the_smaller_name() -> None:
    assert way([offer("b", "0:4"), offer("a", "0:4")], 4, decode_cost(4)) == [("a", "0:4")]


def test_two_short_hops_beat_one_long_link() -> None:
    offers = [offer("far", "0:8"), offer("near", "0:4"), offer("next", "4:8")]
    cost = decode_cost(8, {(CLIENT, "far"): 0.9})
    assert way(offers, 8, cost) == [("near", "0:4"), ("next", "4:8")]


def test_the_way_back_to_the_client_counts() -> None:
    offers = [offer("first", "0:4"), offer("afar", "4:8"), offer("near", "4:8")]
    cost = decode_cost(8, {("afar", CLIENT): 0.5, ("first", "near"): 0.03})
    assert way(offers, 8, cost) == [("first", "0:4"), ("near", "4:8")]


def test_a_slow_server_is_left_where_a_faster_one_starts() -> None:
    offers = [offer("slow", "0:8", decode=0.1), offer("fast", "3:8", decode=0.001)]
    assert way(offers, 8, decode_cost(8)) == [("slow", "0:3"), ("fast", "3:8")]


def test_a_fast_server_is_kept_to_its_own_end() -> None:
    offers = [offer("fast", "0:5", decode=0.001), offer("slow", "0:8", decode=0.1)]
    assert way(offers, 8, decode_cost(8)) == [("fast", "0:5"), ("slow", "5:8")]


def test_a_server_is_not_left_for_a_gain_smaller_than_link_and_penalty() -> None:
    offers = [offer("steady", "0:8", decode=0.010), offer("faster", "4:8", decode=0.009)]
    assert way(offers, 8, decode_cost(8)) == [("steady", "0:8")]


def test_only_the_head_is_left_to_a_server_whose_head_is_faster() -> None:
    # The cut at 7 is nobody's start and nobody's end: head times differ, so blocks are not all.
    offers = [offer("a", "0:8", decode=0.001, head=9.0), offer("b", "0:8", decode=0.5)]
    assert way(offers, 8, decode_cost(8)) == [("a", "0:7"), ("b", "7:8")]


def test_a_detour_over_a_slow_server_near_both_runs_one_block_there() -> None:
    # Nor is this one: a measured detour that beats the direct link is worth one slow block.
    offers = [offer("relay", "0:8", decode=0.1), offer("fast", "0:8", decode=0.001)]
    cost = decode_cost(8, {(CLIENT, "relay"): 0.01, (CLIENT, "fast"): 0.9})
    assert way(offers, 8, cost)[:1] == [("relay", "0:1")]


def test_a_peer_may_come_twice_around_a_faster_middle() -> None:
    offers = [offer("wide", "0:9", decode=0.1), offer("middle", "3:6", decode=0.001)]
    assert way(offers, 9, decode_cost(9)) == [("wide", "0:3"), ("middle", "3:6"), ("wide", "6:9")]


def test_offers_that_cannot_serve_are_left_out() -> None:
    offers = [
        offer("good", "0:4", decode=0.1, free_tokens=10),
        offer("offline", "0:4", is_online=False),
        offer("joining", "0:4", is_online=False, is_joining=True),
        offer("full", "0:4", free_tokens=9),
        offer("suspect", "0:4"),
        offer("lies", "0:5"),
    ]
    route = fastest_route(offers, 4, decode_cost(4), needed_tokens=10, avoid={"suspect"})
    assert [hop.peer for hop in route.hops] == ["good"]


def test_no_route_tells_nobody_from_full_from_avoided() -> None:
    offers = [
        offer("a", "0:2"),
        offer("full", "2:4", free_tokens=5),
        offer("suspect", "2:3"),
        offer("full suspect", "4:5", free_tokens=5),
        offer("suspect too", "4:6"),
        offer("offline", "6:8", is_online=False),
    ]
    avoid = frozenset({"suspect", "suspect too", "full suspect"})
    with pytest.raises(NoRoute, match="blocks 6:8 are served by nobody") as caught:
        fastest_route(offers, 8, decode_cost(8), needed_tokens=100, avoid=avoid)
    assert caught.value.uncovered == (Span(6, 8),)
    assert caught.value.full == (Span(2, 4),)
    assert caught.value.avoided == (Span(4, 6),)


def test_a_cost_for_a_model_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the cost is of 8 blocks, the model has 4"):
        fastest_route([offer("a", "0:4")], 4, decode_cost(8))
