"""A chaos run is planned by its seed and reports what happened, no more and no less."""

from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.chaos_plan import (
    KINDS,
    NEAR_TIE,
    SETTLE_TOKENS,
    Blow,
    ChaosSettings,
    Comparison,
    Kind,
    Plan,
    Said,
    Undisturbed,
    compare,
    gaps_of,
    parse_kinds,
    percentile,
    plan_of,
    report_of,
    short_handed,
)
from swarm.errors import BadInput


def test_a_seed_gives_one_plan_and_another_seed_another() -> None:
    first = plan_of(ChaosSettings(seed=1), 200)
    assert first == plan_of(ChaosSettings(seed=1), 200)
    assert first != plan_of(ChaosSettings(seed=2), 200)


def test_a_hundred_kills_come_in_equal_shares_over_two_thousand_tokens() -> None:
    plan = plan_of(ChaosSettings(), 200)
    assert (plan.texts, plan.length) == (10, 200)
    assert {kind: sum(blow.kind == kind for blow in plan.blows) for kind in KINDS} == dict.fromkeys(
        KINDS, 25
    )
    assert {blow.returns for blow in plan.blows if blow.kind in ("stop", "cut")} == {True, False}
    assert not any(blow.returns for blow in plan.blows if blow.kind in ("close", "kill"))


@given(
    kills=st.integers(1, 60),
    spare=st.floats(1.0, 5.0),
    longest=st.integers(20, 400),
    seed=st.integers(0, 99),
)
def test_blows_never_come_too_close_to_tell_their_gaps_apart(
    kills: int, spare: float, longest: int, seed: int
) -> None:
    settings = ChaosSettings(kills=kills, tokens=int(kills * 25 * spare), seed=seed)
    try:
        plan = plan_of(settings, longest)
    except BadInput:
        return
    assert len(plan.blows) == kills
    assert plan.texts * plan.length >= settings.tokens
    assert plan.length <= longest
    for _, blows in groupby(plan.blows, lambda blow: blow.text):
        places = [blow.position for blow in blows]
        assert places[0] >= 1
        # The token before a blow still belongs to the blow before.
        assert all(after - before > SETTLE_TOKENS for before, after in pairwise(places))
        assert places[-1] + SETTLE_TOKENS <= plan.length


@pytest.mark.parametrize(
    "wrong",
    [{"kills": 0}, {"tokens": 0}, {"replicas": 1}, {"hops": 0}],
    ids=str,
)
def test_a_run_that_could_show_nothing_is_bad_input(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput):
        ChaosSettings(**wrong)


def test_more_kills_than_tokens_to_tell_them_apart_are_bad_input() -> None:
    with pytest.raises(BadInput, match="too many"):
        plan_of(ChaosSettings(kills=100, tokens=500), 200)


def test_kinds_are_read_in_their_own_order_and_strange_ones_named() -> None:
    assert parse_kinds("cut, close") == ("close", "cut")
    for text in ("", "burn", "kill,burn"):
        with pytest.raises(BadInput):
            parse_kinds(text)


def undisturbed(*tokens: int, near: tuple[int, ...] = ()) -> Undisturbed:
    margins = tuple(NEAR_TIE / 2 if n in near else 1.0 for n in range(len(tokens)))
    return Undisturbed(tokens, (0.5,) + (0.01,) * (len(tokens) - 1), margins)


@pytest.mark.parametrize(
    ("said", "near", "found"),
    [
        ([1, 2, 3, 4], (), Comparison(first=4, lost=0, different=0, near_ties=0)),
        ([1, 2], (), Comparison(first=2, lost=2, different=0, near_ties=0)),
        ([], (), Comparison(first=0, lost=4, different=0, near_ties=0)),
        ([1, 9, 3, 4], (), Comparison(first=1, lost=0, different=3, near_ties=0)),
        ([1, 9, 3, 4], (1,), Comparison(first=1, lost=0, different=0, near_ties=3)),
        ([1, 9, 3, 4], (2,), Comparison(first=1, lost=0, different=3, near_ties=0)),
        ([1, 2, 9], (2,), Comparison(first=2, lost=1, different=0, near_ties=1)),
        ([1, 2, 3, 4, 5], (), Comparison(first=4, lost=0, different=1, near_ties=0)),
    ],
    ids=str,
)
def test_a_text_is_compared_token_by_token_up_to_its_first_departure(
    said: list[int], near: tuple[int, ...], found: Comparison
) -> None:
    assert compare(undisturbed(1, 2, 3, 4, near=near), said) == found


