"""The averages of a server's work follow the work, and nothing else."""

from dataclasses import dataclass

from swarm.pace import (
    LEAST_SHARE,
    MOST_SURPRISE,
    WAIT_HALF_LIFE_SECONDS,
    WEIGHT,
    Pace,
    PacedExecutor,
    Speeds,
)

MEASURED = Speeds(
    decode_seconds_per_block=0.01, prefill_seconds_per_block_token=0.001, head_seconds=0.02
)


def paced(times: int = 1, **work: float) -> Pace:
    pace = Pace(MEASURED)
    told = {"positions": 1, "blocks": 2, "has_head": False, "seconds": 0.02, "waited": 0.0}
    for _ in range(times):
        pace.note(now=0.0, **{**told, **work})  # type: ignore[arg-type]
    return pace


def test_before_any_work_the_measured_speeds_stand() -> None:
    assert Pace(MEASURED).speeds(5.0) == MEASURED


def test_decode_steps_move_the_decode_figure_only() -> None:
    speeds = paced(200, seconds=0.08).speeds(0.0)
    assert speeds.decode_seconds_per_block == 0.04
    assert speeds.prefill_seconds_per_block_token == 0.001


def test_long_steps_move_the_prefill_figure_only() -> None:
    speeds = paced(200, positions=100, seconds=1.0).speeds(0.0)
    assert speeds.prefill_seconds_per_block_token == 0.005
    assert speeds.decode_seconds_per_block == 0.01


def test_the_head_is_not_counted_as_blocks() -> None:
    assert paced(200, has_head=True, seconds=0.04).speeds(0.0) == MEASURED


def test_a_head_that_was_measured_too_slow_leaves_the_blocks_something() -> None:
    speeds = paced(1000, has_head=True, seconds=0.01).speeds(0.0)
    assert speeds.decode_seconds_per_block == LEAST_SHARE * 0.01 / 2
    assert paced(1000, seconds=0.0).speeds(0.0) == MEASURED, "a clock too coarse tells nothing"


def test_one_step_after_a_sleep_of_the_machine_moves_a_figure_little() -> None:
    decode = paced(seconds=3600.0).speeds(0.0).decode_seconds_per_block
    assert decode == float(f"{0.01 * (1 + WEIGHT * (MOST_SURPRISE - 1)):.3g}")


def test_steps_that_were_not_computed_count_for_nothing() -> None:
    assert paced(50, positions=0, seconds=9.0).speeds(0.0) == MEASURED


def test_an_expected_wait_halves_while_nobody_waits() -> None:
    pace = paced(200, waited=0.4)
    assert pace.speeds(0.0).wait_seconds == 0.4
    assert pace.speeds(WAIT_HALF_LIFE_SECONDS).wait_seconds == 0.2
    assert pace.speeds(100 * WAIT_HALF_LIFE_SECONDS).wait_seconds == 0.0


@dataclass
class Run:
    positions: int = 1
    blocks: int = 1
    has_head: bool = False
    seconds: float = 0.5


@dataclass
class Finished:
    run: Run | None
    waited: float = 0.0


class Executor:
    def __init__(self, *finished: Finished) -> None:
        self.finished = list(finished)
        self.jobs: list[object] = []

    def submit(self, job: object) -> None:
        self.jobs.append(job)

    def collect(self) -> list[Finished]:
        return self.finished

    def fileno(self) -> int:
        return 7


def test_results_pass_through_a_paced_executor_and_each_pass_is_noted_once() -> None:
    executor = Executor(Finished(None))  # it failed, or shared another's pass
    pace = Pace(MEASURED)
    wrapped = PacedExecutor(executor, pace, lambda: 0.0)  # type: ignore[arg-type]
    wrapped.submit("a step")
    assert executor.jobs == ["a step"]
    assert wrapped.fileno() == 7
    assert wrapped.collect() == executor.finished
    assert pace.speeds(0.0) == MEASURED
    executor.finished = [Finished(Run())]
    wrapped.collect()
    assert pace.speeds(0.0).decode_seconds_per_block > 0.01
