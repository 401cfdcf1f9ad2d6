"""bitsandbytes' product with packed NF4 on a CPU, called without the operator around it.

The operator takes 35 to 40 µs a call beside the work, as long as the work on a million weights.

1. Only of a release whose function was looked at: one that took other arguments would read memory
   that is not its own. With others, and on CPUs without the kernel, the operator is called.
2. Both give the same to the bit: it is one function.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import cast

import torch

_KNOWN = frozenset({"0.50.2"})
_NAME = "gemv_4bit_inference_cpu_nf4_bf16"
_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p

# void f(rows, outputs, inputs, *values, *codes, *scales, *product, group, row stride, its stride)
_FUNCTION = ctypes.CFUNCTYPE(None, *[_SIZE] * 3, *[_ADDRESS] * 4, *[_SIZE] * 3)

# rows [n, inputs], codes [outputs, inputs / 2], scales [inputs / group, outputs] -> [n, outputs]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@cache
def packed_product(library: ModuleType) -> Product | None:
    """Return the product of bfloat16 rows with packed codes, all contiguous on the CPU.

    None where bitsandbytes (`library`) or this CPU is not known to have it.
    """
    if library.__version__ not in _KNOWN or not library.functional.has_avx512bf16():
        return None
    try:
        function = _FUNCTION((_NAME, library.cextension.lib._lib))
    except (AttributeError, TypeError):  # it has no such function
        return None

    def product(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        count, inputs = rows.shape
        outputs = codes.shape[0]
        made = torch.empty(count, outputs, dtype=torch.bfloat16)
        function(
            *(count, outputs, inputs),
            *(rows.data_ptr(), codes.data_ptr(), scales.data_ptr(), made.data_ptr()),
            *(inputs // scales.shape[0], inputs, outputs),
        )
        return cast(torch.Tensor, made)

    return product
