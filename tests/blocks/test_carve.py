"""Cutting finds a family's layers and their form, and leaves no trace in its parameters' names."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from tiny_models import FAMILIES, TinyModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from blocks.carve import (
    Skip,
    Void,
    anatomy,
    carved_class,
    find_layers,
    layer_arity,
)
from blocks.errors import BlocksError, CheckpointError
from blocks.hf.models import causal_class, text_config
from blocks.shrink import tiny_config

Get = Callable[[str, bool], TinyModel]


class _Loop(nn.Module):
    """Loops in the styles that families have; none of them is ever run."""


class TakesTensor(_Loop):
    def forward(self, x):
        for decoder_layer in self.layers[: self.count]:
            x = decoder_layer(x, mask=None)
        return x


class TakesPair(_Loop):
    def forward(self, x):
        for number, block in enumerate(self.layers):
            x, state = block(x, number)
        return x, state


class TakesFirstOfTwo(_Loop):
    def forward(self, x):
        seen = ()
        for number in range(len(self.layers)):
            outputs = self.layers[number](x)
            x = outputs[0]
            seen += (outputs[1],)
        return x


class TakesCheckpointedTuple(_Loop):
    def forward(self, x):
        for layer in self.layers:
            outputs = self._gradient_checkpointing_func(layer.__call__, x)
            x = outputs[0]
        return x


class TakesEither(_Loop):
    def forward(self, x):
        for layer in self.layers:
            outputs = layer(x)
            x = outputs[0] if isinstance(outputs, tuple) else outputs
        return x


@pytest.mark.parametrize(
    ("loop", "arity"),
    [
        (TakesTensor, 0),
        (TakesPair, 2),
        (TakesFirstOfTwo, 2),
        (TakesCheckpointedTuple, 1),
        (TakesEither, 0),
    ],
)
def test_the_form_of_a_layer_is_read_from_the_loop_that_runs_it(
    loop: type[nn.Module], arity: int
) -> None:
    assert layer_arity(loop, "layers") == arity


@pytest.mark.parametrize(
    ("module", "inner", "name", "is_tuple"),
    [
        (modeling_llama, "LlamaModel", "layers", False),
        (modeling_bloom, "BloomModel", "h", True),
        (modeling_gpt2, "GPT2Model", "h", False),
        (modeling_falcon, "FalconModel", "h", True),
        (modeling_gpt_neox, "GPTNeoXModel", "layers", False),
    ],
)
def test_the_form_of_known_families_is_right(
    module: ModuleType, inner: str, name: str, is_tuple: bool
) -> None:
    assert bool(layer_arity(getattr(module, inner), name)) == is_tuple


def test_a_stub_returns_its_input_in_the_form_asked_for_and_answers_for_its_layer() -> None:
    hidden = torch.ones(1, 2, 3)
    layer = nn.Linear(3, 5)
    assert Skip(layer, 0)(hidden) is hidden
    assert Skip(layer, 0)(hidden_states=hidden, other=1) is hidden
    assert Skip(layer, 3)(hidden) == (hidden, None, None)
    assert Skip(layer, 0).out_features == 5
    assert not list(Skip(layer, 0).parameters())


def test_a_void_gives_zeros_of_the_width_that_a_matrix_would_give_or_else_its_input() -> None:
    ids, hidden = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    table = nn.Embedding(9, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(Void(table)(ids), torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    torch.testing.assert_close(Void(nn.Linear(3, 5))(hidden), torch.zeros(2, 5))
    assert Void(nn.LayerNorm(3))(hidden) is hidden
    assert Void(nn.LayerNorm(3))(input_ids=None, inputs_embeds=hidden) is hidden
    assert Void(nn.LayerNorm(3))(inputs_embeds=hidden, position_ids=ids) is hidden
    mask_of_past = torch.ones(2, 8, dtype=torch.long)
    assert Void(table)(mask_of_past, 5, position_ids=ids).shape == (2, 3, 4)


def build(family: str, start: int, stop: int, *, tied: bool = False) -> nn.Module:
    config = AutoConfig.for_model(family, **FAMILIES[family], tie_word_embeddings=tied)
    with torch.device("meta"):
        return carved_class(config, start, stop)(config)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_carved_model_has_the_whole_models_names_for_what_it_holds(
    family: str, tiny_model: Get
) -> None:
    whole = tiny_model(family, False).whole
    path, _ = find_layers(whole)
    names = {name for name, _ in build(family, 2, 5).named_parameters()}
    held = tuple(f"{path}.{number}." for number in (2, 3, 4))
    assert names == {name for name, _ in whole.named_parameters() if name.startswith(held)}


def big_matrices(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if 96 in weight.shape]


@pytest.mark.parametrize(
    ("span", "tied", "expected"),
    [
        ((0, 2), False, ["model.embed_tokens.weight"]),
        ((0, 2), True, ["model.embed_tokens.weight"]),
        ((2, 4), True, []),
        ((4, 6), False, ["lm_head.weight"]),
        ((4, 6), True, ["model.embed_tokens.weight"]),
        ((0, 6), False, ["model.embed_tokens.weight", "lm_head.weight"]),
        ((0, 6), True, ["model.embed_tokens.weight"]),
    ],
)
def test_only_the_big_matrix_that_an_end_needs_is_kept(
    span: tuple[int, int], tied: bool, expected: list[str]
) -> None:
    model = build("llama", *span, tied=tied)
    model.tie_weights(recompute_mapping=False)  # as the loader does
    assert big_matrices(model) == expected


def test_a_carved_class_keeps_the_name_by_which_weights_are_converted() -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    carved = carved_class(config, 0, 1)
    assert (carved.__name__, carved.__module__) == ("LlamaForCausalLM", modeling_llama.__name__)


def test_a_family_that_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no causal language model of type vit"):
        carved_class(AutoConfig.for_model("vit"), 0, 1)


def test_an_encoder_is_refused_unless_its_config_says_that_it_decodes() -> None:
    config = tiny_config("roberta")
    with torch.device("meta"):
        carved_class(config, 1, 2)(config)
        config.is_decoder = False
        with pytest.raises(CheckpointError, match=r"is_decoder false.*set it to true"):
            carved_class(config, 1, 2)(config)


@pytest.mark.parametrize(
    ("family", "owner", "inner"),
    [
        ("llama", "LlamaModel", "LlamaModel"),
        ("bart", "BartDecoder", "BartDecoder"),
        ("bert", "BertEncoder", "BertModel"),
    ],
)
def test_ids_go_to_the_nearest_module_around_the_layers_that_takes_them(
    family: str, owner: str, inner: str
) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        parts = anatomy(causal_class(config)(config))
    assert (type(parts.owner).__name__, type(parts.inner).__name__) == (owner, inner)


def test_tables_of_positions_that_no_training_made_stay_with_the_layers_that_take_them() -> None:
    config = tiny_config("roformer")
    with torch.device("meta"):
        names = [name for name, _ in carved_class(config, 2, 3)(config).named_parameters()]
    assert "roformer.encoder.embed_positions.weight" in names
    assert not any("embeddings" in name for name in names)


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config.num_hidden_layers = 5
    with pytest.raises(BlocksError, match="no list of 5 layers"):
        find_layers(model)


def test_a_config_of_text_only_is_taken_as_it_is_and_a_composites_class_decides() -> None:
    plain = AutoConfig.for_model("llama", **FAMILIES["llama"])
    assert text_config(plain) is plain
    composite = Gemma3Config()
    assert text_config(composite) is composite
