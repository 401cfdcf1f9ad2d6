"""How one matrix is held in 8 or 4 bits, multiplied with and made whole again.

int8: a scale per row, codes -127 to 127. NF4: a scale per 64 values, its scales quantized again
(double quantization); codes and scales are those of bitsandbytes to the bit.

1. What is held never changes after it was made: not by running, not by saving, not by gradients.
   (bitsandbytes' own modules repack their weights at the first step and lose the gradient by it.)
2. A `Form` alone tells every part's shape and dtype, so bytes are known before anything is loaded.
3. Activations stay as they are: only weights are quantized, so that one outlier harms nothing.
4. bitsandbytes is imported by the first use of NF4 or of 8-bit codes, silently, by nothing else.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch.nn.functional import linear

from blocks.direct import packed_product

Kind = Literal["int8", "nf4"]
Parts = Mapping[str, torch.Tensor]

_GROUP = 64  # values that share a scale in NF4
_NEST = 256  # scales that share a step, of bitsandbytes' double quantization

# bitsandbytes' kernel for AVX512-BF16 takes the rows in tiles of two halves
_TILE_ROWS = 32
_HALF_ROWS = _TILE_ROWS // 2

# of the paper (QLoRA, appendix E)
_NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# below these a matrix is a router or a gate: little to save, much to lose
_FEWEST_OUTPUTS = 32
_FEWEST_INPUTS = 64

# float temporaries of this many values stay in the cache of a core
_CHUNK_VALUES = 2**18

# more rows than this and a cast of the whole matrix costs less than torch's int8 kernel
_INT8_KERNEL_ROWS = 8

# from here unpacking the matrix once costs less than the slower rows of the packed kernel
_PACKED_KERNEL_ROWS = 256


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix [outputs, inputs] is held; `is_packed` is the fast kernel's layout of NF4."""

    kind: Kind
    outputs: int
    inputs: int
    is_packed: bool = False

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that holds the matrix, by name."""
        rows, columns = self.outputs, self.inputs
        if self.kind == "int8":
            return {
                "codes": ((rows, columns), torch.int8),
                "scales": ((rows,), torch.float32),
            }
        if self.is_packed:
            return {
                "codes": ((rows, columns // 2), torch.uint8),
                "scales": ((columns // _GROUP, rows), torch.bfloat16),
            }
        groups = rows * columns // _GROUP
        return {
            "codes": ((rows * columns // 2,), torch.uint8),
            "scales": ((groups,), torch.uint8),
            "steps": ((math.ceil(groups / _NEST),), torch.float32),
            "offset": ((), torch.float32),
        }

    @property
    def byte_count(self) -> int:
        """Bytes of all parts."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parts.values()
        )


