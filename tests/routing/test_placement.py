from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarm_builders import offer, random_swarm

from routing.coverage import coverage, uncovered
from routing.offer import Offer
from routing.placement import (
    BlockSizes,
    DoesNotFit,
    auto_span,
    blocks_that_fit,
    newcomer_span,
)
from routing.span import Span

SEEDS = st.none() | st.integers(0, 5)


def sizes(
    *block_bytes: int,
    embedding: int = 0,
    head: int = 0,
    is_tied: bool = False,
    cache: int = 0,
    history: int = 0,
    cache_tokens: int = 0,
) -> BlockSizes:
    return BlockSizes(
        block_bytes=block_bytes,
        embedding_bytes=embedding,
        head_bytes=head,
        is_tied=is_tied,
        cache_bytes_per_token=cache,
        history_bytes_per_token=history,
        cache_tokens=cache_tokens,
    )


@st.composite
def any_sizes(draw: st.DrawFn) -> BlockSizes:
    return sizes(
        *draw(st.lists(st.integers(1, 9), min_size=1, max_size=10)),
        embedding=draw(st.integers(0, 20)),
        head=draw(st.integers(0, 20)),
        is_tied=draw(st.booleans()),
        cache=draw(st.integers(0, 2)),
        history=draw(st.integers(0, 2)),
        cache_tokens=draw(st.integers(0, 3)),
    )


@pytest.mark.parametrize(
    ("offers", "count", "span"),
    [
        ([], 3, "0:3"),  # an empty swarm fills from the start
        ([offer("a", "0:3")], 3, "3:6"),  # side by side
        ([offer("a", "0:3"), offer("b", "5:8")], 3, "2:5"),  # a gap shorter than the span
        ([offer("a", "0:5"), offer("b", "6:8")], 1, "5:6"),
        ([offer("a", "0:8", decode=0.1), offer("b", "0:4", decode=0.2)], 4, "4:8"),
        # The weakest block first, not the smallest sum: 4 and 5 are strong beside weak 6 and 7.
        ([offer("a", "0:6", decode=0.02), offer("b", "4:8", decode=0.1)], 3, "5:8"),
        ([offer("a", "0:4"), offer("j", "4:8", is_online=False, is_joining=True)], 4, "0:4"),
        ([offer("a", "0:4"), offer("draining", "4:8", is_online=False)], 4, "4:8"),
        ([], 99, "0:8"),  # never beyond the model
    ],
)
def test_a_newcomer_takes_what_is_served_worst(offers: list[Offer], count: int, span: str) -> None:
    assert newcomer_span(offers, 8, count) == Span.parse(span)


def test_no_other_span_is_served_worse_than_the_newcomers() -> None:
    random = Random(5)
    for trial in range(500):
        blocks = random.randint(1, 9)
        offers = random_swarm(random, blocks=blocks, peers=random.randint(0, 6))
        count = random.randint(1, blocks)
        served = coverage(offers, blocks)
        chosen = newcomer_span(offers, blocks, count, seed=random.choice([None, trial]))
        assert len(chosen) == count
        worst = min(sorted(served[i : i + count]) for i in range(blocks - count + 1))
        assert sorted(served[chosen.start : chosen.stop]) == worst


