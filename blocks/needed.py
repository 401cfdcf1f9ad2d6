"""Which tensors, and so which shards, the blocks of a span need: known before any is fetched.

1. The answer is the loader's own: names go through transformers' renaming and are looked up in the
   carved model that `load_stack` fills, so old layouts and fused experts are found like any other.
2. No weight is read; for a model of 36,000 tensors this takes a second.
"""

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from blocks.carve import carved_class, text_config
from blocks.checkpoint import Checkpoint


def needed_tensors(checkpoint: Checkpoint, start: int, stop: int) -> frozenset[str]:
    """The checkpoint's names of the tensors that land in the stack `start:stop`, ends included.

    ValueError for blocks that the model does not have.
    """
    if not 0 <= start < stop <= checkpoint.blocks:
        raise ValueError(f"blocks {start}:{stop} are not within 0:{checkpoint.blocks}")
    return frozenset(landing(empty_model(checkpoint, start, stop), checkpoint))


def needed_shards(checkpoint: Checkpoint, start: int, stop: int) -> tuple[str, ...]:
    """The shards that hold a tensor of the stack `start:stop`, in order of their names."""
    tensors = needed_tensors(checkpoint, start, stop)
    return tuple(sorted({checkpoint.tensors[name].shard for name in tensors}))


def empty_model(checkpoint: Checkpoint, start: int, stop: int) -> PreTrainedModel:
    """The carved model of the stack `start:stop`, on the meta device: shapes and names alone."""
    config = text_config(checkpoint.config)
    with torch.device("meta"):
        return carved_class(config, start, stop)(config)


def landing(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's names of what lands in `model`, as transformers' loader decides it, each
    with the name of the weight it becomes, or becomes a part of.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix, weights = model.base_model_prefix, model.state_dict()
    found = {}
    for name in checkpoint.tensors:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, weights)
        if renamed not in weights and name in weights:
            renamed, _ = rename_source_key(name, [], [], prefix, weights)
        if renamed in weights:
            found[name] = renamed
    return found
