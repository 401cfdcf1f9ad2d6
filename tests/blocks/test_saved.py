"""Saved copies of quantized spans: the same to the bit, never half of one, never too many."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import SPAN, some_hidden, write
from safetensors import safe_open

import blocks.load
import blocks.saved
from blocks import quantize
from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.load import load_stack
from blocks.quantize import held_parts
from blocks.saved import SavedCopies, copy_key
from blocks.stack import Stack

Get = Callable[[str], Checkpoint]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A function that writes each family once."""
    folder = tmp_path_factory.mktemp("saved")
    return lambda family: write(family, folder)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every matrix that is quantized from now on."""
    found: list[int] = []
    inner = quantize.quantize

    def counted(weight: torch.Tensor, form: Any) -> Any:
        found.append(weight.numel())
        return inner(weight, form)

    monkeypatch.setattr(quantize, "quantize", counted)
    return found


def load(checkpoint: Checkpoint, saved: Path | None, **named: Any) -> Stack:
    return load_stack(
        checkpoint, *SPAN, **{"quant": "nf4", "dtype": "bfloat16", **named}, saved=saved
    )


def copies(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo", "mixtral", "gpt_oss"])
def test_a_second_start_quantizes_nothing_and_is_identical_to_the_bit(
    checkpoint: Get, tmp_path: Path, quantized: list[int], family: str, quant: str
) -> None:
    first = load(checkpoint(family), tmp_path, quant=quant)
    assert quantized
    quantized.clear()
    second = load(checkpoint(family), tmp_path, quant=quant)
    assert not quantized
    before, after = (one._carved.model.state_dict() for one in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], part) for name, part in after.items())
    for tokens in (1, 9):
        assert torch.equal(first.run(some_hidden(tokens)), second.run(some_hidden(tokens)))


def test_ends_come_with_a_restored_span(checkpoint: Get, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    logits = [
        load_stack(checkpoint("llama"), 0, 4, quant="nf4", saved=saved).run(ids, logits_for=0)
        for saved in (None, tmp_path, tmp_path)
    ]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])


def test_nothing_is_saved_of_a_span_that_is_not_quantized(checkpoint: Get, tmp_path: Path) -> None:
    load(checkpoint("llama"), tmp_path, quant="none")
    assert not copies(tmp_path)


@pytest.mark.parametrize("place", [5, 200, -1])
def test_a_damaged_copy_is_told_removed_and_made_anew(
    checkpoint: Get,
    tmp_path: Path,
    quantized: list[int],
    caplog: pytest.LogCaptureFixture,
    place: int,
) -> None:
    right = load(checkpoint("llama"), tmp_path).run(some_hidden(3))
    (path,) = copies(tmp_path)
    good = path.read_bytes()
    broken = bytearray(good)
    broken[place] ^= 1
    path.write_bytes(broken)
    quantized.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load(checkpoint("llama"), tmp_path).run(some_hidden(3)), right)
    assert "is damaged; it will be made anew" in caplog.text
    assert quantized
    assert [one.read_bytes() for one in copies(tmp_path)] == [good]


def test_pages_that_changed_places_are_damage(tmp_path: Path) -> None:
    kept, page = SavedCopies(tmp_path), 4096
    path = kept.write("a" * 32, {"codes": torch.arange(4 * page).view(torch.uint8)})
    assert path is not None
    assert kept.find("a" * 32) == path
    raw = path.read_bytes()
    path.write_bytes(raw[: -2 * page] + raw[-page:] + raw[-2 * page : -page])
    assert kept.find("a" * 32) is None
    assert not copies(tmp_path)


def test_a_truncated_copy_is_made_anew(
    checkpoint: Get, tmp_path: Path, quantized: list[int]
) -> None:
    load(checkpoint("llama"), tmp_path)
    (path,) = copies(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    quantized.clear()
    load(checkpoint("llama"), tmp_path)
    assert quantized
    assert [one.stat().st_size for one in copies(tmp_path)] == [size]


def test_a_copy_that_the_loader_would_convert_is_not_believed(
    checkpoint: Get, tmp_path: Path, quantized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load(checkpoint("llama"), tmp_path).run(some_hidden(3))

    class Converted(blocks.load._Given):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return super().__getitem__(index).flip(0)

    monkeypatch.setattr(blocks.load, "_Given", Converted)
    quantized.clear()
    assert torch.equal(load(checkpoint("llama"), tmp_path).run(some_hidden(3)), right)
    assert quantized


def test_a_key_is_of_one_checkpoint_span_form_and_library(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("llama").folder
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = open_checkpoint(tmp_path)
    keys = [
        copy_key(found, 1, 3, {"kind": "nf4"}),
        copy_key(found, 1, 2, {"kind": "nf4"}),
        copy_key(found, 0, 3, {"kind": "nf4"}),
        copy_key(found, 1, 3, {"kind": "int8"}),
        copy_key(checkpoint("mixtral"), 1, 3, {"kind": "nf4"}),
    ]
    assert copy_key(open_checkpoint(tmp_path), 1, 3, {"kind": "nf4"}) == keys[0]
    shard = tmp_path / found.shards[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")  # other weights, the same header
    os.utime(shard, ns=(1, 1))
    keys.append(copy_key(open_checkpoint(tmp_path), 1, 3, {"kind": "nf4"}))
    monkeypatch.setattr(blocks.saved, "version", lambda name: f"{name} 99")
    keys.append(copy_key(open_checkpoint(tmp_path), 1, 3, {"kind": "nf4"}))
    assert len(set(keys)) == len(keys)


def tensors(count: int) -> dict[str, torch.Tensor]:
    return {"a.codes": torch.arange(count, dtype=torch.uint8), "a.offset": torch.tensor(0.5)}


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    kept = SavedCopies(tmp_path, budget_bytes=1500)
    for number, key in enumerate("abc"):
        path = kept.write(key * 32, tensors(200))
        assert path is not None
        os.utime(path, (1000 + number, 1000 + number))
    assert kept.find("a" * 32) is not None  # used: now b is the oldest
    assert kept.write("d" * 32, tensors(200)) is not None
    assert [kept.find(key * 32) is not None for key in "abcd"] == [True, False, True, True]
    assert kept.write("e" * 32, tensors(250)) is not None
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 1500


def test_a_copy_beyond_the_budget_is_not_kept_and_evicts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = SavedCopies(tmp_path, budget_bytes=600)
    assert kept.write("a" * 32, tensors(100)) is not None
    with caplog.at_level(logging.WARNING):
        assert kept.write("b" * 32, tensors(255)) is not None
        assert kept.write("c" * 32, {"a": torch.zeros(1000)}) is None
    assert "all copies may take 600" in caplog.text
    assert kept.find("b" * 32) is not None


def test_a_copy_is_a_safetensors_file_with_aligned_tensors(checkpoint: Get, tmp_path: Path) -> None:
    parts = held_parts(load(checkpoint("llama"), tmp_path)._carved.model)
    (path,) = copies(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == parts.keys()
        assert all(torch.equal(file.get_tensor(name), part) for name, part in parts.items())
        aligned = [file.get_tensor(name).data_ptr() % 64 == 0 for name in parts]
    assert all(aligned)


def test_a_copy_that_cannot_be_written_costs_nothing_but_the_copy(
    checkpoint: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with caplog.at_level(logging.WARNING):
        load(checkpoint("llama"), blocked / "copies")
    assert "no copy of this span is kept" in caplog.text


def test_a_copy_whose_writing_broke_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert SavedCopies(tmp_path).write("a" * 32, tensors(100)) is None
    assert not copies(tmp_path)


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / "a.1.partial", tmp_path / "b.1.partial"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    SavedCopies(tmp_path).write("c" * 32, tensors(10))
    assert not old.exists()
    assert fresh.exists()
