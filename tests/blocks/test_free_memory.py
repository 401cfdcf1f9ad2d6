"""What a process may still take is the machine's or its own limit, whichever is less."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from blocks import memory
from blocks.memory import ask_huge_pages, free_memory_bytes, own_memory_bytes

MIB = 1 << 20


def test_without_a_limit_of_its_own_a_process_may_take_what_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_available_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert own_memory_bytes() == free_memory_bytes("cpu") == 100 * MIB


@pytest.mark.parametrize(("taken", "left"), [(30, 20), (49, 1), (60, 0)])
def test_a_limit_of_data_leaves_what_is_not_taken_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: int, left: int
) -> None:
    monkeypatch.setattr(memory, "_available_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_data_bytes", lambda: taken * MIB)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (50 * MIB,) * 2)
    assert own_memory_bytes() == left * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="read where Linux tells it")
def test_data_is_counted_as_the_limit_counts_it() -> None:
    before = memory._data_bytes()
    held = torch.ones(64 * MIB // 4)
    assert 60 * MIB < memory._data_bytes() - before < 80 * MIB
    assert held.sum() == held.numel()


def test_asking_for_huge_pages_changes_no_value() -> None:
    values = torch.arange(4 * MIB, dtype=torch.int32)
    ask_huge_pages(values.data_ptr(), values.nbytes)
    assert torch.equal(values, torch.arange(4 * MIB, dtype=torch.int32))
    assert not ask_huge_pages(0, 0)


def test_a_containers_limit_counts_before_the_machines_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_available_bytes", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text(str(30 * MIB))
    (tmp_path / "memory.max").write_text(str(50 * MIB))
    assert free_memory_bytes("cpu") == 20 * MIB
    (tmp_path / "memory.max").write_text("max")
    assert free_memory_bytes("cpu") == 100 * MIB
