"""A model's config.json, checked: what is absurd, or no decoder's, is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError  # what configs check their fields with

from blocks.carve import anatomy
from blocks.errors import CheckpointError
from blocks.hf.models import (
    AutoConfig,
    PretrainedConfig,
    causal_class,
    decoder_config,
    text_config,
)
from blocks.hf.rotary import LengthScaling, Rotary, has_length_scaling, stretched

# What a config may say at most, by the end of the field's name: far beyond any model there is.
_MOST = (
    *((ending, 100_000) for ending in ("layers", "layer", "experts", "labels", "heads")),
    *((ending, 1 << 24) for ending in ("size", "dim", "n_embd", "d_model", "n_inner", "ffn")),
)
# What configs raise on values that are none.
UNFIT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# Families without positions of their own (alibi) name no bound; one is needed to reserve memory.
_ASSUMED_CONTEXT = 2048


def refuse_absurd(told: object, path: Path) -> None:
    """CheckpointError if a config tells of more than any model has: classes of configs and models
    would make lists of such lengths.
    """
    parts = told.items() if isinstance(told, dict) else ()
    for name, value in parts:
        most = next((most for ending, most in _MOST if name.endswith(ending)), None)
        if most is not None and isinstance(value, int) and value > most:
            raise CheckpointError(
                f"{path} says {name} {str(value)[:20]}, and no model has more than {most}; "
                "fetch it again"
            )
        refuse_absurd(value, path)


def refuse_encoder(config: PretrainedConfig, path: Path) -> None:
    """CheckpointError for a model whose text depends on what an encoder has read."""
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{path} describes an encoder with a decoder ({config.model_type}), and only decoders "
            "are served; choose a causal language model"
        )


def read_config(folder: Path) -> PretrainedConfig:
    """The config in a folder. CheckpointError if it is none of a decoder that can be served."""
    path = folder / "config.json"
    refuse_absurd(json_object(path), path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNFIT as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is of no model type that transformers knows "
            f"({' '.join(str(error).split())[:300]}); choose another model or a newer transformers"
        ) from error
    refuse_encoder(config, path)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        raise CheckpointError(
            f"{folder} holds weights that are quantized already; name the folder of the original"
        )
    return config


def context_length(config: PretrainedConfig) -> int:
    """The positions a decoder with this config can take."""
    for name in ("max_position_embeddings", "seq_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return stretched(config, value)
    return _ASSUMED_CONTEXT


def length_scaling(config: PretrainedConfig) -> LengthScaling | None:
    """How the model's positions are computed by the length of a text; None in most models."""
    if not has_length_scaling(decoder_config(config)):
        return None
    config = text_config(config)
    with torch.device("meta"):  # its modules tell, whatever the config says
        model = causal_class(config)(config)
    return Rotary(model, anatomy(model).inner).scaling


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file. CheckpointError if it holds none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch it again")
    return value


def positive(config: PretrainedConfig, name: str, folder: Path, most: int) -> int:
    """The config's count of this name, of which the weights hold `most`."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or value <= 0:
        raise CheckpointError(
            f"{folder / 'config.json'} has no usable {name}; name the folder of a causal language "
            "model"
        )
    if value > most:
        raise CheckpointError(
            f"{folder / 'config.json'} says {name} {value}, more than the weights hold; "
            "fetch the checkpoint again"
        )
    return value
