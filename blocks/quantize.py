"""Which format a span is held in, and its layers in that format.

1. Only matrices inside the blocks are quantized: linear layers and the experts of a mixture. The
   embedding, the head, norms, biases, routers and gates stay in the dtype of computing.
2. What a quantized layer holds, it holds as buffers with names: saved, moved and counted like any.
3. Family code that reads a `weight` gets the matrix as it is multiplied with, never its codes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from blocks.experts import STACKS, QuantExperts, Unstacked, quantized_class
from blocks.formats import Form, Kind, Matrix, form_of, quantize
from blocks.hf.models import Conv1D

Quant = Literal["none", "int8", "nf4"]
Wanted = Literal["auto", "none", "int8", "nf4"]

# what a span's caches, histories and steps need besides its weights
_WEIGHTS_SHARE = 0.8

# smaller shares are routers and gates
_WORTH_SAYING = 0.05

_NAMES: Mapping[Quant, str] = {"none": "no quantization", "int8": "int8", "nf4": "NF4"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A format, and one sentence for people that says what was chosen and why."""

    quant: Quant
    sentence: str


def choose_quant(
    wanted: Wanted,
    *,
    device_kind: str,
    free_bytes: int,
    span_bytes: Mapping[Quant, int],
    is_nf4_fast: bool = True,
) -> Choice:
    """Choose the format of a span: what is wanted, or for "auto" the most exact one that fits.

    `span_bytes` are the span's by format (`Sizes.span_bytes`), `free_bytes` the device's before
    loading. On other devices than a CPU, int8 is only taken when asked for: it is slow there. If
    nothing fits, the smallest is chosen, and the sentence says so: hold fewer blocks then.
    """
    if wanted != "auto":
        slow = " (slow here: this CPU has no kernel for it)"
        is_slow = wanted == "nf4" and device_kind == "cpu" and not is_nf4_fast
        return Choice(wanted, f"{_NAMES[wanted]}, as asked for{slow if is_slow else ''}")
    room = int(free_bytes * _WEIGHTS_SHARE)
    order: tuple[Quant, ...] = ("none", "int8", "nf4") if device_kind == "cpu" else ("none", "nf4")
    free = f"of {_gigabytes(free_bytes)} free on this {device_kind}"
    for quant in order:
        if span_bytes[quant] <= room:
            takes = f"{_NAMES[quant]}: the blocks take {_gigabytes(span_bytes[quant])} {free}"
            unfit = order[: order.index(quant)]
            less = ", ".join(f"{_NAMES[one]} {_gigabytes(span_bytes[one])}" for one in unfit)
            return Choice(quant, f"{takes} ({less} would not fit)" if less else takes)
    smallest = min(order, key=lambda one: span_bytes[one])
    return Choice(
        smallest,
        f"{_NAMES[smallest]}: even so the blocks take {_gigabytes(span_bytes[smallest])} {free}, "
        "so fewer blocks must be held",
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


class QuantLinear(nn.Linear):  # type: ignore[misc]  # torch is not followed
    """A linear layer whose matrix is held in a form; where it came from a Conv1D too."""

    def __init__(
        self,
        form: Form,
        dtype: torch.dtype,
        parts: Mapping[str, torch.Tensor],
        bias: nn.Parameter | None,
    ) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = form.inputs, form.outputs
        self.form, self.dtype = form, dtype
        for name in form.parts:
            self.register_buffer(name, parts[name])
        self.register_parameter("bias", bias)
        self._is_hf_initialized = True  # or the loader would draw it at random

    @property
    def matrix(self) -> Matrix:
        """The matrix as it is held now (a move to a device replaces the buffers)."""
        return Matrix(self.form, self._buffers)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [outputs, inputs], made anew: for family code that looks into its layers."""
        return self.matrix.whole(self.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As Linear's."""
        product = self.matrix(inputs)
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter that will be held in a form, once or for each of some experts."""

    owner: str  # the module's path from where it was looked for
    name: str  # of the parameter
    form: Form
    experts: int | None  # None for a linear layer
    is_transposed: bool  # held by the model as [inputs, outputs]

    @property
    def path(self) -> str:
        """The parameter's path."""
        return f"{self.owner}.{self.name}" if self.owner else self.name

    @property
    def byte_count(self) -> int:
        """Bytes once quantized."""
        return self.form.byte_count * (1 if self.experts is None else self.experts)


def targets(
    layers: nn.Module, kind: Kind, *, device: str, kept: tuple[str, ...] = (), prefix: str = ""
) -> list[Target]:
    """The parameters of unquantized layers that `kind` will hold, by their shapes alone.

    Paths that contain one of `kept`, as "wo" or "mlp.gate", are left as they are.
    """
    return [
        target
        for owner, module in layers.named_modules(prefix=prefix)
        for target in _targets_of(owner, module, kind, device)
        if not any(f".{words}." in f".{target.path}." for words in kept)
    ]


def _targets_of(owner: str, module: nn.Module, kind: Kind, device: str) -> Iterator[Target]:
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        weight, is_transposed = module.weight, isinstance(module, Conv1D)
        outputs, inputs = reversed(weight.shape) if is_transposed else weight.shape
        form = form_of(kind, outputs, inputs, device=device)
        if form:
            yield Target(owner, "weight", form, None, is_transposed)
    elif hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        # fused experts that let other code compute them: `use_experts_implementation`
        for name in STACKS:
            stack = module._parameters.get(name)
            if stack is not None and stack.dim() == 3:
                outputs, inputs = stack.shape[1:]
                if module.is_transposed:
                    outputs, inputs = inputs, outputs
                form = form_of(kind, outputs, inputs, device=device)
                if form:
                    yield Target(owner, name, form, len(stack), module.is_transposed)


def hold(
    model: nn.Module,
    target: Target,
    dtype: torch.dtype,
    weight: torch.Tensor | Unstacked | None = None,
) -> None:
    """Put a quantized layer in the place of the target's; without a `weight`, an empty one on meta.

    The weight has the shape that the model called for.
    """
    module = model.get_submodule(target.owner)
    parts = _parts(target, weight)
    if target.experts is None:
        model.set_submodule(target.owner, QuantLinear(target.form, dtype, parts, module.bias))
        return
    del module._parameters[target.name]
    module.__class__ = quantized_class(type(module))
    # not through setattr: the module would take them for its own settings
    module.__dict__.setdefault("forms", {})[target.name] = target.form
    module.__dict__.update(dtype=dtype, _is_hf_initialized=True)
    for part, tensor in parts.items():
        module.register_buffer(f"{target.name}_{part}", tensor)


def shortfall(
    layers: nn.Module, found: list[Target], *, is_nf4_fast: bool, prefix: str = ""
) -> str | None:
    """One sentence on what of some unquantized layers cannot be held or run as one would expect.

    `found` are their targets. None if nothing is worth saying.
    """
    taken = {target.path for target in found}
    left = {
        name: weight
        for name, weight in layers.named_parameters(prefix=prefix)
        if name not in taken and weight.dim() > 1
    }
    share = sum(one.numel() for one in left.values()) / _values(layers)
    if share > _WORTH_SAYING:
        largest = max(left, key=lambda name: left[name].numel())
        return (
            f"{share:.0%} of the weights of these blocks cannot be quantized and stay as they are; "
            f"the largest is {largest} {list(left[largest].shape)}"
        )
    slow = [one for one in found if one.form.kind == "nf4" and not one.form.is_packed]
    if slow and is_nf4_fast:
        form = slow[0].form
        return (
            f"{len(slow)} of {len(found)} matrices have sizes that this CPU's NF4 kernel does not "
            f"take (as {slow[0].path}, {form.outputs} x {form.inputs}): they are held in NF4 all "
            "the same, and multiplied slowly"
        )
    return None


def _values(layers: nn.Module) -> int:
    return sum(weight.numel() for weight in layers.parameters()) or 1


def held_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that all quantized layers of a model hold, by their names in the model."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            names = list(module.form.parts)
        elif isinstance(module, QuantExperts):
            names = [f"{name}_{part}" for name, form in module.forms.items() for part in form.parts]
        else:
            continue
        found.update({f"{path}.{name}": module._buffers[name] for name in names})
    return found


def _parts(target: Target, weight: torch.Tensor | Unstacked | None) -> dict[str, torch.Tensor]:
    form, count = target.form, target.experts
    if weight is None:
        lead = () if count is None else (count,)
        return {
            part: torch.empty((*lead, *shape), dtype=dtype, device="meta")
            for part, (shape, dtype) in form.parts.items()
        }
    if count is None:
        whole = cast(torch.Tensor, weight)
        return quantize(whole.t() if target.is_transposed else whole, form)
    stacks = {
        part: torch.empty((count, *shape), dtype=dtype, device=weight.device)
        for part, (shape, dtype) in form.parts.items()
    }
    for number in range(count):
        one = weight[number]
        for part, tensor in quantize(one.t() if target.is_transposed else one, form).items():
            stacks[part][number] = tensor
    return stacks
