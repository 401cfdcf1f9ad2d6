"""Loading reads what the stack holds and nothing else, and makes up nothing."""

import json
import logging
import math
import pickle  # what must never be read has to be written first
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import write
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, FAMILIES, TinyModel

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.errors import CheckpointError
from blocks.load import has_nan, load_stack, resolve_dtype
from blocks.quantize import Quant

Get = Callable[[str, bool], TinyModel]


def outside(checkpoint: Checkpoint, *parts: str) -> set[str]:
    return {name for name in checkpoint.tensors if any(part in name for part in parts)}


def in_blocks(checkpoint: Checkpoint, span: range) -> set[str]:
    return {
        name
        for name in checkpoint.tensors
        if (found := re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)) and int(found[1]) in span
    }


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_tensors_of_held_blocks_and_ends_are_read_each_once(
    tiny_model: Get, reads: list[tuple[str, int]], family: str, tied: bool
) -> None:
    checkpoint = tiny_model(family, tied).checkpoint
    assert len(checkpoint.shards) > 3
    embedding = outside(checkpoint, "embed_tokens", "word_embeddings.")
    small = outside(checkpoint, "model.norm", "ln_f", "embeddings_layernorm")
    head = outside(checkpoint, "lm_head") or embedding
    for span, ends in (
        (range(2, 5), set()),
        (range(2), embedding | small),
        (range(5, 6), head | small),
    ):
        reads.clear()
        load_stack(checkpoint, span.start, span.stop)
        expected = in_blocks(checkpoint, span) | ends
        assert sorted(reads) == sorted((name, checkpoint.tensor_bytes[name]) for name in expected)
        count = sum(byte_count for _, byte_count in reads)
        assert count < sum(checkpoint.tensor_bytes.values()) * 0.75


def test_progress_rises_to_all_values_of_the_stack(llama: TinyModel) -> None:
    calls: list[tuple[int, int]] = []
    stack = load_stack(llama.checkpoint, 2, 4, progress=lambda *call: calls.append(call))
    layers = stack._carved.parts.layers
    total = sum(weight.numel() for number in (2, 3) for weight in layers[number].parameters())
    assert calls == sorted(calls)
    assert calls[0][0] < total
    assert calls[-1] == (total, total)


