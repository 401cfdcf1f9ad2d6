"""Tensors on their way between this process's memory and where the weights are.

1. Nothing waits for the device on the way there. What a pass brings back comes in one piece, and
   is the one time that it waits.
"""

from collections.abc import Sequence

import torch

_ALIGNED = 16  # bytes; more than any dtype needs


def sent(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on the device, in that dtype; itself if it is so already."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    # from memory that the system cannot move the copy runs by itself; torch keeps it until then
    return tensor.pin_memory().to(device, non_blocking=True).to(dtype or tensor.dtype)


def brought(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """These tensors in this process's memory, as they are now. All that ran before is done."""
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    back = iter(unpacked(packed(away).cpu(), away) if away else ())
    return [tensor if tensor.device.type == "cpu" else next(back) for tensor in tensors]


def packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors of one device, one after the other, each from a whole place on."""
    pieces: list[torch.Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        pieces += [flat, flat.new_zeros(-flat.numel() % _ALIGNED)]
    return torch.cat(pieces)


def unpacked(whole: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose bytes these are, with the dtypes and shapes of others."""
    made: list[torch.Tensor] = []
    end = 0
    for tensor in like:
        flat = whole[end : end + tensor.nbytes]
        made.append(flat.view(tensor.dtype).reshape(tensor.shape))
        end += tensor.nbytes + -tensor.nbytes % _ALIGNED
    return made


def wait_for(device: torch.device) -> None:
    """Return when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
