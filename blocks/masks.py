"""Which positions of a batch are tokens, and where these are."""

import torch

from blocks.errors import StepError
from blocks.transfer import sent


def checked_mask(
    mask: torch.Tensor | None, rows: int, length: int, device: torch.device
) -> torch.Tensor | None:
    """The mask [rows, length] as the models take it; None when it hides nothing, which is faster.

    StepError for what is none.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (rows, length) or mask.is_floating_point():
        raise StepError(
            f"a mask is whole numbers of shape {(rows, length)}, not {tuple(mask.shape)}"
        )
    mask = mask != 0
    return None if bool(mask.all()) else sent(mask, device, torch.long)


def positions(
    mask: torch.Tensor | None, start: int, tokens: int, rows: int, device: torch.device
) -> torch.Tensor:
    """Positions [rows, tokens]; padding does not count, as in transformers' `generate`."""
    if mask is None:
        return torch.arange(start, start + tokens, device=device).expand(rows, tokens)
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
