"""A release of transformers that differs from those known here is refused by name."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, reload
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModel
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel, cache_utils, masking_utils
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer

from blocks.carve import forwards_of
from blocks.errors import Unsupported
from blocks.hf import attention, models, release
from blocks.hf.forwards import check_takes, takes_of
from blocks.load import load_stack
from blocks.needed import empty_model

Get = Callable[[str, bool], TinyModel]
Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What a process asks once is asked in each of these tests."""
    release.check.cache_clear()
    yield
    release.check.cache_clear()
    models.tiny_model.cache_clear()


def renamed(function: Callable[..., Any], was: str, now: str) -> Callable[..., Any]:
    """The function, which takes that argument by another name only."""

    def double(*args: Any, **named: Any) -> Any:
        if now in named:
            named[was] = named.pop(now)
        return function(*args, **named)

    signature = inspect.signature(function)
    parameters = [
        one.replace(name=now) if one.name == was else one for one in signature.parameters.values()
    ]
    double.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return double


def defaulting(function: Callable[..., Any], name: str, default: Any) -> Callable[..., Any]:
    """The function with another default of that argument."""

    def double(*args: Any, **named: Any) -> Any:
        return function(*args, **{name: default, **named})

    signature = inspect.signature(function)
    parameters = [
        one.replace(default=default) if one.name == name else one
        for one in signature.parameters.values()
    ]
    double.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return double


def rename(owner: Any, function: str, was: str, now: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, function, renamed(getattr(owner, function), was, now))

    return plant


def default(owner: Any, function: str, name: str, value: Any) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, function, defaulting(getattr(owner, function), name, value))

    return plant


def replaced(owner: Any, name: str, value: Any) -> Plant:
    return lambda patch: patch.setattr(owner, name, value)


def gone(owner: Any, name: str) -> Plant:
    return lambda patch: patch.delattr(owner, name)


ORIGINAL_LOADER = PreTrainedModel.from_pretrained.__func__


def crop_by(self: Any, tokens: int) -> None:
    """A crop that takes how many to remove without a sign."""
    self.keys, self.values = self.keys[..., :-tokens, :], self.values[..., :-tokens, :]


@functools.wraps(ORIGINAL_LOADER)
def without_dtype(cls: Any, *args: Any, **named: Any) -> Any:
    """A loader that passes over a keyword it does not know by this name any more."""
    named.pop("dtype", None)
    return ORIGINAL_LOADER(cls, *args, **named)


LAYER, SLIDING = cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer

PLANTS: dict[str, tuple[Plant, str]] = {
    "a layer's keys are called otherwise": (
        rename(LAYER, "update", "key_states", "keys"),
        r"DynamicLayer.update takes no key_states, but self, keys",
    ),
    "a crop has another sign": (replaced(LAYER, "crop", crop_by), r"forgets what `crop`"),
    "a window is one longer": (
        replaced(SLIDING, "get_mask_sizes", lambda self, query: (self.sliding_window + query, 0)),
        r"a sliding layer gives its window",
    ),
    "a cache is told its model otherwise": (
        rename(cache_utils.DynamicCache, "__init__", "config", "model_config"),
        r"DynamicCache takes no config, but",
    ),
    "a mask's window is called otherwise": (
        rename(attention, "sdpa_mask", "local_size", "window"),
        r"sdpa_mask takes no local_size, but",
    ),
    "a mask is not skipped any more": (
        default(attention, "sdpa_mask", "allow_is_causal_skip", False),
        r"sdpa_mask has False as the default of allow_is_causal_skip, not True",
    ),
    "positions are called otherwise": (
        rename(LlamaModel, "forward", "position_ids", "positions"),
        r"the forward of llama takes input_ids",
    ),
    "the cache is called otherwise": (
        rename(LlamaModel, "forward", "cache", "kv_store")
        if "cache" in inspect.signature(LlamaModel.forward).parameters
        else rename(LlamaModel, "forward", "past_key_values", "kv_store"),
        r"takes no cache by a name known here .* kv_store",
    ),
    "logits of the last position only": (
        default(LlamaForCausalLM, "forward", "logits_to_keep", 1),
        r"logits_to_keep=0",
    ),
    "the loader passes the dtype over": (
        replaced(PreTrainedModel, "from_pretrained", classmethod(without_dtype)),
        r"the loader fills a model by names",
    ),
    "the loader's config is called otherwise": (
        rename(PreTrainedModel, "from_pretrained", "ignore_mismatched_sizes", "lenient"),
        r"from_pretrained takes no ignore_mismatched_sizes",
    ),
    "tied weights are told otherwise": (
        lambda patch: patch.delattr(models.tiny_model(), "all_tied_weights_keys"),
        r"a model tells its tied weights",
    ),
    "a quantizer's hook is called otherwise": (
        gone(HfQuantizer, "get_quantize_ops"),
        r"a quantizer is not asked by get_quantize_ops",
    ),
    "a converter's patterns are called otherwise": (
        rename(WeightConverter, "copy", "source_patterns", "sources"),
        r"WeightConverter.copy takes no source_patterns",
    ),
}


