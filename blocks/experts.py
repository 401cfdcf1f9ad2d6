"""The fused experts of a mixture, held in a form.

transformers fuses the experts of a block into stacks [experts, ., .], which bitsandbytes does not
quantize. Its families let other code compute them, and say in what shape they want it computed.

1. One expert is multiplied at a time: no more than its own matrix is ever unpacked.
2. Experts that no token chose are not touched.
3. Where a checkpoint holds experts one by one, they are quantized one by one: a stack of them all
   would take most of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blocks.formats import Form, Matrix

STACKS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, eq=False)
class Unstacked:
    """Matrices of the experts of a block as they were read: a stack [experts, ., .] not yet made.

    `parts` holds for each part of a matrix, top to bottom, that of every expert. ValueError if they
    would make no stack.
    """

    parts: Sequence[Sequence[torch.Tensor]]

    def __post_init__(self) -> None:
        counts = {len(part) for part in self.parts}
        shapes = [{one.shape for one in part} for part in self.parts]
        widths = {shape[1:] for found in shapes for shape in found}
        if len(counts) != 1 or len(widths) != 1 or any(len(found) != 1 for found in shapes):
            raise ValueError(f"{counts} experts with parts of the shapes {shapes} make no stack")

    @property
    def shape(self) -> torch.Size:
        """That of the stack."""
        height = sum(part[0].shape[0] for part in self.parts)
        return torch.Size((len(self.parts[0]), height, *self.parts[0][0].shape[1:]))

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.parts[0][0].device

    def __getitem__(self, number: int) -> torch.Tensor:
        """One expert's matrix [., .]."""
        parts = [part[number] for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stacked(self) -> torch.Tensor:
        """The stack, made."""
        return torch.stack([self[number] for number in range(self.shape[0])])


class QuantExperts:
    """Mixed into the class of a family's fused experts: their matrices are held in a form.

    `forms` tells the form of each quantized stack by its name, as "down_proj"; its parts are
    buffers "down_proj_codes" and so on, with the experts along the first axis.
    """

    forms: dict[str, Form]
    dtype: torch.dtype

    def forward(
        self, hidden: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Mix [tokens, hidden_size] of the experts [tokens, k] by shares [tokens, k]."""
        own: Any = self
        chosen = experts.reshape(-1)
        kept = shares.reshape(-1, 1)
        rows = torch.arange(len(chosen), device=chosen.device) // experts.shape[-1]
        outputs = hidden.new_zeros(len(chosen), hidden.shape[-1])
        pieces: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for number in chosen.unique().tolist():
            if number < own.num_experts:  # one more stands for «nobody»
                place = (chosen == number).nonzero()[:, 0]
                piece = self._expert(number, hidden[rows[place]]) * kept[place]
                pieces.append(piece.to(hidden.dtype))
                places.append(place)
        if pieces:
            outputs = outputs.index_copy(0, torch.cat(places), torch.cat(pieces))
        return outputs.view(*experts.shape, -1).sum(1)

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        own: Any = self
        if own.has_gate:
            inner = own._apply_gate(self._project("gate_up_proj", number, rows))
        else:
            inner = own.act_fn(self._project("up_proj", number, rows))
        product = self._project("down_proj", number, inner)
        return own.post_expert_norm(product) if own.has_post_expert_norm else product

    def _project(self, name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
        own: Any = self
        if name in self.forms:
            product = self.expert(name, number)(rows)
        else:
            weight = getattr(own, name)[number]
            product = rows @ (weight if own.is_transposed else weight.t())
        return product + getattr(own, f"{name}_bias")[number] if own.has_bias else product

    def expert(self, name: str, number: int) -> Matrix:
        """One expert's matrix [outputs, inputs] of a stack."""
        own: Any = self
        form = self.forms[name]
        return Matrix(form, {part: own._buffers[f"{name}_{part}"][number] for part in form.parts})

    def whole(self, name: str) -> torch.Tensor:
        """A stack as the family's class had it: for family code that looks into its layers."""
        own: Any = self
        count = own.num_experts
        stack = torch.stack([self.expert(name, one).whole(self.dtype) for one in range(count)])
        return stack.transpose(1, 2) if own.is_transposed else stack


def _stack_property(name: str) -> property:
    def read(self: Any) -> torch.Tensor:
        held = self._parameters.get(name)
        return held if held is not None else self.whole(name)

    return property(read)


def quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    """The family's class of experts with its matrices held in a form."""
    if issubclass(base, QuantExperts):
        return base
    stacks = {name: _stack_property(name) for name in STACKS}
    named = {"__module__": base.__module__, **stacks}
    return type(base.__name__, (QuantExperts, base), named)
