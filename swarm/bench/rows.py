"""What benches found, as rows: pure arithmetic, and tables for people.

1. A row keeps every sample; mean and deviation are of these, as llama-bench prints them.
2. The parts of a token's time add up to it: what nobody claims is "other".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles, stdev
from typing import TYPE_CHECKING, Any

from swarm.errors import BadInput
from swarm.messages import HopTime

if TYPE_CHECKING:
    from rich.console import RenderableType

PARTS = ("compute", "queue", "link", "codec", "waiting", "other")
_SAYINGS = {
    "compute": "the hops' blocks, and the head",
    "queue": "waiting for a turn on the hops",
    "link": "half of each round trip on the way",
    "codec": "frames made and read, as timed here",
    "waiting": "the client, from answer to next step",
    "other": "what is left: the hops' event loops",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One test: tokens per second, one sample for each repetition. `users`: at the same time."""

    test: str
    users: int
    tokens: int  # of one repetition, of all users together
    samples: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """The mean of the samples."""
        return mean(self.samples)

    @property
    def deviation(self) -> float:
        """The standard deviation of the samples, 0 of a single one."""
        return stdev(self.samples) if len(self.samples) > 1 else 0.0

    def facts(self) -> dict[str, Any]:
        """The row as --json prints it."""
        return {
            "test": self.test,
            "users": self.users,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "deviation_tokens_per_second": self.deviation,
            "samples_tokens_per_second": list(self.samples),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimes:
    """When the client did what for one token, in seconds on one clock, and what its hops said.

    `began`: it had the token before; `written`: it wrote the step; `came`: the last bytes of the
    answer came; `ended`: it had the token.
    """

    began: float
    written: float
    came: float
    ended: float
    hops: tuple[HopTime, ...] = ()

    @property
    def seconds(self) -> float:
        """The token's whole time."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class CodecSeconds:
    """What a token's frames take to be made and read, in the client and in all hops together."""

    client: float
    hops: float


def breakdown(
    tokens: Sequence[TokenTimes], link_seconds: float, codec: CodecSeconds
) -> dict[str, float]:
    """Return the mean seconds of a token by PARTS, and their sum, the time per token, as "total".

    `link_seconds` are those of all links of the route, one way. Where a link or the codec is
    quicker under load than when it was measured, "other" is smaller by as much, even below 0.
    """
    count = len(tokens)
    if not count:
        return dict.fromkeys((*PARTS, "total"), 0.0)
    total = sum(token.seconds for token in tokens) / count
    away = sum(token.came - token.written for token in tokens) / count
    compute = sum(hop.computed for token in tokens for hop in token.hops) / count
    queue = sum(hop.waited for token in tokens for hop in token.hops) / count
    return {
        "compute": compute,
        "queue": queue,
        "link": link_seconds,
        "codec": codec.client + codec.hops,
        "waiting": total - away - codec.client,
        "other": away - compute - queue - link_seconds - codec.hops,
        "total": total,
    }


def hop_means(tokens: Sequence[TokenTimes], hops: int) -> list[HopTime]:
    """Return each hop's mean seconds, over the tokens that went over as many hops."""
    same = [token.hops for token in tokens if len(token.hops) == hops]
    return [
        HopTime(mean(one.computed for one in times), mean(one.waited for one in times))
        for times in zip(*same, strict=True)
    ]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that so many percent do not exceed; 0 of none."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def slowest_over_median(speeds: Sequence[float]) -> float:
    """Return the least of some speeds as a share of their median; 1 where all stand still."""
    middle = median(speeds)
    return min(speeds) / middle if middle else 1.0


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Read "1,4,16". BadInput says what is allowed for the option."""
    try:
        counts = tuple(int(word) for word in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise BadInput(f"{option} {text} is no list of counts", next_step="give some like 1,4,16")
    return tuple(dict.fromkeys(counts))


def parse_lengths(text: str, option: str) -> tuple[int, int]:
    """Read "5-200", or "5" for all alike. BadInput says what is allowed for the option."""
    least, _, most = text.partition("-")
    try:
        lengths = int(least), int(most or least)
    except ValueError:
        lengths = 0, 0
    if not 1 <= lengths[0] <= lengths[1]:
        raise BadInput(f"{option} {text} is no range of lengths", next_step="give one like 5-200")
    return lengths


def mixed_lengths(least: int, most: int, count: int) -> list[int]:
    """Return so many lengths, spread evenly over the range; the middle of it for one."""
    if count == 1:
        return [(least + most) // 2]
    return [least + (most - least) * number // (count - 1) for number in range(count)]


def speed_text(row: Mapping[str, Any]) -> str:
    """A row's speed for people: 12.34 ± 0.56."""
    return f"{row['tokens_per_second']:.2f} ± {row['deviation_tokens_per_second']:.2f}"


def table_of(columns: Mapping[str, Sequence[str]], *, left: int = 1) -> "RenderableType":
    """Return a table of these columns, the first `left` and a nameless one aligned to the left."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(
            name, justify="left" if number < left or not name else "right", no_wrap=True
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def breakdown_table(parts_ms: Mapping[str, float]) -> "RenderableType":
    """Return a token's time by its parts (milliseconds) for people."""
    total = parts_ms["total"]
    names = [*PARTS, "total"]
    return table_of(
        {
            "a token's time": names,
            "ms": [f"{parts_ms[name]:.2f}" for name in names],
            "share": [f"{parts_ms[name] / total:.0%}" if total else "" for name in names],
            "": [_SAYINGS.get(name, "") for name in names],
        }
    )
