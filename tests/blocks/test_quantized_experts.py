"""A mixture's experts are quantized as they are read: the same bits, and never a stack of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_models import SPAN, write
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.errors import CheckpointError
from blocks.experts import QuantExperts, Unstacked
from blocks.formats import Matrix, quantize
from blocks.load import load_stack
from blocks.quantize import Quant

Get = Callable[[str], Checkpoint]

READ_ONE_BY_ONE = ("mixtral", "qwen3_moe")  # gpt_oss comes in stacks


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A function that writes each family once."""
    folder = tmp_path_factory.mktemp("experts")
    return lambda family: write(family, folder)


class Largest(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed
    """Sees every tensor of numbers that is made, and keeps the size of the largest."""

    values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if torch.is_tensor(one) and one.device.type == "cpu" and one.is_floating_point():
                is_view = any(torch.is_tensor(arg) and one._is_view() for arg in args)
                self.values = max(self.values, 0 if is_view else one.numel())
        return made


def experts_of(stack: Any) -> QuantExperts:
    return next(one for one in stack._carved.model.modules() if isinstance(one, QuantExperts))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", READ_ONE_BY_ONE)
def test_no_tensor_larger_than_an_experts_matrix_is_made_while_experts_are_quantized(
    checkpoint: Get, family: str, quant: Quant
) -> None:
    mixture = checkpoint(family)
    with Largest() as largest:
        stack = load_stack(mixture, *SPAN, quant=quant)
    forms = experts_of(stack).forms.values()
    attention = 128 * 128  # what is made of a linear layer while it is quantized
    assert 0 < largest.values <= max(attention, *(form.outputs * form.inputs for form in forms))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", [*READ_ONE_BY_ONE, "gpt_oss"])
def test_experts_are_held_as_if_their_stack_had_been_quantized(
    checkpoint: Get, family: str, quant: Quant
) -> None:
    held = experts_of(load_stack(checkpoint(family), *SPAN, quant=quant))
    plain: Any = next(
        one
        for one in load_stack(checkpoint(family), *SPAN)._carved.model.modules()
        if hasattr(one, "has_gate") and hasattr(one, "down_proj")
    )
    assert held.forms
    for name, form in held.forms.items():
        for number, weight in enumerate(getattr(plain, name)):
            turned = weight.t() if plain.is_transposed else weight
            right: Matrix = Matrix(form, quantize(turned, form))
            found = held.expert(name, number)
            assert all(torch.equal(found.parts[part], right.parts[part]) for part in form.parts)


def damaged(
    source: Checkpoint, folder: Path, change: Callable[[dict[str, Any]], None]
) -> Checkpoint:
    """The checkpoint in one shard, its tensors changed."""
    tensors: dict[str, Any] = {}
    for shard in source.shards:
        tensors |= load_file(source.folder / shard)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((source.folder / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text())["model_type"] == source.model_type
    return open_checkpoint(folder)


def lose_one(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]


def cut_one(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = tensors[name][:64].clone()


def narrow_all(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "layers.1.block_sparse_moe.experts" in name and "w2" not in name:
            tensors[name] = tensors[name][:, :64].clone()


@pytest.mark.parametrize("change", [lose_one, cut_one, narrow_all])
def test_experts_that_are_missing_or_of_another_shape_are_refused(
    checkpoint: Get, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    broken = damaged(checkpoint("mixtral"), tmp_path, change)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        load_stack(broken, *SPAN, quant="int8")


def test_parts_that_make_no_stack_are_none() -> None:
    one, other = torch.zeros(2, 3), torch.zeros(2, 4)
    for parts in ([[one, one], [one]], [[one, other]], [[one], [other]], [[one], [one[:1]], []]):
        with pytest.raises(ValueError, match="make no stack"):
            Unstacked(parts)
    made = Unstacked([[one, one + 1], [one[:1] + 2, one[:1] + 3]])
    assert made.shape == made.stacked().shape == (2, 3, 3)
    assert torch.equal(made[1], torch.cat([one + 1, one[:1] + 3]))
