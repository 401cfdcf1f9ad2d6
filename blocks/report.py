"""What the trial of a family found, as plain values: neither torch nor transformers is needed.

1. A check holds, fails, or is not offered, which is only what the code refuses for the family.
2. `is_exact` is about everything a family is offered for, `is_serving` about what every session
   needs: ids to logits, chunked prefill and cached decode, sessions that do not mix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SERVING = ("forward", "decode", "chunked", "interleaved")
FURTHER = ("batch", "gradient", "joined", "rollback")
CHECKS = SERVING + FURTHER

# The most by which a result may differ from the whole model's: threaded sums of experts differ in
# the last bits from one run of transformers itself to the next.
EXACT = 5e-7

# A batch of several sessions is another size of product, and a gradient sums in another order: in
# float32 this much of the largest value is rounding, and no two ways of computing agree better.
ROUNDING = 2e-5
_ROUNDED = ("gradient", "joined")

Outcome = Literal["holds", "fails", "not offered"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing compared. `difference` is the largest, None if nothing could be compared.

    That of `gradient` and `joined` is a part of the largest value, the others are as they are.
    """

    name: str
    outcome: Outcome
    difference: float | None = None
    note: str = ""  # why it fails or is not offered, or what else is to be known

    def __post_init__(self) -> None:
        if self.name not in CHECKS:
            raise ValueError(f"there is no check {self.name}")

    def as_json(self) -> dict[str, Any]:
        """The check as JSON holds it; `check_of` reads it back."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "difference": self.difference,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Takes:
    """What the family's forwards take, as `blocks.hf.forwards.takes_of` writes it."""

    text: str


def check_of(facts: Mapping[str, Any]) -> Check:
    """The check that `as_json` told."""
    return Check(facts["name"], facts["outcome"], facts["difference"], facts["note"])


@dataclass(frozen=True, slots=True)
class Family:
    """All that was found of one model type. `trouble` is what ended its trial early, if any did.

    `takes`: see `Takes`; empty where it could not be cut.
    """

    model_type: str
    checks: tuple[Check, ...] = ()
    trouble: str = ""
    takes: str = ""

    def holds(self, name: str) -> bool:
        """Was this check made, and did it hold?"""
        return any(check.name == name and check.outcome == "holds" for check in self.checks)

    @property
    def is_serving(self) -> bool:
        """Does everything hold that a session needs?"""
        return all(self.holds(name) for name in SERVING)

    @property
    def is_exact(self) -> bool:
        """Does everything hold that the family is offered for?"""
        judged = {check.name for check in self.checks if check.outcome != "fails"}
        return self.is_serving and judged == set(CHECKS)

    @property
    def max_difference(self) -> float | None:
        """The largest difference of all checks; None if none could be made."""
        return max((c.difference for c in self.checks if c.difference is not None), default=None)

    @property
    def reason(self) -> str:
        """Why it is not exact; empty if it is."""
        failed = _told([check for check in self.checks if check.outcome == "fails"])
        return "; ".join([*failed, *([self.trouble] if self.trouble else [])])

    @property
    def notes(self) -> str:
        """What is to be known of checks that hold or are not offered."""
        return "; ".join(_told([c for c in self.checks if c.note and c.outcome != "fails"]))

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        return {
            "model_type": self.model_type,
            "exact": self.is_exact,
            "serving": self.is_serving,
            "max_difference": self.max_difference,
            "reason": self.reason,
            "notes": self.notes,
            "checks": [check.as_json() for check in self.checks],
        }


def _told(checks: Sequence[Check]) -> list[str]:
    """The notes of checks, each once, with the names of all checks that share it."""
    names: dict[str, list[str]] = {}
    for check in checks:
        names.setdefault(check.note, []).append(check.name)
    return [f"{', '.join(those)}: {note}" for note, those in names.items()]


def counts(families: Sequence[Family]) -> dict[str, int]:
    """How many are exact, serving, and hold each of the checks."""
    found = {
        "families": len(families),
        "exact": sum(family.is_exact for family in families),
        "serving": sum(family.is_serving for family in families),
    }
    return found | {name: sum(family.holds(name) for family in families) for name in CHECKS}


def outcome_of(name: str, difference: float) -> Outcome:
    """Is the difference that a check found small enough? Not a number is not."""
    return "holds" if difference < (ROUNDING if name in _ROUNDED else EXACT) else "fails"
