"""Configs and model classes of transformers, under the names by which this program has them.

| fact | releases |
| --- | --- |
| a composite's text part is `get_text_config(decoder=True)` | from 5.0 |
| tied weights are told by `all_tied_weights_keys`, read and written | from 5.0 |
| layers that share keys: `kv_sharing_modes` of the config | from 5.23 |
"""

import functools
from typing import cast

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from blocks.errors import BlocksError, CheckpointError
from blocks.hf.release import Fact, check_facts

__all__ = [
    "CONFIG_MAPPING",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "Conv1D",
    "PreTrainedModel",
    "PretrainedConfig",
    "causal_class",
    "decoder_config",
    "is_composite",
    "layer_kinds",
    "logging",
    "sharing_modes",
    "text_config",
    "tiny_model",
]

_NAMES_OF_SHARING = ("num_kv_shared_layers", "kv_sharing_modes")


def decoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the decoder."""
    return config.get_text_config(decoder=True)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that the causal model's class takes: a composite's text part where it wants it."""
    text = decoder_config(config)
    return text if causal_class(config).config_class is type(text) else config


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' causal language model of this config; CheckpointError if it has none."""
    try:
        known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise CheckpointError(
            f"transformers has no causal language model of type {config.model_type}; "
            "choose another model"
        ) from error
    if not isinstance(known, tuple | list):
        return cast("type[PreTrainedModel]", known)
    wanted = config.architectures or []
    return cast(
        "type[PreTrainedModel]", next((one for one in known if one.__name__ in wanted), known[0])
    )


def is_composite(config: PretrainedConfig) -> bool:
    """Is it a config of text and images?"""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...] | None:
    """What each layer is, as "sliding_attention"; None where the family tells nothing."""
    types = getattr(decoder_config(config), "layer_types", None)
    return tuple(types) if types else None


def sharing_modes(config: PretrainedConfig) -> tuple[str | None, ...]:
    """For each layer "store", "reuse" or neither: whose keys others take.

    BlocksError where the family shares keys and the config does not say so by a known name.
    """
    modes = getattr(decoder_config(config), "kv_sharing_modes", None)
    if modes is None:
        raise BlocksError(
            f"layers of {config.model_type} share keys, and its config does not say which by "
            f"{' or '.join(_NAMES_OF_SHARING)}"
        )
    return tuple(modes)


def _tiny() -> PretrainedConfig:
    return CONFIG_MAPPING["llama"](
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )


@functools.cache
def tiny_model() -> PreTrainedModel:
    """A model as small as can be: two layers, tied. Facts look at it and change nothing."""
    config = _tiny()
    return causal_class(config)(config)


def _tells_its_ends() -> bool:
    model = tiny_model()
    return (
        dict(model.all_tied_weights_keys) == {"lm_head.weight": "model.embed_tokens.weight"}
        and model.get_output_embeddings() is model.lm_head
        and model.get_input_embeddings() is model.model.embed_tokens
        and model.base_model_prefix == "model"
    )


FACTS = (
    Fact(
        "a config's class has its causal model in the mapping of auto classes",
        lambda: causal_class(_tiny()).__name__ == "LlamaForCausalLM",
    ),
    Fact(
        "a config without parts is its own text part",
        lambda: decoder_config(config := _tiny()) is config,
    ),
    Fact("a model tells its tied weights, its embedding and its head", _tells_its_ends),
)


def check() -> None:
    """Unsupported for the first thing that is not as known."""
    check_facts(FACTS)
