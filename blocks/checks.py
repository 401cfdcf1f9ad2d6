"""Whether a step is one that a stack can compute, looked at before anything is.

1. A StepError has changed nothing: it is the sender's, whatever the stack.
"""

from typing import Protocol

import torch

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError

_INTEGERS = (torch.int32, torch.int64)


class Checking(Protocol):
    """What of a stack decides what it takes."""

    start: int
    stop: int
    blocks: int
    holds_embedding: bool
    holds_head: bool
    hidden_size: int
    hidden_tail: tuple[int, ...]  # of hidden states behind rows and positions; empty: any
    vocabulary_size: int
    context_length: int


def check_step(
    stack: Checking,
    inputs: torch.Tensor,
    cache: StackCache | None,
    start: int,
    logits_for: int | None,
) -> None:
    """StepError unless the stack can go on from `start`, where the cache ends, with these inputs.

    BlocksError for a cache of other blocks.
    """
    _check_inputs(stack, inputs)
    tokens = inputs.shape[1]
    if logits_for is not None and not (stack.holds_head and 0 <= logits_for <= tokens):
        raise StepError(
            f"blocks {stack.start}:{stack.stop} of {stack.blocks} cannot give the logits of the "
            f"last {logits_for} of {tokens} positions"
        )
    held = 0 if cache is None else cache.length
    if start != held:
        raise StepError(f"the step starts at position {start}, but {held} are held")
    if start + tokens > stack.context_length:
        raise StepError(f"position {start + tokens} is beyond the context of the model")
    if cache is not None:
        if (cache.start, cache.stop) != (stack.start, stack.stop):
            raise BlocksError(f"a cache of blocks {cache.start}:{cache.stop} does not fit here")
        if cache.rows not in (None, inputs.shape[0]):
            raise StepError(f"{inputs.shape[0]} rows follow a past of {cache.rows} rows")


def check_range(ids: torch.Tensor, vocabulary_size: int) -> None:
    """StepError unless all ids are of the vocabulary: a GPU would abort the process, not raise."""
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary_size:
        raise StepError(f"ids must be below the vocabulary's {vocabulary_size}")


def _check_inputs(stack: Checking, inputs: torch.Tensor) -> None:
    if inputs.dim() < 2 or 0 in inputs.shape:
        raise StepError(f"inputs need rows and positions, not shape {tuple(inputs.shape)}")
    if inputs.is_floating_point():
        tail = stack.hidden_tail
        fits = tuple(inputs.shape[2:]) == tail if tail else inputs.dim() > 2
        if not fits or inputs.shape[-1] != stack.hidden_size:
            raise StepError(
                f"hidden states end in an axis of {stack.hidden_size}, not in shape "
                f"{tuple(inputs.shape)}"
            )
        return
    if not stack.holds_embedding:
        raise StepError(f"blocks {stack.start}:{stack.stop} take hidden states, not ids")
    if inputs.dtype not in _INTEGERS or inputs.dim() != 2:
        raise StepError(f"ids are int32 or int64 [rows, positions], not {inputs.dtype}")
    check_range(inputs, stack.vocabulary_size)
