"""Equal weights have equal digests, others have not, however the spans are cut."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, FAMILIES, TinyModel

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.digest import SAMPLE_BYTES, SAMPLES, block_digests, tensors_by_block
from blocks.errors import CheckpointError

SIZE = 6
Get = Callable[[str, bool], TinyModel]


def changed(checkpoint: Checkpoint, folder: Path, tensor: str) -> Checkpoint:
    """A copy of which one tensor has other values."""
    shutil.copytree(checkpoint.folder, folder, dirs_exist_ok=True)
    shard = folder / checkpoint.tensors[tensor].shard
    tensors = load_file(shard)
    tensors[tensor] = tensors[tensor] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    return open_checkpoint(folder)


def differing(one: Checkpoint, other: Checkpoint) -> list[int]:
    pairs = zip(
        block_digests(one, 0, BLOCKS, SIZE), block_digests(other, 0, BLOCKS, SIZE), strict=True
    )
    return [block for block, (a, b) in enumerate(pairs) if a != b]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_digest_does_not_depend_on_how_the_span_is_cut(
    tiny_model: Get, family: str, tied: bool
) -> None:
    checkpoint = tiny_model(family, tied).checkpoint
    whole = block_digests(checkpoint, 0, BLOCKS, SIZE)
    assert len(set(whole)) == BLOCKS
    assert all(len(digest) == SIZE for digest in whole)
    for start, stop in ((0, 1), (0, 2), (2, 5), (5, 6), (3, 6)):
        assert block_digests(checkpoint, start, stop, SIZE) == whole[start:stop]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_stands_in_some_digest(tiny_model: Get, family: str) -> None:
    checkpoint = tiny_model(family, False).checkpoint
    found = tensors_by_block(checkpoint, 0, BLOCKS)
    assert {name for names in found.values() for name in names} == set(checkpoint.tensors)


def test_another_weight_in_a_block_changes_its_digest_and_no_other(
    tiny_model: Get, tmp_path: Path
) -> None:
    checkpoint = tiny_model("llama", False).checkpoint
    tensor = "model.layers.3.mlp.up_proj.weight"
    assert differing(checkpoint, changed(checkpoint, tmp_path, tensor)) == [3]


@pytest.mark.parametrize(
    ("tensor", "tied", "blocks"),
    [
        ("model.embed_tokens.weight", False, [0]),
        ("lm_head.weight", False, [5]),
        ("model.embed_tokens.weight", True, [0, 5]),
    ],
)
def test_another_end_changes_the_digest_of_the_block_beside_it(
    tiny_model: Get, tmp_path: Path, tensor: str, tied: bool, blocks: list[int]
) -> None:
    checkpoint = tiny_model("llama", tied).checkpoint
    assert differing(checkpoint, changed(checkpoint, tmp_path, tensor)) == blocks


def test_only_samples_are_read(tiny_model: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, read = tiny_model("llama", False).checkpoint, []
    from blocks import digest

    plain = digest._bytes_at

    def counted(file: object, name: str, start: int) -> bytes:
        read.append(plain(file, name, start))
        return read[-1]

    monkeypatch.setattr(digest, "_bytes_at", counted)
    block_digests(checkpoint, 1, 3, SIZE)
    assert len(read) == 2 * SAMPLES
    assert max(map(len, read)) <= SAMPLE_BYTES


def test_a_shard_that_cannot_be_read_is_named(tiny_model: Get, tmp_path: Path) -> None:
    checkpoint = tiny_model("llama", False).checkpoint
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    copy = open_checkpoint(tmp_path)
    shard = copy.tensors["model.layers.2.mlp.up_proj.weight"].shard
    (tmp_path / shard).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=shard):
        block_digests(copy, 2, 3, SIZE)


def test_blocks_that_the_model_does_not_have_are_refused(tiny_model: Get) -> None:
    with pytest.raises(ValueError, match="not within"):
        block_digests(tiny_model("llama", False).checkpoint, 5, 7, SIZE)


def test_eight_bit_floats_have_digests_too(tmp_path: Path) -> None:
    from safetensors import safe_open

    from blocks.digest import _bytes_at

    values = torch.arange(8, dtype=torch.uint8)
    save_file({"w": values.view(torch.float8_e4m3fn)}, tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert _bytes_at(file, "w", 6) == bytes([6, 7])
