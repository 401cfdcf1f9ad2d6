"""The table of fault tolerance: lots that can be foretold, and a small one measured for real."""

from collections.abc import Callable, Iterator

import pytest
import trio
from fault_table import (
    Measured,
    Settings,
    WrongText,
    expected_steps,
    measure,
    open_bench,
    rows_of,
    speed_of,
)
from fault_ways import Bench, Cell, Run, Way, run_once
from fault_world import Lots

from blocks.thread import ComputeThread

# By the lots of this seed three stages are struck, the first and the last among them, two of them
# at one position, and one stage never.
SEED, PROBABILITY, TOKENS, STAGES = 42, 0.04, 16, 4
FORETOLD = ((18, 0), (18, 2), (26, 3))
PROMPTED = 14


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    settings = Settings(tokens=(TOKENS,), stages=STAGES)
    with ComputeThread(1) as thread:
        yield open_bench(tmp_path_factory.mktemp("faults"), settings, thread, width=1)


def said(bench: Bench, way: Way, probability: float = PROBABILITY) -> Run:
    cell = Cell(TOKENS, way, probability)

    async def within() -> Run:
        with trio.fail_after(60):
            return await run_once(cell, SEED, bench)

    return trio.run(within)


def test_a_lost_server_costs_a_replay_on_its_own_stage_and_the_text_stays(bench: Bench) -> None:
    assert len(bench.prompt) == PROMPTED
    still, struck = said(bench, "ours", 0.0), said(bench, "ours")
    assert still.struck == ()
    assert still.replayed == (0, 0, 0, 0)
    assert struck.struck == FORETOLD
    assert struck.token_ids == still.token_ids
    # what the dead had computed, and nothing of the stage that was not struck
    assert struck.replayed == (18, 0, 18, 26)
    assert [position for position, _ in struck.gaps] == [18, 26]


def test_without_caches_a_failure_repeats_a_step_and_nothing_else(bench: Bench) -> None:
    struck = said(bench, "cacheless")
    assert struck.struck == FORETOLD
    assert struck.replayed == (0, 0, 0, 0)
    assert struck.token_ids == said(bench, "ours", 0.0).token_ids


def test_with_restarts_every_failure_begins_the_text_again(bench: Bench) -> None:
    struck = said(bench, "restarts")
    assert struck.struck[:1] == FORETOLD[:1]
    assert struck.restarts == len(struck.struck)
    assert struck.replayed[0] >= 18
    assert struck.token_ids == said(bench, "ours", 0.0).token_ids


# --- lots --------------------------------------------------------------------------------------


def struck_by(lots: Lots, positions: range, stages: int = 3) -> list[tuple[int, int]]:
    """Send every position to every stage until it is through."""
    for position in positions:
        for stage in range(stages):
            while lots.strikes(stage, position):
                pass
    return lots.struck


def test_the_lots_of_a_seed_are_the_same_and_those_of_another_are_not() -> None:
    positions = range(200)
    one = struck_by(Lots(1, 0.1, 3), positions)
    assert one == struck_by(Lots(1, 0.1, 3), positions)
    assert one != struck_by(Lots(2, 0.1, 3), positions)
    assert 30 < len(one) < 100  # of some 600 sends, a tenth


def test_faults_of_a_small_probability_are_among_those_of_a_greater_one() -> None:
    few = struck_by(Lots(1, 0.01, 3), range(500))
    many = struck_by(Lots(1, 0.1, 3), range(500))
    assert few
    assert set(few) < set(many)


def test_what_a_replay_sends_again_is_not_drawn_for_and_a_new_text_is() -> None:
    lots = Lots(1, 0.1, 3)
    struck = list(struck_by(lots, range(100)))
    assert struck_by(lots, range(100)) == struck
    lots.begin()
    assert len(struck_by(lots, range(100))) > len(struck)


# --- the table, over runs that are made up -----------------------------------------------------


def made_up(
    seconds: Callable[[Cell], float], ids: Callable[[Cell], int] = lambda _cell: 7
) -> Callable[[Cell, int], Run]:
    def run(cell: Cell, seed: int) -> Run:
        return Run(
            seed=seed,
            seconds=seconds(cell),
            struck=(),
            restarts=0,
            replayed=(),
            computed_seconds=0.0,
            cpu_seconds=1.0,
            gaps=(),
            token_ids=(ids(cell),) * cell.tokens,
        )

    return run


@pytest.mark.parametrize(
    ("probability", "stages", "steps", "expected"),
    [(0.0, 4, 128, 128.0), (0.5, 1, 1, 2.0), (0.5, 1, 2, 6.0), (0.5, 2, 1, 4.0)],
)
def test_the_expected_steps_of_restarts_are_those_of_a_run_of_successes(
    probability: float, stages: int, steps: int, expected: float
) -> None:
    assert expected_steps(probability, stages, steps) == pytest.approx(expected)


def test_more_restarts_than_numbers_reach_are_endless() -> None:
    assert expected_steps(0.5, 4, 1024) == float("inf")


def test_restarts_that_would_take_too_long_are_computed_and_beyond_an_hour_do_not_finish() -> None:
    settings = Settings(tokens=(1024,), ways=("restarts",), seeds=1, longest_seconds=100.0)
    table = measure(settings, made_up(lambda cell: 0.01 * cell.tokens), lambda _line: None)
    shown = list(rows_of(settings, table))[1]
    expected = 0.01 * expected_steps(1e-3, 4, 1024)
    assert shown == ["1024", "restarts", "100 (0/1)", "100 (0/1)", f"~{1024 / expected:.3g}",
                     "does not finish"]  # fmt: skip


def test_a_cell_is_measured_until_it_took_its_time_and_all_its_runs_count() -> None:
    settings = Settings(tokens=(10,), ways=("ours",), probabilities=(0.0,), cell_seconds=5.0)
    cell = Cell(10, "ours", 0.0)
    table = measure(settings, made_up(lambda _cell: 2.0), lambda _line: None)
    assert [run.seed for run in table[cell].runs] == [0, 1, 2]
    assert speed_of(cell, Measured([*table[cell].runs])) == pytest.approx(5.0)


def test_what_is_kept_is_told_of_the_wall_clock_and_of_the_processor() -> None:
    settings = Settings(tokens=(10,), ways=("ours",), probabilities=(0.0, 0.01), seeds=1)
    run = made_up(lambda cell: 4.0 if cell.probability else 1.0)
    shown = list(rows_of(settings, measure(settings, run, lambda _line: None)))
    assert shown[2:] == [["10", "ours, kept", "100%", "25%"], ["10", "of cpu time", "100%", "100%"]]


def test_a_text_of_ours_that_a_failure_changed_is_no_figure() -> None:
    settings = Settings(tokens=(10,), seeds=1)

    def ids(cell: Cell) -> int:
        return 8 if cell.way == "ours" and cell.probability == 1e-3 else 7

    with pytest.raises(WrongText, match="changed the text"):
        measure(settings, made_up(lambda _cell: 1.0, ids), lambda _line: None)
