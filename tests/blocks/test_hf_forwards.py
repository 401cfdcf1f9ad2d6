"""What a family's forward calls its arguments."""

from typing import Any

import pytest
import torch
from torch import nn

from blocks.errors import BlocksError
from blocks.hf.forwards import cache_argument


class Of2024(nn.Module):
    def forward(self, input_ids: Any = None, past_key_values: Any = None) -> Any: ...


class Recurrent(nn.Module):
    def forward(self, input_ids: Any = None, cache_params: Any = None) -> Any: ...


class Newest(nn.Module):
    def forward(self, input_ids: Any = None, cache: Any = None) -> Any: ...


class Xlm(nn.Module):
    def forward(
        self, input_ids: Any = None, cache: dict[str, torch.Tensor] | None = None
    ) -> Any: ...


class Tomorrow(nn.Module):
    def forward(self, input_ids: Any = None, kv_store: Any = None) -> Any: ...


@pytest.mark.parametrize(
    ("inner", "name"),
    [(Of2024(), "past_key_values"), (Recurrent(), "cache_params"), (Newest(), "cache")],
)
def test_the_cache_is_found_by_each_name_that_a_release_gives_it(
    inner: nn.Module, name: str
) -> None:
    assert cache_argument(inner) == name


@pytest.mark.parametrize("inner", [Xlm(), Tomorrow()])
def test_a_forward_without_a_known_name_for_the_cache_is_refused_with_what_it_takes(
    inner: nn.Module,
) -> None:
    with pytest.raises(BlocksError, match=r"takes no cache by a name known here .* but input_ids"):
        cache_argument(inner)
