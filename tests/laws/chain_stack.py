"""A stack that computes hashes in place of layers, so that every right output is known.

1. A block's output at a position depends on every input of that block up to there.
2. How positions are cut into steps does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np

from swarm.chain import Payload
from swarm.messages import Step
from swarm.wire import Buffer, Tensor

VOCABULARY = 97


@dataclass(frozen=True, slots=True)
class Values:
    """The data of a tensor: numbers that weigh on credit as much as the scenario says."""

    numbers: tuple[int, ...]
    size: int

    def __len__(self) -> int:
        return self.size


def payload_of(name: str, numbers: Sequence[int], weight: int) -> Payload:
    """One tensor [1, S] whose every position counts as `weight` bytes; with 8 they are real."""
    if weight == 8:
        return {name: Tensor("int64", (1, len(numbers)), np.asarray(numbers, "<i8").tobytes())}
    values = Values(tuple(numbers), weight * len(numbers))
    return {name: Tensor("int64", (1, len(numbers)), cast(Buffer, values))}


def numbers_of(payload: Payload) -> tuple[int, ...]:
    """The numbers in a payload's only tensor."""
    (tensor,) = payload.values()
    if isinstance(tensor.data, bytes | memoryview):
        return tuple(np.frombuffer(tensor.data, "<i8").tolist())
    return cast(Values, cast(Any, tensor.data)).numbers


@cache
def truth(block: int, ids: tuple[int, ...]) -> int:
    """The output of a block at the last of these ids; of block -1, the id itself."""
    return ids[-1] if block < 0 else hash((1, _state(block, ids)))


@cache
def _state(block: int, ids: tuple[int, ...]) -> int:
    before = _state(block, ids[:-1]) if len(ids) > 1 else 0
    return hash((block, before, truth(block - 1, ids)))


@cache
def reference(prompt: tuple[int, ...], tokens: int, blocks: int) -> tuple[int, ...]:
    """The prompt and what must follow it."""
    ids = prompt
    for _ in range(tokens):
        ids = (*ids, truth(blocks - 1, ids) % VOCABULARY)
    return ids


class Stack:
    """The cache of one leg: for each block a state per position."""

    def __init__(self, span: str) -> None:
        start, stop = map(int, span.split(":"))
        self.blocks = range(start, stop)
        self.states: list[list[int]] = [[] for _ in self.blocks]

    def fork(self, length: int) -> "Stack":
        """Another that begins with the first positions of this one."""
        other = Stack(f"{self.blocks.start}:{self.blocks.stop}")
        if length > len(self.states[0]):
            raise AssertionError("a fork of more than there is")
        other.states = [states[:length] for states in self.states]
        return other

    def run(self, step: Step) -> tuple[int, ...]:
        """Roll back to the step's start and compute its positions."""
        if step.start > len(self.states[0]):
            raise AssertionError("a step starts above the length of the cache")
        for states in self.states:
            del states[step.start :]
        outputs = []
        for number in numbers_of(step.payload):
            for block, states in zip(self.blocks, self.states, strict=True):
                states.append(hash((block, states[-1] if states else 0, number)))
                number = hash((1, states[-1]))
            outputs.append(number)
        return tuple(outputs)
