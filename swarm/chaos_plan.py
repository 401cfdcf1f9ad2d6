"""What a chaos run will do, and what its outcome says: pure, seeded, without clock or process.

1. The same settings and text length give the same plan, blow by blow.
2. Between two blows of a text lie at least SETTLE_TOKENS tokens, so that each gap has one cause.
3. Every token of the undisturbed text is counted once: said, lost, different, or from a near tie
   on, after which two right answers may part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal, get_args

from swarm.errors import BadInput
from swarm.settings import DEMO_FOLDER

Kind = Literal["close", "kill", "stop", "cut"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SETTLE_TOKENS = 8
LEAST_STRATUM = SETTLE_TOKENS + 2  # tokens of a text per blow
NEAR_TIE = 1e-4  # two logits of float32 this close may change places with the order of a sum
PARTING_SHARE = 0.5  # of the stopped and the cut: the others come back


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    """What to break. BadInput names an impossible value."""

    kills: int = 100
    tokens: int = 2000
    seed: int = 0
    replicas: int = 2
    hops: int = 3
    kinds: tuple[Kind, ...] = KINDS
    model: Path = DEMO_FOLDER

    def __post_init__(self) -> None:
        """Check what no run could do."""
        if self.kills < 1 or self.tokens < 1 or self.hops < 1:
            raise BadInput("a chaos run needs a kill, a token and a hop at least")
        if self.replicas < 2:
            raise BadInput(
                f"with {self.replicas} replica of each span nobody could take over",
                next_step="give --replicas 2 or more",
            )


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Read --kinds: "close,kill". BadInput says what is allowed."""
    asked = [word.strip() for word in text.split(",")]
    chosen = tuple(kind for kind in KINDS if kind in asked)
    if not chosen or set(asked) - set(KINDS):
        raise BadInput(f"--kinds {text} is unknown", next_step=f"choose among {','.join(KINDS)}")
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One kill: in which text, while which token is under way, of what kind, on whom."""

    text: int
    position: int
    kind: Kind
    hop: float  # in [0, 1): the share of the route before the victim
    delay: float  # in [0, 1): how far the token is, as a share of an undisturbed token's time
    returns: bool  # a stopped or cut server comes back later instead of being ended


@dataclass(frozen=True, slots=True)
class Plan:
    """All texts have the same number of tokens; blows come in their order."""

    texts: int
    length: int
    blows: tuple[Blow, ...]


def plan_of(settings: ChaosSettings, longest: int) -> Plan:
    """Spread the blows over texts of at most `longest` tokens, together at least as many as asked.

    The kinds get equal shares. BadInput if there are more blows than tokens to tell them apart.
    """
    rng = Random(settings.seed)
    texts = ceil(settings.tokens / longest)
    length = ceil(settings.tokens / texts)
    cuts = [settings.kills * number // texts for number in range(texts + 1)]
    if (length - 1) // max(b - a for a, b in pairwise(cuts)) < LEAST_STRATUM:
        raise BadInput(
            f"{settings.kills} kills are too many for {settings.tokens} tokens",
            next_step=f"give at least {LEAST_STRATUM + 1} tokens for each",
        )
    kinds = [settings.kinds[n % len(settings.kinds)] for n in range(settings.kills)]
    rng.shuffle(kinds)
    blows = []
    for text, (first, after) in enumerate(pairwise(cuts)):
        stratum = (length - 1) // max(after - first, 1)
        for place, kind in enumerate(kinds[first:after]):
            # From 1 on: the token before each blow is the last that the blow before may delay.
            position = 1 + place * stratum + rng.randrange(stratum - SETTLE_TOKENS)
            blow = Blow(
                text=text,
                position=position,
                kind=kind,
                hop=rng.random(),
                delay=rng.random(),
                returns=kind in ("stop", "cut") and rng.random() >= PARTING_SHARE,
            )
            blows.append(blow)
    return Plan(texts, length, tuple(blows))


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A text as the unhurt swarm says it: for each token its id, the seconds that it took, and
    how far the best logit lay above the second.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    margins: tuple[float, ...]


@dataclass(slots=True)
class Said:
    """The same text under blows. `seconds` counts a token that never came too; `struck` holds the
    blows that were dealt, with the span of the victim.
    """

    undisturbed: Undisturbed
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    struck: list[tuple[Blow, str]] = field(default_factory=list)
    repairs: int = 0
    replayed_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a text departs from the undisturbed one: where first (its length if nowhere), and how
    many tokens are lost, different, or lie behind a near tie that went the other way.
    """

    first: int
    lost: int
    different: int
    near_ties: int


