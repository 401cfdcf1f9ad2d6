from math import inf, nan

import pytest
from swarm_builders import offer

from routing.offer import Offer


@pytest.mark.parametrize("figure", [-0.001, nan, inf])
@pytest.mark.parametrize("name", ["decode", "prefill", "head", "wait"])
def test_an_offer_with_an_impossible_figure_cannot_be_built(name: str, figure: float) -> None:
    build: dict[str, float] = {name: figure}
    with pytest.raises(ValueError, match="of p must be finite and >= 0"):
        offer("p", "0:4", **build)  # type: ignore[arg-type]


def test_a_server_that_claims_a_block_in_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1e-09"):
        offer("p", "0:4", decode=0.0)


def test_negative_room_cannot_be_offered() -> None:
    with pytest.raises(ValueError, match="free_tokens of p"):
        offer("p", "0:4", free_tokens=-1)


def test_the_clients_name_cannot_make_an_offer() -> None:
    with pytest.raises(ValueError, match="the empty name is the client's"):
        offer("", "0:4")


def test_a_server_is_not_online_while_it_joins() -> None:
    with pytest.raises(ValueError, match="online and joining at once"):
        offer("p", "0:4", is_joining=True)


@pytest.mark.parametrize(
    ("made", "blocks", "tokens_per_second"),
    [
        (offer("p", "0:4", decode=0.05, head=0.3), 8, 5.0),  # the head is not held: no charge
        (offer("p", "4:8", decode=0.05, head=0.3), 8, 2.0),
        (offer("p", "4:8", decode=0.05), 8, 5.0),
    ],
)
def test_throughput_counts_the_whole_span_and_the_head_if_held(
    made: Offer, blocks: int, tokens_per_second: float
) -> None:
    assert made.tokens_per_second(blocks) == pytest.approx(tokens_per_second)