def blow(position: int, kind: Kind = "kill") -> Blow:
    return Blow(text=0, position=position, kind=kind, hop=0.0, delay=0.0, returns=False)


def test_a_gap_is_the_longest_wait_up_to_the_next_blow_less_the_usual_time() -> None:
    said = Said(undisturbed(*range(8)), list(range(8)), [0.9, 0.01, 0.3, 0.2, 0.01, 0.7, 0.01, 0.6])
    said.struck = [(blow(1), "0:2"), (blow(4), "2:5")]
    assert gaps_of(said, 0.01) == pytest.approx([0.29, 0.69])


def test_tokens_count_as_short_handed_from_a_blow_until_the_swarm_is_whole_again() -> None:
    said = Said(undisturbed(*range(9)), list(range(9)), [0.01] * 9)
    assert short_handed(said) == 0
    said.struck = [(blow(1), "0:2"), (blow(5), "2:5")]
    assert short_handed(said) == 3 + 4  # tokens 1 to 3; 5 to 8, the last


def test_a_blow_that_nobody_felt_has_no_gap() -> None:
    said = Said(undisturbed(1, 2), [1, 2], [0.9, 0.004], struck=[(blow(1), "0:2")])
    assert gaps_of(said, 0.01) == [0.0]


def test_what_is_lost_or_different_is_laid_to_the_last_blow_before_it() -> None:
    text = undisturbed(*range(30))
    astray = Said(text, [*range(20), *[99] * 10], [0.01] * 30, repairs=2, replayed_tokens=40)
    astray.struck = [(blow(1, "close"), "0:2"), (blow(15, "stop"), "2:5"), (blow(25), "5:8")]
    short = Said(text, list(range(12)), [0.01] * 13, [(blow(2, "cut"), "0:2")], error="no route")
    report = report_of(Plan(2, 30, (blow(1),) * 4), [astray, short])
    assert {kind: row["different"] for kind, row in report["kinds"].items()} == {
        "close": 0,
        "kill": 0,
        "stop": 10,
        "cut": 0,
    }
    assert report["kinds"]["cut"]["lost"] == report["lost"] == 18
    assert (report["different"], report["kills"], report["tokens"]) == (10, 4, 60)
    assert (report["repairs"], report["replayed_tokens"]) == (2, 40)
    assert report["errors"] == ["no route"]
    assert not report["holds"]


def test_a_departure_that_no_blow_provoked_counts_too() -> None:
    said = Said(undisturbed(1, 2, 3), [9, 2, 3], [0.01] * 3, struck=[(blow(2), "0:2")])
    report = report_of(Plan(1, 3, (blow(2),)), [said])
    assert report["different"] == 3
    assert report["kinds"]["kill"]["different"] == 0
    assert not report["holds"]


@pytest.mark.parametrize(
    ("dealt", "near", "holds"), [(1, (), True), (0, (), False), (1, (2,), True)], ids=str
)
def test_the_law_holds_if_all_blows_were_dealt_and_only_near_ties_departed(
    dealt: int, near: tuple[int, ...], holds: bool
) -> None:
    text = undisturbed(1, 2, 3, near=near)
    said = Said(text, [1, 2, 9 if near else 3], [0.01] * 3, struck=[(blow(1), "0:2")] * dealt)
    report = report_of(Plan(1, 3, (blow(1),)), [said])
    assert report["holds"] is holds
    assert report["near_ties"] == len(near)


@pytest.mark.parametrize(
    ("percent", "found"), [(0, 1.0), (50, 2.0), (51, 3.0), (99, 4.0), (100, 4.0)]
)
def test_a_percentile_is_a_value_that_was_measured(percent: float, found: float) -> None:
    assert percentile([4.0, 2.0, 1.0, 3.0], percent) == found
    assert percentile([], percent) == 0.0
