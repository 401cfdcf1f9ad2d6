"""What a trouble means: pure, so a table."""

import pytest

from routing.repair import RepairedHop
from routing.span import Span
from swarm.messages import FaultKind, HopName
from swarm.session import Trouble
from swarm.troubles import as_routing, has_no_room, is_passing, named_hops, refusal_of


def trouble(failure: FaultKind, retry_seconds: float = 0.0, span: str = "2:4") -> Trouble:
    return Trouble(failure, "one", span, "why", retry_seconds)


@pytest.mark.parametrize(
    ("failure", "retry_seconds", "is_full", "passes"),
    [
        ("refused", 2.0, True, True),
        ("refused", 0.0, False, False),  # it leaves, or holds other blocks
        ("evicted", 2.0, True, True),
        ("evicted", 0.0, False, True),
        ("draining", 0.0, False, False),
        ("silent", 0.0, False, False),
        ("failed", 2.0, False, False),
    ],
)
def test_only_who_names_a_time_has_no_room(
    failure: FaultKind, retry_seconds: float, is_full: bool, passes: bool
) -> None:
    assert has_no_room(trouble(failure, retry_seconds)) == is_full
    assert is_passing(trouble(failure, retry_seconds)) == passes


def test_routing_hears_nothing_of_an_eviction_and_of_a_full_server_as_of_a_refusal() -> None:
    assert as_routing(trouble("evicted")) == []
    assert [each.kind for each in as_routing(trouble("evicted", 1.0))] == ["refused"]


def test_a_hop_that_was_evicted_begins_anew_and_no_other() -> None:
    hops = [
        RepairedHop("one", Span(0, 2), "keep"),
        RepairedHop("one", Span(2, 4), "keep"),
        RepairedHop("two", Span(4, 6), "new"),
    ]
    expected = [HopName("one", "0:2", "keep"), HopName("one", "2:4"), HopName("two", "4:6")]
    expected[1] = HopName("one", "2:4", "anew")
    assert named_hops(hops, [trouble("evicted")]) == expected
    assert named_hops(hops, [trouble("evicted", 1.0)])[1].mode == "keep"


def test_a_refusal_says_in_how_many_seconds_to_come_back() -> None:
    assert "try again in 3 seconds" in refusal_of(trouble("refused", 2.1)).sentence()
    assert "try again soon" in refusal_of(trouble("refused")).sentence()
