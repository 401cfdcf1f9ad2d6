"""What a config alone tells is what the loaded blocks take."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, FAMILIES, TinyModel
from transformers import AutoConfig

from blocks.errors import CheckpointError
from blocks.forecast import cache_bytes_per_block_token, sketch
from blocks.load import load_stack
from blocks.measure import cache_bytes_per_token, plan_bytes

Get = Callable[[str, bool], TinyModel]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_forecast_to_take_what_it_takes(tiny_model: Get, family: str) -> None:
    checkpoint = tiny_model(family, False).checkpoint
    measured = cache_bytes_per_token(load_stack(checkpoint, 0, BLOCKS))
    forecast = cache_bytes_per_block_token(checkpoint.config, torch.float32)
    assert 0 <= forecast * BLOCKS - measured < BLOCKS
    assert (measured > 0) == (forecast > 0)


def test_compressed_keys_and_values_are_forecast_as_compressed() -> None:
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=2)
    assert cache_bytes_per_block_token(config, torch.bfloat16) == (512 + 64) * 2


def test_a_family_that_does_not_run_without_weights_is_charged_for_full_keys_and_values(
    tiny_model: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_model("llama", False).checkpoint.config

    def fails(*_: object) -> None:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr("blocks.forecast._grown_values", fails)
    assert cache_bytes_per_block_token(config, torch.float32) == 2 * 2 * 8 * 4


def test_a_config_alone_plans_the_bytes_of_the_whole_checkpoint(
    tiny_model: Get, tmp_path: Path
) -> None:
    checkpoint = tiny_model("qwen3_moe", True).checkpoint
    (tmp_path / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    drawn = sketch(tmp_path / "config.json")
    assert plan_bytes(drawn, "bfloat16") == plan_bytes(checkpoint, "bfloat16")
    assert (drawn.blocks, drawn.context_length) == (checkpoint.blocks, checkpoint.context_length)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"model_type": "no such"})])
def test_a_config_of_no_language_model_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        sketch(tmp_path)
