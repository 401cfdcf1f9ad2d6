"""What goes into an executor and what comes out of it: messages, plain data.

1. Nothing here refers to a tensor of torch, so that the computing could move to another process.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from blocks.codec import Payload, RawTensor
from blocks.ends import CandidateWish


@dataclass(frozen=True, slots=True, kw_only=True)
class StepJob:
    """Run one step of a leg: positions from `start` on through the blocks `first:stop`.

    `key` names the leg, `client` whose it is (None: nobody else's); clients take turns. Its cache
    is made by its first step and keeps to the same blocks. The payload holds "ids" [B, S] or
    "hidden" [B, S, ...], with "hidden" what some families need beside it (see `blocks.sides`), and
    "mask" [B, start + S] if padded. `outputs` and `candidates` matter on a leg that ends at the
    last block only. `sequence_length`: how many positions the one forward has that the step is a
    part of, as a prompt's; 0, or less than it ends at: it is the last part.
    """

    key: Hashable
    serial: int
    start: int
    first: int
    stop: int
    payload: Payload
    outputs: Literal["none", "last", "all"] = "all"
    candidates: CandidateWish | None = None
    release: bool = False  # free the leg when the step is done
    client: Hashable = None
    sequence_length: int = 0


@dataclass(frozen=True, slots=True)
class ForkJob:
    """Let a leg that has had no step begin with the first `length` positions of another.

    Done before every job submitted later, and before those of other legs that wait; it costs next
    to nothing. Only if it fails a Done comes of it, of serial 0 and with an error: the leg then
    holds nothing.
    """

    key: Hashable
    of: Hashable
    length: int


@dataclass(frozen=True, slots=True)
class FreeJob:
    """Free a leg's cache at once; its steps that wait fail. Unknown legs are none's fault."""

    key: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of a StepJob.

    `output` is what the next hop or the client needs: between hops {"hidden"} and what its family
    needs beside it; from the last block {"tokens", "logits", "named", "left"} with candidates,
    {"hidden"} (before the final norm) without, {} where no output is wanted or the step failed.
    """

    key: Hashable
    serial: int
    output: dict[str, RawTensor] = field(default_factory=dict)
    seconds: float  # computing: the step's share of its passes
    waited: float  # from submit to the end, in seconds, but for the passes it was in
    length: int  # positions the leg holds now
    cache_bytes: int  # memory the leg takes now
    shortest_fork: int | None = (
        None  # the least length of a ForkJob of it; None if none is possible
    )
    run: "Pass | None" = None  # what it was computed in; told by the first step of it only
    error: str | None = None
    fault: bool = False  # the error is the sender's


@dataclass(frozen=True, slots=True)
class Pass:
    """One run through blocks, and perhaps the head; of a step in chunks, its runs as if one.

    `positions`: of all steps in it, each computed once; of a joint pass as many as its legs. So a
    pass of a few positions took what one position takes, whosever they are.
    """

    positions: int
    blocks: int
    has_head: bool
    seconds: float

    def __add__(self, other: "Pass") -> "Pass":
        """The two as one."""
        return Pass(
            self.positions + other.positions,
            max(self.blocks, other.blocks),
            self.has_head or other.has_head,
            self.seconds + other.seconds,
        )


def failed_fork(key: Hashable, error: str) -> Done:
    """What is told of a ForkJob that failed."""
    return Done(key=key, serial=0, seconds=0.0, waited=0.0, length=0, cache_bytes=0, error=error)
