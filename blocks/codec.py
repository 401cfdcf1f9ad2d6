"""Tensors as plain data, (dtype's name, shape, bytes), and back; hidden states in 8 bits too.

1. Bytes are little-endian in C order. Whatever carries them never looks inside.
2. What comes in owns its memory: the sender's buffer may be reused at once.
3. What does not add up is a StepError.
4. In 8 bits, 64 neighbours of one position share a scale: what else travels along, in the chunk or
   the batch, changes no code, and an outlier coarsens its own 64 values, never a whole position.
"""

import math
from collections.abc import Mapping

import torch

from blocks.errors import BlocksError, StepError
from blocks.formats import _bitsandbytes, _dynamic_code

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

_GROUP = 64  # values that share a scale in 8 bits: half the error of 4096, for 1/16 byte a value
_CPU = torch.device("cpu")


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


def encode_8bit(hidden: torch.Tensor) -> dict[str, RawTensor]:
    """Hidden states [..., H], floating, in bitsandbytes' dynamic 8-bit code, 64 values to a scale.

    Returns "codes" uint8 [..., H] and "scales" float32 [..., ceil(H / 64)], the largest magnitude
    of each group; the last group of a position may be short. That is 1.0625 bytes per value where
    64 divides H. A value comes back within 0.0071 of its group's largest, small ones within far
    less; a zero beside others may not stay one. Raises BlocksError for NaN and infinities, and for
    what is not floating.
    """
    if not hidden.is_floating_point() or not hidden.dim():
        raise BlocksError(
            f"8-bit codes are for hidden states, not for {hidden.dtype} of shape "
            f"{tuple(hidden.shape)}"
        )
    # on the CPU, where the bytes are needed, so that every device gives the same codes
    values = hidden.detach().to(_CPU, torch.float32)
    # bitsandbytes would make zeros of NaN without a word
    if values.numel() and not all(bool(one.isfinite()) for one in values.aminmax()):
        raise BlocksError(
            "these hidden states hold NaN or infinities, for which 8 bits have no code"
        )
    groups = _padded(values)
    codes, state = _bitsandbytes().functional.quantize_blockwise(
        groups, code=_dynamic_code(_CPU), blocksize=_GROUP
    )
    scales = state.absmax.view(*groups.shape[:-1], groups.shape[-1] // _GROUP)
    return {"codes": to_raw(codes[..., : values.shape[-1]]), "scales": to_raw(scales)}


def decode_8bit(parts: Payload) -> torch.Tensor:
    """float32 hidden states [..., H] from what `encode_8bit` gave, on the CPU.

    Raises StepError for what it cannot have given.
    """
    if parts.keys() != {"codes", "scales"}:
        raise StepError(f"8-bit hidden states are codes and scales, not {sorted(parts)}")
    codes, scales = from_raw(parts["codes"]), from_raw(parts["scales"])
    if codes.dtype != torch.uint8 or not codes.dim():
        raise StepError(f"8-bit codes are uint8 [..., H], not {codes.dtype} {tuple(codes.shape)}")
    wanted = (*codes.shape[:-1], math.ceil(codes.shape[-1] / _GROUP))
    if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
        raise StepError(
            f"the scales of 8-bit codes of shape {tuple(codes.shape)} are float32 {wanted}, not "
            f"{scales.dtype} {tuple(scales.shape)}"
        )
    if scales.numel():
        least, largest = scales.aminmax()
        if not (bool(least >= 0) and bool(largest.isfinite())):
            raise StepError("the scales of 8-bit codes are finite and not negative; these are not")
    whole: torch.Tensor = _bitsandbytes().functional.dequantize_blockwise(
        _padded(codes), absmax=scales.view(-1), code=_dynamic_code(_CPU), blocksize=_GROUP
    )
    return whole[..., : codes.shape[-1]].contiguous()


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zeros up to whole groups in its last axis: groups never cross positions."""
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[-1] % _GROUP)).contiguous()
