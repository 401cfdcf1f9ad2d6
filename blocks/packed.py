"""Linear layers whose matrix lies as the CPU's matrix units read it.

On this layout a product of few rows reads the matrix at nearly the speed of memory, and one of many
is no slower than on the plain one. The plain layout costs a third more for one row, and twice as
much for four (`scripts/step_bench.py`).

1. A row's product is the same to the bit whatever rows are beside it, up to `ALIKE_ROWS` in all, as
   many as a joint pass has. Of more it is too, but for bfloat16 on CPUs with AMX: there it differs
   by the order of the sums. From the plain layout's it differs by rounding everywhere.
2. A matrix is held once: packed, or plain where other code looks at it. A tied head is packed
   beside the embedding if tokens are looked up here, else in its place.
3. Packing leaves room: it stops while a part of the memory that was free still is.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from blocks.carve import void
from blocks.hf.models import PreTrainedModel
from blocks.memory import ask_huge_pages, own_memory_bytes

# In a smaller matrix the call costs one session more than is won.
LEAST_VALUES = {torch.float32: 2**20, torch.bfloat16: 2**17}

# A tied head may take memory beside the embedding: smaller ones win too little by it. A step of 10
# blocks of 1024 is 1.2 times faster by it with 32,000 tokens (`scripts/step_bench.py`).
LEAST_TIED_VALUES = 2**24

# Of the memory that is free before packing, what caches, histories and steps may need.
KEPT_SHARE = 0.2

# With AMX the kernel adds up a row in pieces that depend on how many more than these there are; in
# groups of so many a prompt of 256 would take 2 to 6 times as long.
ALIKE_ROWS = 32

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


def packs_tied(values: int, dtype: torch.dtype) -> bool:
    """Is a tied head of so many values packed on this CPU, while memory lasts?"""
    return can_pack() and dtype in _kinds(LEAST_VALUES) and values >= LEAST_TIED_VALUES


def pack(
    model: nn.Module,
    *,
    looks_up: bool = True,
    least_values: Mapping[torch.dtype, int] = LEAST_VALUES,
    spare_bytes: Callable[[], int] = own_memory_bytes,
) -> int:
    """Pack the large matrices of a model's linear layers where they stand; return how many.

    What is left as it is: matrices of another dtype or of fewer values than `least_values` says, or
    that something else shares, or on another device; and what is left when no more than
    `KEPT_SHARE` of the `spare_bytes` of the start would stay. A head that shares its matrix with
    the embedding alone gets one of its own if `packs_tied`; the embedding goes unless the model
    `looks_up` tokens in it. Matrices that were pages of files become memory of the process.
    """
    if not can_pack():
        return 0
    kept = KEPT_SHARE * spare_bytes()
    packed = 0
    tied = _tied_head(model)
    for path in [*_packable(model, least_values), *tied]:
        if spare_bytes() - model.get_submodule(path).weight.nbytes < kept:
            break
        model.set_submodule(path, PackedLinear(model.get_submodule(path)))
        packed += 1
        if path in tied and not looks_up:
            embedding = model.get_input_embeddings()
            void(model, embedding)
            embedding.to("meta")  # what stands for it still answers by its sizes
    return packed


def _kinds(least_values: Mapping[torch.dtype, int]) -> set[torch.dtype]:
    """Those that this CPU has kernels for."""
    kinds = set(least_values)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.discard(torch.bfloat16)
    return kinds


def _packable(model: nn.Module, least_values: Mapping[torch.dtype, int]) -> Iterator[str]:
    """The paths of linear layers that can be packed, and are worth it."""
    sharers, kinds = _sharers(model), _kinds(least_values)
    for path, module in model.named_modules():
        if _is_plain(module, kinds):
            weight = module.weight
            is_large = weight.numel() >= least_values[weight.dtype]
            if is_large and len(sharers[weight.data_ptr()]) == 1:
                yield path


def _tied_head(model: nn.Module) -> list[str]:
    """The path of a head that has the embedding's matrix, if packing it is worth it."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None or not _is_plain(head, _kinds(LEAST_VALUES)):
        return []
    embedding, weight = model.get_input_embeddings(), head.weight
    sharing = _sharers(model)[weight.data_ptr()]
    is_theirs = len(sharing) == 2 and all(one is head or one is embedding for one in sharing)
    if not is_theirs or not packs_tied(weight.numel(), weight.dtype):
        return []
    return [path for path, module in model.named_modules() if module is head]


def _is_plain(module: nn.Module, kinds: set[torch.dtype]) -> bool:
    """Is this a linear layer on the CPU, of a kind that can be packed?"""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu":
        return False
    kind, bias = module.weight.dtype, module.bias
    return kind in kinds and (bias is None or bias.dtype == kind)


def _sharers(model: nn.Module) -> Mapping[int, list[nn.Module]]:
    """The modules that hold each weight, by its address."""
    found: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            found[weight.data_ptr()].append(module)
    return found
