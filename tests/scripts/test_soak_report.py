"""What a soak's samples say: laws of arithmetic, so that a leak or a stepchild cannot hide."""

from collections import Counter
from itertools import islice
from random import Random

import pytest
from soak_report import (
    LONGEST,
    SHORTEST,
    Alone,
    Errand,
    Memory,
    Tally,
    compare,
    errands,
    report_of,
    slope,
    table,
)

MIB = 1 << 20
ALONE = Alone((1, 2), tokens=(5, 6, 7, 8), margins=(1.0, 1e-6, 1.0, 1.0))


def steady(name: str = "server", growth_per_second: float = 0.0, count: int = 120) -> Memory:
    return Memory(
        name, tuple((float(n), int(400 * MIB + n * growth_per_second * MIB)) for n in range(count))
    )


def tally(tokens: int = 100, seconds: float = 10.0, **changes: object) -> Tally:
    made = Tally(tokens=tokens, seconds=seconds, decoded=tokens - 1, decode_seconds=seconds / 2)
    made.endings["whole"] = 3
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_quiet_run_holds() -> None:
    report = report_of([tally(), tally(90), tally(60)], [steady()], seconds=60.0)
    assert report["holds"]
    assert (report["texts"], report["tokens"], report["errors"]) == (9, 250, 0)
    assert report["slowest_over_median"] == pytest.approx(60 / 90)
    assert report["tokens_per_second"] == pytest.approx(250 / 60)


@pytest.mark.parametrize(
    "spoiled",
    [
        {"tallies": [tally(), tally(errors=["no route"])]},
        {"tallies": [tally(), tally(different=1)]},
        {"tallies": [tally(), tally(), tally(40)]},
        {"memories": [steady(), steady(growth_per_second=0.5)]},
    ],
    ids=["an error", "another text", "a stepchild", "a leak"],
)
def test_what_must_not_be_keeps_a_run_from_holding(spoiled: dict[str, list[object]]) -> None:
    plain = {"tallies": [tally(), tally()], "memories": [steady()]}
    assert report_of(**plain, seconds=60.0)["holds"]  # type: ignore[arg-type]
    report = report_of(**{**plain, **spoiled}, seconds=60.0)  # type: ignore[arg-type]
    assert not report["holds"]
    assert "DOES NOT HOLD" in table(report)


def test_a_near_tie_may_part_and_is_counted_apart() -> None:
    assert report_of([tally(near_ties=2), tally()], [steady()], seconds=60.0)["holds"]


def test_memory_that_fills_while_warming_up_counts_for_nothing() -> None:
    warming = Memory("server", tuple((float(n), min(n * 8, 240) * MIB) for n in range(1, 121)))
    facts = warming.facts()
    assert facts["growth"] == 0.0
    assert facts["slope_mib_per_minute"] == pytest.approx(0.0)


def test_growth_and_slope_are_those_of_the_samples() -> None:
    facts = steady(growth_per_second=0.5).facts()
    assert facts["slope_mib_per_minute"] == pytest.approx(30.0, rel=1e-3)
    assert facts["second_quarter_mib"] == pytest.approx(400 + 0.5 * 44.5)
    assert facts["growth"] == pytest.approx(0.5 * 60 / (400 + 0.5 * 44.5), rel=1e-3)
    assert steady(count=1).facts()["growth"] == 0.0
    assert slope([]) == 0.0


def test_a_text_is_the_same_as_far_as_it_was_said() -> None:
    assert compare((5, 6, 7), ALONE) == "same"
    assert compare((), ALONE) == "same"
    assert compare((5, 6, 9), ALONE) == "different"
    assert compare((4,), ALONE) == "different"
    assert compare((5, 9, 9, 9), ALONE) == "near tie"


def test_a_client_asks_for_every_prompt_equally_often_and_is_hurt_within_a_text() -> None:
    def asked(seed: int) -> list[Errand]:
        return list(islice(errands(Random(seed), deck=16), 160))

    assert set(Counter(each.prompt for each in asked(3)).values()) == {10}
    assert all(SHORTEST <= each.length <= LONGEST for each in asked(3))
    assert all(1 <= each.place < each.length - 1 for each in asked(3))
    assert {each.ending for each in asked(3)} == {"whole", "leave", "cut", "vanish"}
    assert asked(3) == asked(3) != asked(4)
