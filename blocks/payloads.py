"""Payloads as a stack takes them, and how much there is to one before anybody makes tensors of it.

1. What a payload claims of itself (`extent`, `layout`) is read without its bytes and never fails;
   `tensors` is a StepError for what does not add up.
"""

from collections.abc import Hashable, Sequence

import torch

from blocks.codec import Payload, from_raw
from blocks.errors import StepError
from blocks.sides import Sides

# Inputs [B, S] or [B, S, ...], the mask if there is one, and what is needed beside hidden states.
Tensors = tuple[torch.Tensor, torch.Tensor | None, Sides]


def extent(payload: Payload) -> tuple[int, int]:
    """Rows and positions of what a step computes, (0, 0) if that cannot be told."""
    raw = payload.get("hidden") or payload.get("ids")
    if raw is None or len(raw[1]) < 2:
        return 0, 0
    return raw[1][0], raw[1][1]


def layout(payload: Payload) -> Sequence[Hashable]:
    """What must be equal in payloads that are put together: names, dtypes, rows, further axes."""
    return sorted((name, raw[0], raw[1][:1], raw[1][2:]) for name, raw in payload.items())


def tensors(payload: Payload, needs: Sequence[str]) -> Tensors:
    """Ids or hidden states, the mask if there is one, and what is needed beside hidden states."""
    has_hidden = "hidden" in payload
    if has_hidden == ("ids" in payload) and not (has_hidden and "ids" in needs):
        raise StepError('a payload holds either "ids" or "hidden"')
    name = "hidden" if has_hidden else "ids"
    inputs = from_raw(payload[name])
    if inputs.is_floating_point() != has_hidden:
        raise StepError(f"{name} cannot be {inputs.dtype}")
    mask = from_raw(payload["mask"]) if "mask" in payload else None
    beside = [one for one in needs if has_hidden and one in payload]
    return inputs, mask, {one: from_raw(payload[one]) for one in beside}


def as_one(parts: Sequence[Tensors]) -> Tensors:
    """The inputs of unpadded steps that follow each other, as those of one."""
    if len(parts) == 1:
        return parts[0]
    sides = {name: torch.cat([beside[name] for _, _, beside in parts], 1) for name in parts[0][2]}
    return torch.cat([inputs for inputs, _, _ in parts], 1), None, sides


def cut(whole: Tensors, offset: int, positions: int, start: int) -> Tensors:
    """So many positions from `offset` on of a step from `start` on. StepError if they differ.

    The mask is cut to the past of these, the step's own positions before them included.
    """
    inputs, mask, sides = whole
    extents = {tuple(one.shape[:2]) for one in (inputs, *sides.values())}
    if len(extents) > 1:
        raise StepError(f"the parts of a payload have one number of positions, not {extents}")
    past = start + inputs.shape[1]
    if mask is not None and (mask.dim() != 2 or mask.shape[1] != past):
        raise StepError(f"a mask of {past} positions cannot have shape {tuple(mask.shape)}")
    end = offset + positions
    return (
        inputs[:, offset:end],
        None if mask is None else mask[:, : start + end],
        {name: side[:, offset:end] for name, side in sides.items()},
    )
