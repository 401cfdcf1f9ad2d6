"""How fast a server really is: averages of the work it does, started from a measurement.

The benchmark at the start sees an idle machine and a short past; what clients get depends on long
conversations, on other programs, on heat. So each step computed moves the figures a little.

1. A figure is always positive and finite where the measurement was.
2. One odd step (the machine slept, a page was swapped in) moves a figure by no more than
   `MOST_SURPRISE` of itself times the weight of one step.
3. A queue that is empty is forgotten: the expected wait halves every few seconds without work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm.worker import Executor

if TYPE_CHECKING:
    from blocks.executor import Done

WEIGHT = 1 / 16  # of one step in an average: some twenty steps show a change
# Of a pass the blocks take so much at least: the head was measured by itself, and perhaps too long.
LEAST_SHARE = 0.1
MOST_SURPRISE = 10.0  # a step counts as so many times the average at most
MOST_DECODED = (
    8  # positions in a step that still reads weights rather than computes: a short verify
)
LEAST_PREFILLED = 32  # positions from which on a step is a prefill
WAIT_HALF_LIFE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Seconds of a server's work, and of waiting for it."""

    decode_seconds_per_block: float
    prefill_seconds_per_block_token: float
    head_seconds: float
    wait_seconds: float = 0.0


class Pace:
    """The averages of one server's work on one stack."""

    def __init__(self, measured: Speeds) -> None:
        """`measured`: what a benchmark of the loaded stack gave."""
        self._decode = measured.decode_seconds_per_block
        self._prefill = measured.prefill_seconds_per_block_token
        self._head = measured.head_seconds
        self._wait = measured.wait_seconds
        self._waited_at = float("-inf")

    def note(
        self,
        *,
        positions: int,
        blocks: int,
        has_head: bool,
        seconds: float,
        waited: float,
        now: float,
    ) -> None:
        """A pass of so many positions went through so many blocks; `now` on any one clock."""
        if positions < 1 or blocks < 1 or seconds <= 0:
            return
        self._wait = _moved(self._wait_at(now), waited)
        self._waited_at = now
        net = max(seconds - (self._head if has_head else 0.0), LEAST_SHARE * seconds)
        if positions <= MOST_DECODED:
            per_block = min(net / blocks, self._decode * MOST_SURPRISE)
            self._decode = _moved(self._decode, per_block)
        elif positions >= LEAST_PREFILLED:
            per_token = min(net / (blocks * positions), self._prefill * MOST_SURPRISE)
            self._prefill = _moved(self._prefill, per_token)

    def speeds(self, now: float) -> Speeds:
        """Return the averages, to three digits: a record need not change for less."""
        return Speeds(
            decode_seconds_per_block=_rounded(self._decode),
            prefill_seconds_per_block_token=_rounded(self._prefill),
            head_seconds=_rounded(self._head),
            wait_seconds=round(self._wait_at(now), 4),
        )

    def _wait_at(self, now: float) -> float:
        if self._wait == 0.0:
            return 0.0
        return float(self._wait * 0.5 ** ((now - self._waited_at) / WAIT_HALF_LIFE_SECONDS))


class PacedExecutor:
    """An executor whose results are noted in a pace."""

    def __init__(self, executor: Executor, pace: Pace, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._pace = pace
        self._clock = clock

    def submit(self, job: Any) -> None:
        """Take a job; never waits."""
        self._executor.submit(job)

    def collect(self) -> "list[Done]":
        """Return what is finished, having noted it."""
        finished = self._executor.collect()
        for done in finished:
            if done.run is not None:
                self._pace.note(
                    positions=done.run.positions,
                    blocks=done.run.blocks,
                    has_head=done.run.has_head,
                    seconds=done.run.seconds,
                    waited=done.waited,
                    now=self._clock(),
                )
        return finished

    def fileno(self) -> int:
        """A file that is readable when results wait."""
        return self._executor.fileno()


def _moved(average: float, sample: float) -> float:
    return average + WEIGHT * (sample - average)


def _rounded(figure: float) -> float:
    return float(f"{figure:.3g}")