def form_of(kind: Kind, outputs: int, inputs: int, *, device: str) -> Form | None:
    """How a matrix of this size is held on the device; None if it is better left as it is."""
    is_small = outputs < _FEWEST_OUTPUTS or inputs < _FEWEST_INPUTS
    if is_small or inputs % 2 or outputs * inputs % _GROUP:
        return None
    is_packed = (
        kind == "nf4"
        and torch.device(device).type == "cpu"
        and outputs % _TILE_ROWS == 0
        and inputs % _GROUP == 0
        and is_nf4_fast()
    )
    return Form(kind, outputs, inputs, is_packed)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A held matrix: its form and the tensors that `Form.parts` names."""

    form: Form
    parts: Parts

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs` [..., form.inputs] times the matrix [..., form.outputs], same dtype.

        Gradients flow to the inputs and never to the matrix.
        """
        if torch.is_grad_enabled() and inputs.requires_grad:
            return cast(torch.Tensor, _Multiply.apply(inputs, self))
        return self.multiply(inputs)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """The product, invisible to autograd."""
        rows = inputs.reshape(-1, self.form.inputs).contiguous()
        if not len(rows):
            product = rows.new_empty(0, self.form.outputs)
        elif self.form.kind == "int8":
            product = self._multiply_int8(rows)
        elif self.form.is_packed:
            product = self._multiply_packed(rows)
        elif rows.device.type == "cpu":
            product = linear(rows, self.whole(rows.dtype))
        else:
            codes = self.parts["codes"].view(-1, 1)
            product = _bitsandbytes().matmul_4bit(rows, codes, quant_state=self._state(rows.dtype))
        return product.view(*inputs.shape[:-1], self.form.outputs)

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [outputs, inputs] in `dtype`, made anew with every call."""
        if self.form.kind == "int8":
            return self.parts["codes"].to(dtype) * self.parts["scales"].to(dtype)[:, None]
        codes = self.parts["codes"]
        if self.form.is_packed:
            codes = _unpacked(codes)
        state = self._state(dtype)
        if self.form.is_packed:
            state.absmax = state.absmax.t().float().reshape(-1)
        # the AVX512 kernel takes wrong scales where rows are no whole groups
        state.shape = torch.Size((self.form.outputs * self.form.inputs // _GROUP, _GROUP))
        whole = _bitsandbytes().functional.dequantize_4bit(codes.reshape(-1, 1), state)
        return cast(torch.Tensor, whole.view(self.form.outputs, self.form.inputs))

    def _multiply_int8(self, rows: torch.Tensor) -> torch.Tensor:
        codes, scales = self.parts["codes"], self.parts["scales"].to(rows.dtype)
        if rows.device.type == "cpu" and len(rows) <= _INT8_KERNEL_ROWS:
            return torch._weight_int8pack_mm(rows, codes, scales)
        return linear(rows, codes.to(rows.dtype)) * scales

    def _multiply_packed(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) >= _PACKED_KERNEL_ROWS:
            return linear(rows, self.whole(rows.dtype))
        codes, scales = self.parts["codes"], self.parts["scales"]
        product = packed_product(_bitsandbytes())
        if product is not None:
            return product(rows.to(torch.bfloat16), codes, scales).to(rows.dtype)
        operator, code = torch.ops.bitsandbytes.gemv_4bit.default, _nf4_code(codes.device)
        size = (self.form.outputs, self.form.inputs)
        return cast(torch.Tensor, operator(rows, codes, size, scales, code, _GROUP))

    def _state(self, dtype: torch.dtype) -> Any:
        functional = _bitsandbytes().functional
        codes, scales = self.parts["codes"], self.parts["scales"]
        nested: dict[str, Any] = {}
        if not self.form.is_packed:
            code = _dynamic_code(codes.device)
            steps = self.parts["steps"]
            inner = functional.QuantState(
                absmax=steps, code=code, blocksize=_NEST, dtype=torch.float32
            )
            nested = {"offset": self.parts["offset"], "state2": inner}
        return functional.QuantState(
            absmax=scales,
            shape=torch.Size((self.form.outputs, self.form.inputs)),
            code=_nf4_code(codes.device),
            blocksize=_GROUP,
            quant_type="nf4",
            dtype=dtype,
            **nested,
        )


class _Multiply(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """The product with a gradient for its inputs, whatever kernel computed it."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix.multiply(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.matrix.whole(gradient.dtype), None