def compare(undisturbed: Undisturbed, tokens: Sequence[int]) -> Comparison:
    """Compare a text with the undisturbed one. Tokens beyond its end count as different."""
    expected = undisturbed.tokens
    first = next(
        (n for n, pair in enumerate(zip(expected, tokens, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(tokens)),
    )
    lost = max(0, len(expected) - len(tokens))
    departed = len(tokens) - first
    is_near = first < len(expected) and undisturbed.margins[first] < NEAR_TIE
    return Comparison(first, lost, 0 if is_near else departed, departed if is_near else 0)


def gaps_of(said: Said, usual: float) -> list[float]:
    """Return for each blow the longest wait for a token from it to the next blow, less the usual
    seconds of a token; never below 0.
    """
    starts = [blow.position for blow, _ in said.struck] + [len(said.seconds)]
    return [
        max(0.0, max(said.seconds[start:stop], default=0.0) - usual)
        for start, stop in pairwise(starts)
    ]


def short_handed(said: Said) -> int:
    """Return how many tokens were said while a victim was not yet replaced: the swarm is made whole
    before the token that comes before a blow.
    """
    starts = [blow.position for blow, _ in said.struck] + [len(said.tokens) + 1]
    return sum(max(0, stop - 1 - start) for start, stop in pairwise(starts))


def report_of(plan: Plan, texts: Sequence[Said]) -> dict[str, Any]:
    """Return what came of the run; seconds as they are, `kinds` with the same figures for each.

    A lost or different token is laid to the last blow before it.
    """
    usual = median(second for said in texts for second in said.undisturbed.seconds[1:] or (0.0,))
    rows = [row for said in texts for row in _rows(said, usual)]
    total = _summed(rows)
    kinds = {
        kind: _summed(list(group))
        for kind, group in groupby(sorted(rows, key=lambda row: str(row["kind"])), _kind_of)
        if kind
    }
    return {
        **total,
        "planned": len(plan.blows),
        "tokens": sum(len(said.undisturbed.tokens) for said in texts),
        "texts": len(texts),
        "holds": total["lost"] == total["different"] == 0 and total["kills"] == len(plan.blows),
        "repairs": sum(said.repairs for said in texts),
        "replayed_tokens": sum(said.replayed_tokens for said in texts),
        "tokens_short_handed": sum(short_handed(said) for said in texts),
        "usual_seconds": usual,
        "errors": [said.error for said in texts if said.error],
        "kinds": {kind: kinds[kind] for kind in KINDS if kind in kinds},
        "blows": [row for row in rows if row["kind"]],
    }


def _kind_of(row: dict[str, Any]) -> str:
    return str(row["kind"])


def _rows(said: Said, usual: float) -> list[dict[str, Any]]:
    """A row for each blow; before them one without a kind, for what went wrong unprovoked."""
    rows: list[dict[str, Any]] = [{"kind": "", "lost": 0, "different": 0, "near_ties": 0}]
    for (blow, span), gap in zip(said.struck, gaps_of(said, usual), strict=True):
        place = {"text": blow.text, "position": blow.position, "span": span}
        counts = {"lost": 0, "different": 0, "near_ties": 0}
        rows.append({"kind": blow.kind, **place, "gap_seconds": gap, **counts})
    compared = compare(said.undisturbed, said.tokens)
    guilty = [row for row in rows if row.get("position", 0) <= compared.first][-1]
    guilty["different"], guilty["near_ties"] = compared.different, compared.near_ties
    rows[-1]["lost"] = compared.lost
    return rows


def _summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    gaps = [row["gap_seconds"] for row in rows if row["kind"]]
    return {
        "kills": len(gaps),
        "lost": sum(row["lost"] for row in rows),
        "different": sum(row["different"] for row in rows),
        "near_ties": sum(row["near_ties"] for row in rows),
        "gap_p50_seconds": percentile(gaps, 50),
        "gap_p99_seconds": percentile(gaps, 99),
        "gap_most_seconds": max(gaps, default=0.0),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest rank: the least value that so many percent do not exceed; 0 for none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)]