@given(st.integers(1, 30), st.integers(1, 12), SEEDS)
def test_an_empty_swarm_is_covered_by_the_fewest_newcomers(
    blocks: int, count: int, seed: int | None
) -> None:
    offers: list[Offer] = []
    for index in range(-(-blocks // count)):
        offers.append(offer(f"p{index}", str(newcomer_span(offers, blocks, count, seed=seed))))
    assert uncovered(offers, blocks) == ()


def test_newcomers_with_different_seeds_part() -> None:
    spans = {newcomer_span([], 12, 3, seed=seed) for seed in range(20)}
    assert spans == {Span(0, 3), Span(9, 12)}


@pytest.mark.parametrize(("blocks", "count"), [(8, 0), (0, 1), (8, -1)])
def test_a_newcomer_of_no_blocks_is_refused(blocks: int, count: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        newcomer_span([], blocks, count)


@pytest.mark.parametrize(
    ("model", "start", "free_bytes", "count"),
    [
        (sizes(10, 10, 10, 10), 0, 50, 4),  # 50 less a fifth is exactly four
        (sizes(10, 10, 10, 10), 0, 49, 3),
        (sizes(10, 10, 10, 10, embedding=25), 0, 50, 1),
        (sizes(10, 10, 10, 10, embedding=25), 1, 50, 3),
        (sizes(10, 10, 10, 10, head=11), 1, 50, 2),
        (sizes(10, 10, 10, 10, head=25), 3, 40, 0),
        (sizes(10, 10, 10, 10, embedding=20, head=20), 0, 99, 4 - 1),
        (sizes(10, 10, 10, 10, embedding=20, head=20, is_tied=True), 0, 75, 4),  # one matrix
        (sizes(10, 10, 10, 10, embedding=20, head=20, is_tied=True), 2, 38, 1),  # paid alone
        (sizes(10, 10, 10, 10, cache=1, cache_tokens=5), 0, 50, 2),
        (sizes(10, 10, 10, 10, history=2, cache_tokens=5), 0, 50, 3),
    ],
)
def test_blocks_fit_with_their_ends_cache_and_history(
    model: BlockSizes, start: int, free_bytes: int, count: int
) -> None:
    assert blocks_that_fit(model, free_bytes, start=start) == count


def test_the_whole_model_is_held_if_it_fits() -> None:
    assert auto_span([offer("a", "0:3")], sizes(1, 1, 1, embedding=2, head=2), 9) == Span(0, 3)


@pytest.mark.parametrize(
    ("offers", "span"),
    [
        ([], "0:4"),  # not the longer 1:7, which would leave block 0 to a whole other server
        ([offer("a", "0:4")], "8:10"),  # all of it uncovered, where 3:9 would waste a block
        ([offer("a", "0:4"), offer("b", "8:10")], "2:8"),
        ([offer("a", "0:8")], "8:10"),
        ([offer("a", "4:10")], "0:4"),
        ([offer("a", "0:3"), offer("b", "9:10")], "3:9"),
        ([offer("a", "0:10"), offer("b", "0:4"), offer("c", "8:10")], "2:8"),
    ],
)
def test_auto_takes_what_fits_where_it_is_needed_most(offers: list[Offer], span: str) -> None:
    model = sizes(*[10] * 10, embedding=20, head=40)
    assert auto_span(offers, model, 60, headroom=0.0) == Span.parse(span)


def test_the_rounding_of_whole_blocks_does_not_send_a_newcomer_into_the_middle() -> None:
    # 0:3 fills 55 of 60 bytes and 1:7 all of them; yet 1:7 would strand block 0.
    model = sizes(*[10] * 10, embedding=25, head=45)
    assert auto_span([], model, 60, headroom=0.0) == Span(0, 3)


@given(any_sizes(), st.integers(0, 80), SEEDS, st.integers(0, 1000))
def test_an_auto_span_fits_and_could_not_grow(
    model: BlockSizes, free_bytes: int, seed: int | None, swarm: int
) -> None:
    offers = random_swarm(Random(swarm), blocks=model.blocks, peers=4)
    usable = free_bytes * 0.8
    singles = [model.span_bytes(Span(block, block + 1)) for block in range(model.blocks)]
    if min(singles) > int(usable):
        with pytest.raises(DoesNotFit, match="--memory"):
            auto_span(offers, model, free_bytes, seed=seed)
        return
    span = auto_span(offers, model, free_bytes, seed=seed)
    assert model.span_bytes(span) <= usable
    if span.start > 0:
        assert model.span_bytes(Span(span.start - 1, span.stop)) > int(usable)
    if span.stop < model.blocks:
        assert model.span_bytes(Span(span.start, span.stop + 1)) > int(usable)


@settings(max_examples=50)
@given(any_sizes(), SEEDS)
def test_every_newcomer_on_auto_covers_something_until_nothing_is_uncovered(
    model: BlockSizes, seed: int | None
) -> None:
    enough = max(model.span_bytes(Span(block, block + 1)) for block in range(model.blocks))
    offers: list[Offer] = []
    while gaps := uncovered(offers, model.blocks):
        span = auto_span(offers, model, enough, headroom=0.0, seed=seed)
        assert any(span.overlaps(gap) for gap in gaps)
        offers.append(offer(f"p{len(offers)}", str(span)))


def test_what_does_not_fit_says_how_much_is_missing_and_what_to_do() -> None:
    model = sizes(3 * 10**9, 3 * 10**9, embedding=10**9, cache=10**5, cache_tokens=1000)
    with pytest.raises(DoesNotFit) as caught:
        auto_span([], model, 2 * 10**9)
    assert caught.value.needed_bytes == 3_100_000_000
    assert caught.value.usable_bytes == 1_600_000_000
    assert str(caught.value) == (
        "one block with its cache needs 3.10 GB, but only 1.60 GB of 2.00 GB may be used: "
        "give more with --memory, or serve a smaller model"
    )


@pytest.mark.parametrize("headroom", [-0.1, 1.0])
def test_a_headroom_that_is_no_share_is_refused(headroom: float) -> None:
    with pytest.raises(ValueError, match="headroom is a share"):
        auto_span([], sizes(1), 10, headroom=headroom)


def test_impossible_sizes_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        sizes()
    with pytest.raises(ValueError, match="negative"):
        sizes(1, head=-1)
    with pytest.raises(ValueError, match="beyond"):
        sizes(1, 1).span_bytes(Span(0, 3))
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        blocks_that_fit(sizes(1, 1), 10, start=2)