def quantize(weight: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """Return the parts of a matrix [outputs, inputs]; temporaries are a small share of it."""
    with torch.no_grad():
        if form.kind == "int8":
            return _int8_parts(weight)
        codes, largest = _nf4_codes(weight.reshape(-1))
        functional = _bitsandbytes().functional
        offset = largest.mean()
        code = _dynamic_code(weight.device)
        scales, nest = functional.quantize_blockwise(largest - offset, code=code, blocksize=_NEST)
        if not form.is_packed:
            return {"codes": codes, "scales": scales, "steps": nest.absmax, "offset": offset}
        largest = functional.dequantize_blockwise(scales, nest) + offset
        grid = largest.view(form.outputs, form.inputs // _GROUP)
        return {
            "codes": _packed(codes.view(form.outputs, form.inputs // 2)),
            "scales": grid.t().to(torch.bfloat16).contiguous(),
        }


def _int8_parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    count = max(_CHUNK_VALUES // weight.shape[1], 1)
    for begin in range(0, len(weight), count):
        rows = weight[begin : begin + count].float()
        # rounded first, so that a scale is the same number in every dtype we compute in
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-30).bfloat16().float()
        codes[begin : begin + count] = (rows / scale[:, None]).round().clamp(-127, 127)
        scales[begin : begin + count] = scale
    return {"codes": codes, "scales": scales}


def _nf4_codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two to a byte with the first in the high half, and the largest of each group."""
    codes = torch.empty(len(values) // 2, dtype=torch.uint8, device=values.device)
    largest = torch.empty(len(values) // _GROUP, dtype=torch.float32, device=values.device)
    code = _nf4_code(values.device)
    bounds = ((code[1:] + code[:-1]) / 2).tolist()
    for begin in range(0, len(values), _CHUNK_VALUES):
        groups = values[begin : begin + _CHUNK_VALUES].float().view(-1, _GROUP)
        top = groups.abs().amax(1)
        scaled = groups * (1.0 / top.clamp(min=1e-38))[:, None]
        index = torch.zeros(scaled.shape, dtype=torch.uint8, device=values.device)
        for bound in bounds:  # fifteen passes within the cache beat a search per value
            index += scaled > bound
        pairs = index.view(-1, 2)
        codes[begin // 2 : begin // 2 + len(pairs)] = (pairs[:, 0] << 4) | pairs[:, 1]
        largest[begin // _GROUP : begin // _GROUP + len(top)] = top
    return codes, largest


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """The kernel's layout of codes [outputs, inputs / 2]: a byte pairs rows 16 apart."""
    rows, columns = codes.shape
    tiles = codes.view(-1, 2, _HALF_ROWS, columns)
    low, high = tiles[:, 0], tiles[:, 1]
    even = (high & 0xF0) | (low >> 4)
    odd = ((high & 0x0F) << 4) | (low & 0x0F)
    packed = torch.stack((even, odd), 2).permute(0, 3, 1, 2).reshape(rows, columns)
    return packed.contiguous()  # of a lone tile it may be a view, and the kernel sees no strides


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    """What `_packed` was given."""
    rows, columns = codes.shape
    tiles = codes.view(-1, columns, _HALF_ROWS, 2).permute(0, 2, 3, 1).contiguous()
    even, odd = tiles[:, :, 0], tiles[:, :, 1]
    low = (even << 4) | (odd & 0x0F)
    high = (even & 0xF0) | (odd >> 4)
    return torch.stack((low, high), 1).view(rows, columns)


@cache
def is_nf4_fast() -> bool:
    """Has this CPU a kernel for packed NF4 that computes what we think it does? Tried out once.

    The layout is bitsandbytes' own affair: a release or a CPU that reads it otherwise must make us
    slow, not wrong.
    """
    with torch.device("cpu"), torch.no_grad():  # asked while models are built on meta
        return _packed_error() < 0.02  # bfloat16 rounds to 0.004; a wrong layout gives 1


def _packed_error() -> float:
    """How far the packed kernel is from the product that it should give, relatively."""
    generator = torch.Generator().manual_seed(0)
    form = Form("nf4", 2 * _TILE_ROWS, 4 * _GROUP, is_packed=True)
    weight = torch.randn(form.outputs, form.inputs, generator=generator, dtype=torch.float32)
    matrix = Matrix(form, quantize(weight, form))
    rows = torch.randn(3, form.inputs, generator=generator).bfloat16()
    right = rows.float() @ matrix.whole(torch.float32).t()
    try:
        return float((matrix.multiply(rows).float() - right).norm() / right.norm())
    except (RuntimeError, AttributeError, ValueError):
        return math.inf


class _NoKernelHint(logging.Filter):
    """bitsandbytes tells everybody to install a package that fetches code; we do without."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()


@cache
def _bitsandbytes() -> ModuleType:
    """The library, imported without its hint and without the compiler.

    It asks torch to compile fallbacks of operators, which imports the compiler: more than a second
    for what we never call.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_NoKernelHint())
    compiler = torch.compile
    torch.compile = _uncompiled
    try:
        import bitsandbytes
    finally:
        torch.compile = compiler
    return cast(ModuleType, bitsandbytes)


def _uncompiled(function: Any, **settings: Any) -> Any:
    return function


@cache
def _nf4_code(device: torch.device) -> torch.Tensor:
    # not bitsandbytes' own: that takes torch's default dtype, which loaders change
    with torch.inference_mode(False):
        return torch.tensor(_NF4_VALUES, dtype=torch.float32, device="cpu").to(device)


@cache
def _dynamic_code(device: torch.device) -> torch.Tensor:
    """The numbers that bitsandbytes' 8-bit codes of scales stand for."""
    with torch.device("cpu"), torch.inference_mode(False):
        code = _bitsandbytes().functional.create_dynamic_map()
        return cast(torch.Tensor, code.float().to(device))