def edited(source: Checkpoint, folder: Path, name: str, edit: Any) -> Checkpoint:
    """A copy in one shard in which `edit` has replaced a tensor, or dropped it by None."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in source.shards:
        tensors |= load_file(source.folder / shard)
    changed = edit(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return open_checkpoint(folder)


MISSING = {
    "llama": "model.layers.3.mlp.down_proj.weight",
    "bloom": "h.3.mlp.dense_4h_to_h.bias",
    "gpt2": "h.3.mlp.c_fc.weight",
}


@pytest.mark.parametrize("family", MISSING)
def test_a_missing_tensor_is_refused_by_name_and_only_where_it_is_held(
    tiny_model: Get, tmp_path: Path, family: str
) -> None:
    source = tiny_model(family, False).checkpoint
    name = next(one for one in source.tensors if one.endswith(MISSING[family]))
    broken = edited(source, tmp_path, name, lambda tensor: None)
    with pytest.raises(CheckpointError, match=re.escape(f"{MISSING[family]} is missing")):
        load_stack(broken, 2, 4)
    load_stack(broken, 0, 3)


@pytest.mark.parametrize(
    ("end", "named"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "lm_head.weight"),  # what a stack with the head needs of it
    ],
)
def test_a_missing_end_is_refused_by_name_even_when_tied(
    tiny_model: Get, tmp_path: Path, end: str, named: str
) -> None:
    broken = edited(tiny_model("llama", True).checkpoint, tmp_path, end, lambda tensor: None)
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {named} is missing")):
        load_stack(broken, 4, BLOCKS)
    load_stack(broken, 2, 4)


def test_a_missing_expert_is_refused_by_the_fused_tensors_name(
    tiny_model: Get, tmp_path: Path
) -> None:
    source = tiny_model("qwen3_moe", False).checkpoint
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    broken = edited(source, tmp_path, name, lambda tensor: None)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts\.gate_up_proj"):
        load_stack(broken, 2, 4)


def test_a_reshaped_tensor_is_refused_by_name(llama: TinyModel, tmp_path: Path) -> None:
    broken = edited(llama.checkpoint, tmp_path, MISSING["llama"], lambda tensor: tensor.t())
    reason = rf"{re.escape(MISSING['llama'])} .*\(48, 32\).*\(32, 48\)"
    with pytest.raises(CheckpointError, match=reason):
        load_stack(broken, 2, 4)


def test_a_reshaped_tensor_is_refused_with_the_name_of_its_file(
    llama: TinyModel, tmp_path: Path
) -> None:
    broken = edited(llama.checkpoint, tmp_path, MISSING["llama"], lambda tensor: tensor.t())
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "model.safetensors"))):
        load_stack(broken, 2, 4)


def test_a_renamed_tensor_is_refused_by_the_name_that_is_called_for(
    llama: TinyModel, tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for shard in llama.checkpoint.shards:
        tensors |= load_file(llama.checkpoint.folder / shard)
    tensors[MISSING["llama"].replace("down", "lower")] = tensors.pop(MISSING["llama"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama.checkpoint.folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(f"{MISSING['llama']} is missing")):
        load_stack(open_checkpoint(tmp_path), 2, 4)


def spoilt(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = math.nan
    return tensor


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_with_a_nan_is_refused_by_file_and_name_and_only_where_it_is_held(
    tiny_model: Get, tmp_path: Path, family: str, dtype: Any
) -> None:
    source = tiny_model(family, False).checkpoint
    name = next(one for one in source.tensors if one.endswith(MISSING[family]))
    broken = edited(source, tmp_path, name, spoilt)
    said = rf"tensor {re.escape(name)} of shard {re.escape(str(tmp_path))}.*no numbers"
    with pytest.raises(CheckpointError, match=said):
        load_stack(broken, 2, 4, dtype=dtype)
    load_stack(broken, 0, 3, dtype=dtype)


def test_an_expert_with_a_nan_is_refused_by_its_own_name(tiny_model: Get, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", False).checkpoint
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    broken = edited(source, tmp_path, name, spoilt)
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)} of shard"):
        load_stack(broken, 2, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"])
def test_nan_is_found_and_large_or_infinite_values_are_not_taken_for_it(dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    values = torch.full((3, 700_000), 400.0).to(torch_dtype)  # the sum is beyond float16
    assert not has_nan(values)
    if dtype != "float8_e4m3fn":  # knows no infinity
        values[0, 0], values[0, 1] = math.inf, -math.inf
        assert not has_nan(values)
    values[2, -1] = math.nan
    assert has_nan(values)
    assert not has_nan(torch.ones(3, dtype=torch.int32))
    assert not has_nan(torch.empty(0))


def test_a_pickle_that_calls_itself_safetensors_is_refused_by_name_and_not_run(
    llama: TinyModel, tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    for name in (*llama.checkpoint.shards, "model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_bytes((llama.checkpoint.folder / name).read_bytes())
    shard = tmp_path / llama.checkpoint.shards[1]
    shard.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=re.escape(str(shard))):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


QUANTS: tuple[Quant, ...] = ("int8", "nf4")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensor: None, "is missing"),
        (lambda tensor: tensor.t(), "has shape (192, 128) where the config calls for (128, 192)"),
        (spoilt, "holds values that are no numbers"),
    ],
)
def test_a_broken_tensor_is_refused_when_quantizing_too(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, quant: Quant, edit: Any, said: str
) -> None:
    source = write("llama", tmp_path_factory.getbasetemp() / "broken")
    name = "model.layers.2.mlp.down_proj.weight"
    broken = edited(source, tmp_path, name, edit)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        load_stack(broken, 1, 3, quant=quant, saved=tmp_path / "copies")
    assert name in str(caught.value)
    assert not list((tmp_path / "copies").glob("*"))


@pytest.mark.slow
def test_loading_takes_no_memory_beyond_what_is_held(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "quant_bench.py"
    made = subprocess.run(
        [sys.executable, str(script), "--memory", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=1200,
    )
    found = json.loads(made.stdout)
    assert found["none"]["anonymous_over_span"] <= 0.05
    for quant in QUANTS:
        assert found[quant]["beyond_result_in_blocks"] <= 1.0


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2), (4, BLOCKS + 1)])
def test_blocks_that_the_model_lacks_cannot_be_loaded(
    llama: TinyModel, start: int, stop: int
) -> None:
    with pytest.raises(ValueError, match="not within 0:6"):
        load_stack(llama.checkpoint, start, stop)


def test_loading_prints_nothing(
    llama: TinyModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_stack(llama.checkpoint, 1, 2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_loaded_stack_is_frozen_and_in_the_dtype_asked_for(tiny_model: Get, family: str) -> None:
    stack = load_stack(tiny_model(family, False).checkpoint, 1, 3, dtype="bfloat16")
    assert stack.dtype == torch.bfloat16
    weights = [w for n in (1, 2) for w in stack._carved.parts.layers[n].parameters()]
    assert not any(weight.requires_grad for weight in weights)
    assert not any(weight.is_meta for weight in weights)


def test_auto_takes_the_checkpoints_dtype(llama: TinyModel, tmp_path: Path) -> None:
    assert resolve_dtype(llama.checkpoint, "auto") == torch.float32
    name = "model.embed_tokens.weight"
    half = edited(llama.checkpoint, tmp_path, name, lambda t: t.repeat(99, 1).bfloat16())
    assert resolve_dtype(half, "auto") in (torch.bfloat16, torch.float32)
    assert resolve_dtype(half, "float16") == torch.float16
