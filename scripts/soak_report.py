"""What a soak's samples say: pure, without clock or process.

1. Memory is compared between the second and the last quarter: the first warms up.
2. Each token said is compared with the text that the prompt has alone, whether the text was
   finished or given up. After a near tie two right answers may part: such a text counts as that.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import mean, median
from typing import Any, Literal, get_args

from swarm.chaos_plan import NEAR_TIE

Ending = Literal["whole", "leave", "cut", "vanish"]
"""How a text goes: to its end; closed in the middle; its streams closed underfoot, and on to its
end; its streams closed underfoot, and no word more."""

ENDINGS: tuple[Ending, ...] = get_args(Ending)
WEIGHTS = (6, 1, 1, 1)
SHORTEST, LONGEST = 8, 48  # tokens of a text
MOST_PAUSE_SECONDS = 1.0  # between two texts of a client
LEAST_FAIRNESS = 0.5  # slowest over median
MOST_GROWTH = 0.05  # of memory, from the second quarter to the last
MOST_MESSAGES = 10


@dataclass(frozen=True, slots=True)
class Alone:
    """What a prompt's text is when nobody else asks, and how sure each token was."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]  # of the best logit over the next


@dataclass(frozen=True, slots=True)
class Errand:
    """One text that a client will ask for."""

    prompt: int  # its place in the deck
    length: int
    ending: Ending
    place: int  # at which token it is hurt, if it is
    pause_seconds: float  # before it


def errands(random: Random, deck: int) -> Iterator[Errand]:
    """Yield texts for one client, without end; each prompt of the deck comes as often as others."""
    while True:
        for prompt in random.sample(range(deck), deck):
            yield _errand(random, prompt)


def _errand(random: Random, prompt: int) -> Errand:
    length = random.randint(SHORTEST, LONGEST)
    (ending,) = random.choices(ENDINGS, WEIGHTS)
    place, pause = random.randrange(1, length - 1), random.uniform(0, MOST_PAUSE_SECONDS)
    return Errand(prompt, length, ending, place, pause)


Verdict = Literal["same", "different", "near tie"]


def compare(said: Sequence[int], alone: Alone) -> Verdict:
    """Return whether these tokens are those that the prompt has alone."""
    for token, other, margin in zip(said, alone.tokens, alone.margins, strict=False):
        if token != other:
            return "near tie" if margin < NEAR_TIE else "different"
    return "same"


@dataclass(slots=True)
class Tally:
    """What one client met."""

    endings: dict[Ending, int] = field(default_factory=lambda: dict.fromkeys(ENDINGS, 0))
    tokens: int = 0
    seconds: float = 0.0  # from the first step to the last token, of all its texts
    decoded: int = 0
    decode_seconds: float = 0.0  # without prompts
    different: int = 0
    near_ties: int = 0
    failovers: int = 0
    troubles: Counter[str] = field(default_factory=Counter)  # what sessions told of, by kind
    errors: list[str] = field(default_factory=list)

    @property
    def texts(self) -> int:
        """How many it asked for and got, or gave up itself."""
        return sum(self.endings.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """The resident memory of one process: (seconds since the beginning, bytes), in order."""

    name: str
    samples: tuple[tuple[float, int], ...]

    def facts(self) -> dict[str, Any]:
        """The medians of two quarters in MiB, the growth between them, and the slope."""
        quarter = max(len(self.samples) // 4, 1)
        second, last = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        before = median(size for _, size in second or last)
        after = median(size for _, size in last)
        return {
            "process": self.name,
            "second_quarter_mib": before / (1 << 20),
            "last_quarter_mib": after / (1 << 20),
            "growth": after / before - 1,
            "slope_mib_per_minute": slope(self.samples[quarter:]) * 60 / (1 << 20),
        }


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of (x, y) pairs; 0 of fewer than two."""
    if len(samples) < 2:
        return 0.0
    middle_x, middle_y = (mean(values) for values in zip(*samples, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in samples)
    lean = sum((x - middle_x) * (y - middle_y) for x, y in samples)
    return lean / spread if spread else 0.0


def fairness(speeds: Sequence[float]) -> float:
    """Return the slowest speed as a share of the median."""
    middle = median(speeds)
    return min(speeds) / middle if middle else 0.0


def report_of(
    tallies: Sequence[Tally], memories: Sequence[Memory], seconds: float
) -> dict[str, Any]:
    """Return what the clients met, and whether the swarm holds."""
    speeds = [each.tokens / each.seconds if each.seconds else 0.0 for each in tallies]
    decoding = [
        each.decoded / each.decode_seconds if each.decode_seconds else 0.0 for each in tallies
    ]
    errors = [message for each in tallies for message in each.errors]
    memory = [each.facts() for each in memories]
    made: dict[str, Any] = {
        "clients": len(tallies),
        "seconds": seconds,
        "texts": sum(each.texts for each in tallies),
        "endings": {name: sum(each.endings[name] for each in tallies) for name in ENDINGS},
        "tokens": sum(each.tokens for each in tallies),
        "failovers": sum(each.failovers for each in tallies),
        "troubles": dict(sum((each.troubles for each in tallies), Counter[str]())),
        "errors": len(errors),
        "error_messages": errors[:MOST_MESSAGES],
        "different": sum(each.different for each in tallies),
        "near_ties": sum(each.near_ties for each in tallies),
        "tokens_per_second": sum(each.tokens for each in tallies) / seconds,
        "client_median_tokens_per_second": median(speeds),
        "slowest_over_median": fairness(speeds),
        "slowest_over_median_decoding": fairness(decoding),
        "memory": memory,
    }
    made["is_flat"] = all(each["growth"] <= MOST_GROWTH for each in memory)
    made["holds"] = (
        not made["errors"]
        and not made["different"]
        and made["is_flat"]
        and made["slowest_over_median"] >= LEAST_FAIRNESS
    )
    return made


def table(report: dict[str, Any]) -> str:
    """Return the report for people."""
    endings = ", ".join(f"{count} {name}" for name, count in report["endings"].items())
    troubles = ", ".join(f"{count} {kind}" for kind, count in report["troubles"].items())
    lines = [
        f"{report['clients']} clients, {report['seconds'] / 60:.1f} minutes: "
        f"{report['texts']} texts ({endings}), {report['tokens']} tokens, "
        f"{report['tokens_per_second']:.1f} tokens/s of all",
        f"errors {report['errors']}, different {report['different']}, "
        f"near ties {report['near_ties']}; repairs {report['failovers']} "
        f"({troubles or 'no trouble'})",
        f"slowest ÷ median client {report['slowest_over_median']:.2f} "
        f"(decoding alone {report['slowest_over_median_decoding']:.2f}); "
        f"median {report['client_median_tokens_per_second']:.2f} tokens/s",
        f"{'memory, MiB':16}{'2nd quarter':>12}{'last':>9}{'growth':>9}{'per minute':>12}",
    ]
    lines += [
        f"{each['process']:16}{each['second_quarter_mib']:12.1f}{each['last_quarter_mib']:9.1f}"
        f"{each['growth']:9.1%}{each['slope_mib_per_minute']:12.2f}"
        for each in report["memory"]
    ]
    lines += [f"error: {message}" for message in report["error_messages"]]
    lines.append("it holds" if report["holds"] else "IT DOES NOT HOLD")
    return "\n".join(lines)
