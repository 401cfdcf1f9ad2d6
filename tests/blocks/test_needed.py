"""The shards a span is said to need are those that its loading reads, no fewer and no more."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from tiny_models import BLOCKS, FAMILIES, TinyModel

from blocks.checkpoint import open_checkpoint
from blocks.errors import CheckpointError
from blocks.load import load_stack
from blocks.needed import needed_shards, needed_tensors

Get = Callable[[str, bool], TinyModel]
Reads = list[tuple[str, int]]
SPANS = [(0, 2), (2, 5), (5, 6), (0, 6)]
MIXTRAL = {**FAMILIES["llama"], "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A mixtral, whose checkpoints name experts one by one and whose modules hold them fused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "mixtral", MIXTRAL)
        return tiny_models.build("mixtral", tmp_path_factory.mktemp("mixtral"), tied=False)


def names(reads: Reads) -> set[str]:
    return {name for name, _ in reads}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tensors_a_span_needs_are_those_that_loading_it_reads(
    tiny_model: Get, reads: Reads, family: str, tied: bool
) -> None:
    checkpoint = tiny_model(family, tied).checkpoint
    for start, stop in SPANS:
        reads.clear()
        load_stack(checkpoint, start, stop)
        assert needed_tensors(checkpoint, start, stop) == names(reads)


def test_fused_experts_are_found_by_their_old_names(mixtral: TinyModel, reads: Reads) -> None:
    checkpoint = mixtral.checkpoint
    assert any("block_sparse_moe.experts.3.w1" in name for name in checkpoint.tensors)
    for start, stop in SPANS:
        reads.clear()
        load_stack(checkpoint, start, stop)
        needed = needed_tensors(checkpoint, start, stop)
        assert needed == names(reads)
        assert any("experts.3.w1" in name for name in needed)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_of_the_model_without_its_head_is_found_by_its_shorter_names(
    tiny_model: Get, tmp_path: Path, reads: Reads, family: str
) -> None:
    inner = tiny_model(family, True).whole.base_model
    inner.save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert not any(name.startswith(("model.", "transformer.")) for name in checkpoint.tensors)
    for start, stop in SPANS:
        reads.clear()
        load_stack(checkpoint, start, stop)
        assert needed_tensors(checkpoint, start, stop) == names(reads) != set()


@pytest.mark.parametrize(("start", "stop"), SPANS)
def test_a_span_loads_from_its_shards_alone_and_not_from_fewer(
    mixtral: TinyModel, tmp_path: Path, start: int, stop: int
) -> None:
    whole = mixtral.checkpoint
    needed = needed_shards(whole, start, stop)
    folder = Path(shutil.copytree(whole.folder, tmp_path / "copy"))
    checkpoint = open_checkpoint(folder)
    for shard in set(whole.shards) - set(needed):
        (folder / shard).unlink()
    load_stack(checkpoint.only(needed), start, stop)
    for shard in needed:
        with pytest.raises(CheckpointError, match=r"is missing|is not whole"):
            load_stack(checkpoint.only(set(needed) - {shard}), start, stop)
    assert (len(needed) == len(whole.shards)) == (start == 0 and stop == BLOCKS)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (-1, 2), (4, BLOCKS + 1)])
def test_blocks_that_the_model_lacks_need_nothing_that_could_be_named(
    mixtral: TinyModel, start: int, stop: int
) -> None:
    with pytest.raises(ValueError, match="not within 0:6"):
        needed_shards(mixtral.checkpoint, start, stop)
