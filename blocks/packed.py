"""Linear layers whose matrix lies as the CPU's matrix units read it.

On this layout a product of few rows reads the matrix at nearly the speed of memory, and one of many
is no slower than on the plain one. The plain layout costs a third more for one row, and twice as
much for four (`scripts/step_bench.py`).

1. A row's product is the same to the bit whatever rows are beside it, but differs from the plain
   layout's by rounding.
2. A matrix is held once: packed, or plain where other code looks at it.
3. Packing leaves room: it stops while a part of the memory that was free still is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from blocks.memory import ask_huge_pages, own_memory_bytes

# In a smaller matrix the call costs one session more than is won.
LEAST_VALUES = {torch.float32: 2**20, torch.bfloat16: 2**18}

# Of the memory that is free before packing, what caches, histories and steps may need.
KEPT_SHARE = 0.2

# The layout is chosen for so many rows; it is as good for one as any, and better for many.
_TYPICAL_ROWS = 16

# The kernel of four rows takes less time than that of one or two.
_COPIES = {1: 4, 2: 2}


class PackedLinear(nn.Linear):  # type: ignore[misc]  # torch is not followed
    """A linear layer whose packed matrix takes the place of its weight."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", plain.bias)
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            plain.weight.detach(), _TYPICAL_ROWS
        )
        ask_huge_pages(torch.ops.mkldnn.data_ptr(self._packed), plain.weight.nbytes)

    @property
    def weight(self) -> nn.Parameter:
        """The matrix [outputs, inputs]. Who looks at it will again: from now on it is held so."""
        with torch.inference_mode(False):
            weight = nn.Parameter(self._whole(), requires_grad=False)
        del self._packed
        self.__class__ = nn.Linear
        self.register_parameter("weight", weight)
        return weight

    @property
    def byte_count(self) -> int:
        """Bytes of the matrix, but for what pads its sides to the kernel's."""
        return int(self._packed.numel() * self._packed.element_size())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """As Linear's; only inputs have gradients."""
        rows = inputs.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and inputs.requires_grad:
            product = cast(torch.Tensor, _Product.apply(rows, self))
        else:
            product = self.product(rows)
        return product.view(*inputs.shape[:-1], self.out_features)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [n, inputs] times the matrix, plus the bias: [n, outputs]."""
        count = rows.shape[0]
        if (copies := _COPIES.get(count)) is not None:
            rows = torch.cat([rows] * copies)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            rows, self._packed, self.bias, "none", [], ""
        )
        return product[:count]

    def _whole(self) -> torch.Tensor:
        return self._packed.to_dense()


class _Product(torch.autograd.Function):  # type: ignore[misc]  # as above
    """The product with its gradient in the rows: the kernel has none."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer._whole(), None


def can_pack() -> bool:
    """Is this a machine where it has been seen to pay?"""
    return bool(
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def pack(
    model: nn.Module,
    *,
    least_values: Mapping[torch.dtype, int] = LEAST_VALUES,
    spare_bytes: Callable[[], int] = own_memory_bytes,
) -> int:
    """Pack the large matrices of a model's linear layers where they stand; return how many.

    What is left as it is: matrices of another dtype or of fewer values than `least_values` says, or
    that something else shares (a tied head), or on another device; and what is left when no more
    than `KEPT_SHARE` of the `spare_bytes` of the start would stay. Matrices that were pages of
    files become memory of the process.
    """
    if not can_pack():
        return 0
    kept = KEPT_SHARE * spare_bytes()
    packed = 0
    for path in list(_packable(model, least_values)):
        if spare_bytes() - model.get_submodule(path).weight.nbytes < kept:
            break
        model.set_submodule(path, PackedLinear(model.get_submodule(path)))
        packed += 1
    return packed


def _packable(model: nn.Module, least_values: Mapping[torch.dtype, int]) -> Iterator[str]:
    """The paths of linear layers that can be packed, and are worth it."""
    shared = Counter(
        weight.data_ptr() for _, weight in model.named_parameters(remove_duplicate=False)
    )
    kinds = set(least_values)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.discard(torch.bfloat16)
    for path, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        weight, bias = module.weight, module.bias
        if (
            weight.dtype in kinds
            and weight.device.type == "cpu"
            and weight.numel() >= least_values[weight.dtype]
            and shared[weight.data_ptr()] == 1
            and (bias is None or bias.dtype == weight.dtype)
        ):
            yield path