def test_the_installed_release_is_as_known() -> None:
    release.check()


@pytest.mark.parametrize("what", PLANTS, ids=str)
def test_a_release_that_differs_is_refused_by_name_before_anything_is_loaded(
    what: str, llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, sentence = PLANTS[what]
    plant(monkeypatch)
    with pytest.raises(Unsupported, match=sentence) as told:
        load_stack(llama.checkpoint, 0, 2)
    assert str(told.value).startswith(f"transformers {release.version()} is not as known here: ")
    assert "pip install 'transformers" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("module", "name"), [(cache_utils, "DummyLayer"), (masking_utils, "sdpa_mask")], ids=str
)
def test_a_class_that_has_moved_is_told_by_name(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = import_module("blocks.hf.caches" if module is cache_utils else "blocks.hf.attention")
    kept = dict(vars(ours))
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError) as told:
        reload(ours)
    vars(ours).update(kept)  # what others have imported stays the one of its kind
    error = release.moved(told.value)
    assert error is not None
    assert f"cannot import name '{name}' from '{module.__name__}'; install" in str(error)
    assert str(Path(sys.prefix)) not in str(error)


def test_an_import_that_fails_elsewhere_is_not_laid_to_transformers() -> None:
    with pytest.raises(ImportError) as told:
        import_module("blocks.nothing_here")
    assert release.moved(told.value) is None


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        ("position_ids", "positions", r"takes positions=None in the place of position_ids=None"),
        ("use_cache", "caches", r"takes caches=None in the place of use_cache=None"),
    ],
)
def test_a_proven_type_whose_forward_takes_something_else_is_refused_by_name(
    was: str, now: str, sentence: str, tiny_model: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_model("qwen2", False).checkpoint
    known = takes_of(forwards_of(empty_model(checkpoint, 0, checkpoint.blocks)))
    monkeypatch.setattr("blocks.load.known_takes", lambda model_type: known)
    load_stack(checkpoint, 0, 2)
    inner = sys.modules["transformers.models.qwen2.modeling_qwen2"].Qwen2Model
    monkeypatch.setattr(inner, "forward", renamed(inner.forward, was, now))
    with pytest.raises(Unsupported, match=f"Qwen2Model.forward {sentence}"):
        load_stack(checkpoint, 0, 2)
    load_stack(checkpoint, 0, 2, is_trial=True)  # whose verdict is what will be known


def test_layers_of_several_kinds_are_known_whichever_of_them_a_span_begins_with(
    tiny_model: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_model("zamba2", True).checkpoint
    known = takes_of(forwards_of(empty_model(checkpoint, 0, checkpoint.blocks)))
    assert len(known.split("; ")) == 4
    monkeypatch.setattr("blocks.load.known_takes", lambda model_type: known)
    for block in range(checkpoint.blocks):
        load_stack(checkpoint, block, block + 1)


def test_what_forwards_take_is_told_with_plain_defaults_and_nothing_known_is_no_difference() -> (
    None
):
    with torch.device("meta"):
        text = takes_of(forwards_of(models.tiny_model()))
    whole, inner, layer = text.split("; ")
    assert whole.startswith("LlamaForCausalLM input_ids=None attention_mask=None position_ids=None")
    assert " logits_to_keep=0 " in whole
    assert inner.startswith("LlamaModel input_ids=None")
    assert layer.startswith("LlamaDecoderLayer hidden_states attention_mask=None")
    check_takes(text, text)
    check_takes(text, "")
