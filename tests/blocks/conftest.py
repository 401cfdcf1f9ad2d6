"""Fixtures of the tests of `blocks`: tiny models, built once per run, and the shared data."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from tiny_models import BLOCKS, TinyModel

import blocks.checkpoint
from blocks.executor import Executor
from blocks.load import load_stack
from blocks.thread import ComputeThread

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], TinyModel]:
    """A function (family, tied) that builds each model once."""
    built: dict[tuple[str, bool], TinyModel] = {}

    def get(family: str, tied: bool) -> TinyModel:
        if (family, tied) not in built:
            folder = tmp_path_factory.mktemp(family)
            built[family, tied] = tiny_models.build(family, folder, tied=tied)
        return built[family, tied]

    return get


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str, bool], TinyModel]) -> TinyModel:
    """A llama with an untied head."""
    return tiny_model("llama", False)


@pytest.fixture(scope="module")
def thread() -> Iterator[ComputeThread]:
    """A running compute thread."""
    with ComputeThread(1) as thread:
        yield thread


@pytest.fixture
def whole(llama: TinyModel, thread: ComputeThread) -> Iterator[Executor]:
    """An executor of all blocks of the llama."""
    with closing(Executor(load_stack(llama.checkpoint, 0, BLOCKS), thread)) as executor:
        yield executor


class CountedFile:
    """A shard that writes down the name and bytes of every tensor read from it."""

    def __init__(self, inner: Any, reads: list[tuple[str, int]]) -> None:
        self._inner, self._reads = inner, reads

    def keys(self) -> list[str]:
        return list(self._inner.keys())

    def get_slice(self, name: str) -> "CountedSlice":
        return CountedSlice(name, self._inner.get_slice(name), self._reads)


class CountedSlice:
    """A slice of a CountedFile; asking for its shape or dtype reads nothing."""

    def __init__(self, name: str, inner: Any, reads: list[tuple[str, int]]) -> None:
        self._name, self._inner, self._reads = name, inner, reads
        self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._inner[index]
        self._reads.append((self._name, tensor.nbytes))
        return tensor


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The names and bytes of the tensors read from shards from now on."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(
        blocks.checkpoint,
        "safe_open",
        lambda *args, **named: CountedFile(safe_open(*args, **named), found),
    )
    return found
