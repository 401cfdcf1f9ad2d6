from math import inf, nan

import pytest

from routing.route import Hop, NoRoute, Route
from routing.span import Span


def hops(*spans: str) -> tuple[Hop, ...]:
    return tuple(Hop(f"p{index}", Span.parse(span)) for index, span in enumerate(spans))


def test_a_route_of_joined_hops_knows_how_many_blocks_it_runs() -> None:
    assert Route(hops("0:3", "3:4", "4:9"), 0.5).blocks == 9


@pytest.mark.parametrize("broken", [("1:4",), ("0:3", "4:8"), ("0:5", "4:8"), ("4:8", "0:4"), ()])
def test_hops_with_a_gap_or_an_overlap_are_no_route(broken: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"comes next|at least one hop"):
        Route(hops(*broken), 0.5)


@pytest.mark.parametrize("seconds", [-1.0, inf, nan])
def test_a_route_takes_a_possible_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="finite time"):
        Route(hops("0:4"), seconds)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (NoRoute([Span(4, 6)]), "blocks 4:6 are served by nobody"),
        (NoRoute([Span(4, 5)]), "block 4 is served by nobody"),
        (NoRoute([Span(0, 1), Span(4, 6)]), "blocks 0, 4:6 are served by nobody"),
        (
            NoRoute(full=[Span(2, 8)], needed_tokens=512),
            "no server of blocks 2:8 has room for 512 tokens",
        ),
        (NoRoute(avoided=[Span(7, 8)]), "block 7 is served only by peers to avoid"),
        (
            NoRoute([Span(0, 2)], full=[Span(2, 3)], needed_tokens=9),
            "blocks 0:2 are served by nobody; no server of block 2 has room for 9 tokens",
        ),
    ],
)
def test_no_route_names_the_blocks_and_the_reason(error: NoRoute, sentence: str) -> None:
    assert str(error) == sentence
