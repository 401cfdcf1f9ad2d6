"""What a client gets to see: no route is lost, the best of each block, others for each."""

from random import Random

import pytest
from swarm_builders import offer, random_swarm

from routing.offer import Offer
from routing.span import Span
from routing.view import DRAWN, FAST, MOST_WARMED, ROOMY, best_offers, spares

BLOCKS = 12


def most_room(offers: list[Offer] | tuple[Offer, ...]) -> list[int]:
    """The most tokens that an online server of each block has free; -1 where there is none."""
    return [
        max((o.free_tokens for o in offers if o.is_online and block in o.span), default=-1)
        for block in range(BLOCKS)
    ]


def names(offers: tuple[Offer, ...]) -> set[str]:
    return {each.peer for each in offers}


@pytest.mark.parametrize("seed", range(40))
def test_every_block_is_held_with_as_much_room_as_anyone_has(seed: int) -> None:
    offers = random_swarm(Random(seed), blocks=BLOCKS, peers=3 + 5 * seed)
    assert most_room(best_offers(offers, BLOCKS, "me")) == most_room(offers)


@pytest.mark.parametrize("seed", range(40))
def test_the_roomiest_of_each_block_come_before_all_others(seed: int) -> None:
    offers = random_swarm(Random(seed), blocks=BLOCKS, peers=3 + 5 * seed)
    wanted = most_room(offers)
    seen: list[Offer] = []
    for each in best_offers(offers, BLOCKS, "me"):
        if most_room(seen) == wanted:
            break
        assert any(each.free_tokens == wanted[block] for block in each.span.blocks)
        seen.append(each)
    assert most_room(seen) == wanted


@pytest.mark.parametrize("seed", range(10))
def test_the_answer_does_not_depend_on_the_order_of_the_offers(seed: int) -> None:
    random = Random(seed)
    offers = random_swarm(random, blocks=BLOCKS, peers=150)
    chosen = best_offers(offers, BLOCKS, "me")
    random.shuffle(offers)
    assert best_offers(offers, BLOCKS, "me") == chosen


def test_of_each_block_the_fastest_and_the_roomiest_are_chosen() -> None:
    offers = [
        offer(f"{span} {n}", span, decode=0.001 * (n + 1), free_tokens=1000 + n)
        for span in ("0:4", "4:12", "2:6")
        for n in range(20)
    ]
    for seed in range(10):
        chosen = names(best_offers(offers, BLOCKS, str(seed)))
        for span in ("0:4", "4:12"):
            assert {f"{span} {n}" for n in range(FAST)} <= chosen
            assert {f"{span} {n}" for n in range(20 - ROOMY, 20)} <= chosen


def test_a_swarm_of_thousands_shows_no_more_than_its_blocks_call_for() -> None:
    random = Random(1)
    offers = [
        offer(f"p{n}", str(Span(start, start + 8)), decode=random.uniform(0.001, 0.1))
        for n in range(3000)
        for start in [random.randrange(72)]
    ]
    chosen = best_offers(offers, 80, "me")
    assert len(chosen) <= (FAST + ROOMY + DRAWN) * 80 / 2
    assert most_room(chosen) == most_room(offers)


def test_a_long_span_goes_before_a_short_one_that_computes_as_fast() -> None:
    short = [offer(f"short {n}", "0:1") for n in range(30)]
    long = [offer(f"long {n}", "0:12") for n in range(30)]
    for seed in range(10):
        chosen = names(best_offers([*short, *long], BLOCKS, str(seed)))
        assert len(chosen & {each.peer for each in short}) <= DRAWN


def test_a_long_queue_and_a_slow_head_count() -> None:
    plain = [offer(f"plain {n}", "8:12", decode=0.02) for n in range(FAST)]
    bad = [offer(f"waits {n}", "8:12", decode=0.01, wait=1.0, free_tokens=999) for n in range(9)]
    bad += [offer(f"heads {n}", "8:12", decode=0.01, head=1.0, free_tokens=999) for n in range(9)]
    assert names(best_offers([*bad, *plain], BLOCKS, "me")) >= {each.peer for each in plain}


def test_full_servers_are_shown_only_where_others_are_wanting() -> None:
    roomy = [offer(f"roomy {n}", "0:6", decode=0.05) for n in range(9)]
    full = [offer(f"full {n}", "0:12", decode=0.001, free_tokens=0) for n in range(9)]
    shown = names(best_offers([*roomy, *full], BLOCKS, "me"))
    assert 0 < len(shown & {each.peer for each in full}) <= FAST + ROOMY + DRAWN
    only_full = names(best_offers([*roomy, *full[:1]], BLOCKS, "me"))
    assert "full 0" in only_full
    beside = [offer(f"beside {n}", "6:12", decode=0.05) for n in range(9)]
    assert not names(best_offers([*roomy, *beside, *full], BLOCKS, "me")) & names(tuple(full))


def test_who_cannot_serve_is_not_shown() -> None:
    offers = [
        offer("draining", "0:12", is_online=False),
        offer("joining", "0:12", is_online=False, is_joining=True),
        offer("beyond", "0:13"),
        offer("good", "0:12"),
    ]
    assert names(best_offers(offers, BLOCKS, "me")) == {"good"}
    assert best_offers(offers[:3], BLOCKS, "me") == ()
    assert best_offers((), 0, "me") == ()


def test_those_who_answer_draw_different_lots_and_the_same_one_again_and_again() -> None:
    fast = [offer(f"fast {n}", "0:12", decode=0.001, free_tokens=2000) for n in range(FAST)]
    others = [offer(f"other {n}", "0:12", decode=0.05) for n in range(100)]
    drawn = {
        seed: frozenset(names(best_offers([*fast, *others], BLOCKS, str(seed))))
        - {each.peer for each in fast}
        for seed in range(20)
    }
    assert all(len(lot) == DRAWN for lot in drawn.values())
    assert len(set(drawn.values())) > 15
    assert drawn[7] == names(best_offers([*fast, *others], BLOCKS, "7")) - {f.peer for f in fast}


def test_equally_fast_servers_are_not_the_same_for_everyone() -> None:
    equals = [offer(f"p{n}", "0:12") for n in range(100)]
    leaders = {best_offers(equals, BLOCKS, str(seed))[0].peer for seed in range(20)}
    assert len(leaders) > 10


def test_a_client_is_linked_to_spares_of_each_block_the_fastest_first() -> None:
    swarm = [offer(name, "0:4", decode=seconds) for name, seconds in SPEEDS]
    swarm += [offer("tail", "4:8"), offer("gone", "4:8", is_online=False)]
    assert spares(swarm, {"slow"}, 8) == ["quick", "tail", "usual"]
    assert spares(swarm, {"slow", "quick", "usual", "tail"}, 8) == []


def test_no_more_than_a_few_are_dialled_at_a_time() -> None:
    swarm = [offer(f"p{block}", f"{block}:{block + 1}") for block in range(40)]
    assert len(spares(swarm, set(), 40)) == MOST_WARMED


SPEEDS = (("slow", 0.09), ("quick", 0.01), ("usual", 0.02), ("fourth", 0.03))
