"""Fixtures of the tests of `blocks`: tiny models, built once per run, and the shared data."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
from tiny_models import TinyModel

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
