"""Steps on their way through the executor: cut into chunks, and put together again.

A pass cannot be interrupted, so a long step would hold up all others for as long as it takes. Cut
into chunks it lets them in between: a chunk is a step to the queue, and to the stack.

1. The chunks of a step follow each other, and are all of it; none has more than `Bounds` allows.
2. What a step gives is what it would give in one piece, once, with its last chunk.
3. A padded step stays whole where layers are recurrent: these read no mask but that of a beginning.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import cast

import torch

from blocks.backlog import bytes_of
from blocks.batching import Service, Shape
from blocks.codec import RawTensor, to_raw
from blocks.jobs import Pass, StepJob
from blocks.legs import is_recurrent
from blocks.payloads import Tensors, cut, extent, layout, tensors
from blocks.stack import Stack

# Positions that cost a pass hardly more than one does: what a draft asks to verify.
MOST_SHORT = 8

Output = dict[str, torch.Tensor]  # what some positions of a step come to
CANDIDATES = ("tokens", "logits", "named", "left")  # of these the first axis is the positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much an executor takes into a pass, and how much may wait for one."""

    # Nearly all that a larger chunk could save is saved, and half the wait of 512 for the others:
    # `scripts/queue_bench.py chunks`. Replays share passes up to as many.
    chunk_positions: int = 256
    # Enough to share the reading of the weights, few enough that a pass of long pasts does not
    # become a wait for everyone.
    joint_legs: int = 32
    # The logits of all positions of a pass lie in memory at once.
    logit_bytes: int = 64 << 20
    # A link's credit and a frame beyond it are 48 MiB, and a leg may hear several links one after
    # the other; a replay of 100,000 steps of one position fits in.
    leg_waiting_bytes: int = 256 << 20
    waiting_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if min(self.chunk_positions, self.joint_legs) < 1:
            raise ValueError("a pass has at least one position")


class Step:
    """A StepJob since it came, and what its chunks have come to so far."""

    def __init__(self, job: StepJob) -> None:
        self.job = job
        self.byte_count = bytes_of(job.payload)
        self.seconds = 0.0  # its share of its passes
        self.run: Pass | None = None  # the passes that it was the first in
        self.is_over = False
        self._at = time.perf_counter()
        self._in_passes = 0.0
        self._tensors: Tensors | None = None
        self._outputs: list[Output] = []

    def tensors(self, needs: Sequence[str]) -> Tensors:
        """What the payload holds, read once. StepError if that does not add up."""
        if self._tensors is None:
            self._tensors = tensors(self.job.payload, needs)
        return self._tensors

    def was_in(self, seconds: float, steps: int, run: Pass | None) -> None:
        """Note a pass that took so long, of so many steps; `run` if this is to tell of it."""
        self.seconds += seconds / steps
        self._in_passes += seconds
        if run is not None:
            self.run = run if self.run is None else self.run + run

    @property
    def sequence_length(self) -> int:
        """How many positions the one forward has that it is a part of."""
        return max(self.job.sequence_length, self.job.start + extent(self.job.payload)[1])

    @property
    def waited(self) -> float:
        """Seconds since it came that it was in no pass."""
        return max(0.0, time.perf_counter() - self._at - self._in_passes)

    def put(self, output: Output) -> None:
        """Take what its next chunk came to."""
        self._outputs.append(output)

    def output(self) -> dict[str, RawTensor]:
        """What all chunks together came to."""
        outputs = [output for output in self._outputs if output]
        if not outputs:
            return {}
        return {
            name: to_raw(_as_one([output[name] for output in outputs], int(name not in CANDIDATES)))
            for name in outputs[0]
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring positions of a step, computed in one pass: of most steps all."""

    step: Step
    offset: int
    is_last: bool
    shape: Shape

    @property
    def key(self) -> Hashable:
        """The leg."""
        return self.step.job.key

    @property
    def client(self) -> Hashable:
        """Whose leg it is: nobody else's where that was not told."""
        client = self.step.job.client
        return ("leg", self.key) if client is None else client

    @property
    def is_whole(self) -> bool:
        """True if it is all of its step."""
        return self.is_last and not self.offset

    def tensors(self, needs: Sequence[str]) -> Tensors:
        """Its part of what the payload holds. StepError if that does not add up."""
        whole = self.step.tensors(needs)
        if self.is_whole:
            return whole
        return cut(whole, self.offset, self.shape.positions, self.step.job.start)


@dataclass(frozen=True, slots=True)
class Errand:
    """Work that takes no pass, in its turn among the steps of a leg."""

    key: Hashable
    work: Callable[[], object]
    client: Hashable = None
    shape: None = None


class Cutter:
    """Cuts the steps of one stack's legs into chunks."""

    def __init__(self, stack: Stack, bounds: Bounds) -> None:
        self._bounds = bounds
        self._blocks = stack.blocks
        self._regime = stack.regime
        self._most_logits = max(1, bounds.logit_bytes // (4 * stack.vocabulary_size))
        self._keeps_padded = is_recurrent(stack)

    def chunks(self, step: Step) -> list[Chunk]:
        """The chunks of a step, of nearly equal length. Reads no bytes, never fails."""
        job = step.job
        rows, positions = extent(job.payload)
        most = of_run = self._bounds.chunk_positions
        if job.stop == self._blocks and job.candidates is not None and job.outputs != "none":
            of_run = min(most, self._most_logits)  # of each step in it some logits
            most = of_run if job.outputs == "all" else most
        is_padded = "mask" in job.payload
        stays_whole = not positions or (is_padded and self._keeps_padded)
        count = 1 if stays_whole else ceil(positions / most)
        ends = [positions * number // count for number in range(count + 1)]
        kind: Hashable = None
        if not (job.release or is_padded) and positions:
            layouts = layout(job.payload)
            regime = self._regime(step.sequence_length)
            kind = (job.first, job.stop, job.outputs, job.candidates is None, regime, *layouts)
        is_decode = (rows, positions) == (1, 1) and kind is not None
        service = Service.DECODE if positions <= MOST_SHORT else Service.FILL
        return [
            Chunk(
                step,
                start,
                end == positions,
                Shape(job.start + start, end - start, kind, of_run, is_decode, service),
            )
            for start, end in pairwise(ends)
        ]


def _as_one(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Parts that follow each other along an axis."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    if parts[0].dim() > 2 and any(part.shape[-1] < width for part in parts):
        # the choices of an indexer, fewer where there were fewer positions: the first once more
        parts = [
            torch.cat([part, part[..., :1].expand(*part.shape[:-1], width - part.shape[-1])], -1)
            for part in parts
        ]
    return cast(torch.Tensor, torch.cat(list(parts), axis))
