"""Fixtures of the tests of `blocks`: tiny models, built once per run, and the shared data."""

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import tiny_models
import torch
from tiny_models import BLOCKS, TinyModel

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
