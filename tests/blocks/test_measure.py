"""What a span is said to cost is what it costs."""

from collections.abc import Callable
from typing import Any

import pytest
from quant_models import CONFIGS, loaded_bytes, write
from tiny_models import BLOCKS, PROVEN, TinyModel

from blocks.carve import is_tied
from blocks.load import load_stack
from blocks.measure import cache_bytes_per_token, measure, plan_bytes
from blocks.memory import free_memory_bytes
from blocks.quantize import Quant

Get = Callable[[str, bool], TinyModel]


@pytest.mark.parametrize("span", [(0, 2), (2, 5), (4, 6), (0, 6)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", PROVEN)
def test_planned_bytes_are_those_of_the_loaded_stack(
    tiny_model: Get, family: str, tied: bool, span: tuple[int, int]
) -> None:
    checkpoint = tiny_model(family, tied).checkpoint
    model = load_stack(checkpoint, *span, dtype="bfloat16")._carved.model
    storages = {weight.untyped_storage().data_ptr(): weight.nbytes for weight in model.parameters()}
    assert plan_bytes(checkpoint, "bfloat16").span_bytes(*span) == sum(storages.values())


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_planned_bytes_are_those_of_the_loaded_stack_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, family: str, dtype: Any, quant: Quant
) -> None:
    checkpoint = write(family, tmp_path_factory.getbasetemp() / "planned")
    sizes = plan_bytes(checkpoint, dtype, quant)
    for span in ((1, 3), (0, 2), (3, 4)):
        held = loaded_bytes(load_stack(checkpoint, *span, dtype=dtype, quant=quant))
        assert sizes.span_bytes(*span) == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_counts_the_head_even_when_it_is_the_embedding(tiny_model: Get, tied: bool) -> None:
    model = tiny_model("llama", tied)
    sizes = plan_bytes(model.checkpoint, "float32")
    assert sizes.embedding_bytes == sizes.head_bytes == 96 * 32 * 4
    assert sizes.is_tied == tied == is_tied(model.whole)
    assert sizes.other_bytes == 32 * 4
    assert len(sizes.block_bytes) == BLOCKS


def test_one_more_token_costs_what_its_keys_and_values_take(tiny_model: Get) -> None:
    checkpoint = tiny_model("llama", False).checkpoint
    per_block = 2 * 2 * 8
    assert cache_bytes_per_token(load_stack(checkpoint, 1, 4)) == 3 * per_block * 4
    assert cache_bytes_per_token(load_stack(checkpoint, 0, 1, dtype="bfloat16")) == per_block * 2


def test_speeds_are_measured_for_blocks_and_for_a_head_that_is_there(llama: TinyModel) -> None:
    middle = measure(load_stack(llama.checkpoint, 1, 3), seconds=0.05)
    assert middle.decode_seconds_per_block > 0
    assert middle.prefill_seconds_per_block_token > 0
    assert middle.head_seconds == 0
    assert middle.prefill_seconds_per_block_token < middle.decode_seconds_per_block
    assert measure(load_stack(llama.checkpoint, 5, 6), seconds=0.05).head_seconds >= 0


def test_measuring_goes_on_beyond_the_context(llama: TinyModel) -> None:
    assert measure(load_stack(llama.checkpoint, 0, 1), seconds=0.5).decode_seconds_per_block > 0


def test_some_memory_is_free() -> None:
    assert 2**20 < free_memory_bytes("cpu") < 2**50


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "zamba2"])
@pytest.mark.parametrize("span", [(0, 2), (2, 5), (4, 6)])
def test_families_that_need_more_than_hidden_states_are_measured_too(
    tiny_model: Get, family: str, span: tuple[int, int]
) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, *span)
    assert measure(stack, seconds=0.05).prefill_seconds_per_block_token > 0
    assert cache_bytes_per_token(stack) >= 0
