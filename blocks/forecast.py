"""What a model will take, before a single weight of it is read: from its config alone.

1. Shapes are found by running the family's own code on the meta device, where tensors have shapes
   and no memory: no formula of ours has to know what a family keeps of a token.
2. Whether the model has 1 or 500 billion weights, this takes about a second.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from blocks.cache import StackCache
from blocks.carve import anatomy
from blocks.checkpoint import Checkpoint
from blocks.config import UNFIT, context_length, json_object, refuse_absurd, refuse_encoder
from blocks.errors import CheckpointError
from blocks.hf.forwards import cache_argument, parameters_of
from blocks.hf.models import (
    AutoConfig,
    PretrainedConfig,
    causal_class,
    decoder_config,
    text_config,
)

logger = logging.getLogger(__name__)


def cache_bytes_per_block_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return what one more token of a session adds to the cache of one block, the mean of all.

    0 for families whose state does not grow. A family that cannot run on the meta device is
    charged for full keys and values, which is the most that any keeps.
    """
    config = text_config(config)
    try:
        values, blocks = _grown_values(config)
    except Exception as error:  # noqa: BLE001  # a family's own code; the guess is the safe side
        logger.debug("%s does not run without weights: %s", config.model_type, error)
        return _full_attention_bytes(config, dtype)
    return int(-(-values * dtype.itemsize // blocks))


def sketch(path: Path) -> Checkpoint:
    """Return what a config.json, or a folder with one, says of a checkpoint without its weights.

    It has no shards and no tensors: good for planning, not for loading. CheckpointError if there
    is no config of a causal language model.
    """
    folder = path.parent if path.name == "config.json" else path
    try:
        given = json_object(folder / "config.json")
        refuse_absurd(given, folder / "config.json")
        whole = AutoConfig.for_model(given.pop("model_type"), **given)
        refuse_encoder(whole, folder / "config.json")
        config = text_config(whole)
        text = decoder_config(config)
        return Checkpoint(
            folder=folder,
            config=config,
            tensors={},
            shards=(),
            blocks=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            vocabulary_size=text.vocab_size,
            context_length=context_length(text),
            model_type=str(text.model_type),
        )
    except UNFIT as error:
        raise CheckpointError(
            f"{folder / 'config.json'} describes no causal language model ({error}); "
            "name the folder of a model, or its config.json"
        ) from error


def _grown_values(config: PretrainedConfig) -> tuple[int, int]:
    """How many values a session's second token adds in all blocks, and how many those are."""
    dtype = torch.bfloat16  # the one in which every kernel has a shape-only twin
    with torch.device("meta"), torch.inference_mode():
        parts = anatomy(causal_class(config)(config).to(dtype))
        cache = StackCache(config, 0, len(parts.layers))
        takes = parameters_of(parts.inner.forward)
        held = []
        for position in range(2):
            step: dict[str, Any] = {
                "input_ids": torch.zeros(1, 1, dtype=torch.long),
                "position_ids": torch.full((1, 1), position),
                cache_argument(parts.inner): cache,
                "use_cache": True,
                "return_dict": True,
            }
            cache.begin(1)
            parts.inner(**{name: value for name, value in step.items() if name in takes})
            cache.advance(1)
            held.append(cache.used_byte_count)
    return int(held[1] - held[0]) // dtype.itemsize, len(parts.layers)


def _full_attention_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    text = decoder_config(config)
    queries = getattr(text, "num_attention_heads", None) or 1
    heads: int = getattr(text, "num_key_value_heads", None) or queries
    head_size: int = getattr(text, "head_dim", None) or text.hidden_size // queries
    return 2 * heads * head_size * int(dtype.itemsize)
