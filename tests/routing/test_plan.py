"""Machines on paper are given what they have room for, and the route is the real one."""

import pytest

from routing.placement import HEADROOM, BlockSizes
from routing.plan import Machine, plan_swarm
from routing.span import Span

GB = 10**9


def sizes(blocks: int = 8, *, is_tied: bool = False) -> BlockSizes:
    return BlockSizes(
        block_bytes=(GB,) * blocks,
        embedding_bytes=GB // 2,
        head_bytes=GB // 2,
        cache_bytes_per_token=1000,
        history_bytes_per_token=500,
        cache_tokens=10_000,
        is_tied=is_tied,
    )


def machine(name: str, gigabytes: float, *, reads: float = 10.0, rtt: float = 0.02) -> Machine:
    return Machine(
        name=name,
        memory_bytes=int(gigabytes * GB),
        bytes_per_second=reads * GB,
        round_trip_seconds=rtt,
    )


def test_nobody_is_given_more_than_its_memory_less_the_headroom() -> None:
    machines = [machine(name, size) for name, size in (("a", 6), ("b", 4), ("c", 3), ("d", 2))]
    plan = plan_swarm(machines, sizes(), 4096)
    for held, given in zip(plan.holdings, machines, strict=True):
        assert held.usable_bytes == int(given.memory_bytes * (1 - HEADROOM))
        assert 0 < held.total_bytes <= held.usable_bytes


def test_every_byte_of_the_model_is_held_once_when_the_machines_just_cover_it() -> None:
    plan = plan_swarm([machine("a", 6.9), machine("b", 6.9)], sizes(), 4096)
    assert [held.span for held in plan.holdings] == [Span(0, 4), Span(4, 8)]
    assert sum(held.weight_bytes for held in plan.holdings) == 8 * GB
    assert sum(held.end_bytes for held in plan.holdings) == GB
    assert sum(held.cache_bytes for held in plan.holdings) == 8 * 1000 * 10_000
    assert not plan.missing
    assert plan.missing_bytes == 0


def test_a_token_takes_reading_the_weights_and_the_way() -> None:
    plan = plan_swarm([machine("a", 6.9), machine("b", 6.9)], sizes(), 4096)
    assert plan.route is not None
    assert [hop.peer for hop in plan.route.hops] == ["a", "b"]
    reading, way = (8 * GB + GB // 2) / (10 * GB), 3 * 0.01
    assert plan.route.seconds == pytest.approx(reading + way, abs=0.005)


def test_what_nobody_has_room_for_is_named_with_its_bytes() -> None:
    plan = plan_swarm([machine("a", 6.9)], sizes(), 4096)
    assert plan.route is None
    assert plan.missing == (Span(4, 8),)
    assert plan.missing_bytes == sizes().span_bytes(Span(4, 8))


def test_a_machine_too_small_for_any_block_holds_nothing() -> None:
    plan = plan_swarm([machine("small", 1), machine("large", 20)], sizes(), 4096)
    assert plan.holdings[0].span is None
    assert plan.holdings[0].total_bytes == 0
    assert plan.holdings[1].span == Span(0, 8)
    assert plan.route is not None


def test_without_machines_everything_is_missing() -> None:
    assert plan_swarm([], sizes(), 4096).missing == (Span(0, 8),)


@pytest.mark.parametrize(
    "wrong", [{"name": ""}, {"gigabytes": 0}, {"reads": 0.0}, {"rtt": -1.0}, {"rtt": float("inf")}]
)
def test_an_impossible_machine_is_refused(wrong: dict[str, object]) -> None:
    told = {"name": "a", "gigabytes": 1.0, **wrong}
    with pytest.raises(ValueError, match=r"\S"):
        machine(**told)  # type: ignore[arg-type]


def test_two_machines_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        plan_swarm([machine("a", 9), machine("a", 9)], sizes(), 4096)
