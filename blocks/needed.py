"""Which tensors, and so which shards, the blocks of a span need: known before any is fetched.

1. The answer is the loader's own: names go through transformers' renaming and are looked up in the
   carved model that `load_stack` fills, so old layouts and fused experts are found like any other.
2. No weight is read; for a model of 36,000 tensors this takes a second.
"""

import torch

from blocks.carve import carved_class
from blocks.checkpoint import Checkpoint
from blocks.hf.loading import landing
from blocks.hf.models import PreTrainedModel, text_config


def needed_tensors(checkpoint: Checkpoint, start: int, stop: int) -> frozenset[str]:
    """The checkpoint's names of the tensors that land in the stack `start:stop`, ends included.

    ValueError for blocks that the model does not have.
    """
    if not 0 <= start < stop <= checkpoint.blocks:
        raise ValueError(f"blocks {start}:{stop} are not within 0:{checkpoint.blocks}")
    return frozenset(landing(empty_model(checkpoint, start, stop), checkpoint.tensors))


def needed_shards(checkpoint: Checkpoint, start: int, stop: int) -> tuple[str, ...]:
    """The shards that hold a tensor of the stack `start:stop`, in order of their names."""
    tensors = needed_tensors(checkpoint, start, stop)
    return tuple(sorted({checkpoint.tensors[name].shard for name in tensors}))


def empty_model(checkpoint: Checkpoint, start: int, stop: int) -> PreTrainedModel:
    """The carved model of the stack `start:stop`, on the meta device: shapes and names alone."""
    config = text_config(checkpoint.config)
    with torch.device("meta"):
        return carved_class(config, start, stop)(config)
