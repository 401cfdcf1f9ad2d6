"""Tensors as plain data, (dtype's name, shape, bytes), and back.

1. Bytes are little-endian in C order. Whatever carries them never looks inside.
2. What comes in owns its memory: the sender's buffer may be reused at once.
3. What does not add up is a StepError.
"""

import math
from collections.abc import Mapping

import torch

from blocks.errors import StepError

Buffer = bytes | bytearray | memoryview
RawTensor = tuple[str, tuple[int, ...], Buffer]
Payload = Mapping[str, RawTensor]

_DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """The tensor's values as bytes, copied once."""
    # numpy knows no bfloat16, but every dtype is bytes
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def from_raw(raw: RawTensor) -> torch.Tensor:
    """A tensor of its own with these values, on the CPU. StepError for a malformed one."""
    name, shape, data = raw
    dtype = _DTYPES.get(name)
    if dtype is None or any(axis < 0 for axis in shape):
        raise StepError(f"no tensor has dtype {name!r} and shape {tuple(shape)}")
    if len(data) != dtype.itemsize * math.prod(shape):
        raise StepError(f"{len(data)} bytes are no {name} tensor of shape {tuple(shape)}")
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    # a bytearray: aligned, and writable as torch wants it
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
