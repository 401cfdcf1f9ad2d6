"""A few bytes that stand for the weights of a block, so that replicas can be compared.

Samples of the checkpoint's own bytes are hashed, at places drawn by the names alone: whoever holds
the same weights, in whatever format it computes, comes to the same digest, after reading some
hundred pages. It finds other weights and damaged files, not a single bit that fell over.

1. The digest of a block is a function of the names, dtypes, shapes and bytes of its tensors.
2. The first block's also stands for the embedding, the last one's for the norm and the head.
3. Only pages that are hashed are read, and only of shards that are here.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from random import Random
from typing import Any

import torch

from blocks.carve import anatomy
from blocks.checkpoint import Checkpoint, open_shard
from blocks.hf.loading import landing
from blocks.needed import empty_model

SAMPLES = 64  # of each block and of each end
SAMPLE_BYTES = 4096


def block_digests(checkpoint: Checkpoint, start: int, stop: int, size: int) -> tuple[bytes, ...]:
    """Return `size` bytes for each of the blocks `start:stop`.

    CheckpointError names a shard that cannot be read, ValueError says that the model has no such
    blocks.
    """
    if not 0 <= start < stop <= checkpoint.blocks:
        raise ValueError(f"blocks {start}:{stop} are not within 0:{checkpoint.blocks}")
    tensors = tensors_by_block(checkpoint, start, stop)
    shards = {checkpoint.tensors[name].shard for names in tensors.values() for name in names}
    files = {shard: open_shard(checkpoint, shard) for shard in shards}
    return tuple(_digest(checkpoint, files, tensors[block], size) for block in range(start, stop))


def tensors_by_block(checkpoint: Checkpoint, start: int, stop: int) -> dict[int, list[str]]:
    """Return the checkpoint's names of each block's tensors, with those of an end at its block.

    What an end needs is asked of a stack of that one block, so that the answer does not depend on
    how long a span is.
    """
    found: dict[int, list[str]] = defaultdict(list)
    for name, block in _places(checkpoint, start, stop):
        if block is not None:
            found[block].append(name)
    last = checkpoint.blocks - 1
    for end in {0, last} & set(range(start, stop)):
        ends = _places(checkpoint, end, end + 1)
        found[end] += [name for name, block in ends if block is None]
    return {block: sorted(names) for block, names in found.items()}


def _places(checkpoint: Checkpoint, start: int, stop: int) -> list[tuple[str, int | None]]:
    """What lands in the stack `start:stop`, each with its block, None outside the blocks."""
    model = empty_model(checkpoint, start, stop)
    path = anatomy(model).path + "."
    return [
        (name, int(to.removeprefix(path).partition(".")[0]) if to.startswith(path) else None)
        for name, to in landing(model, checkpoint.tensors).items()
    ]


def _digest(
    checkpoint: Checkpoint, files: Mapping[str, Any], names: Sequence[str], size: int
) -> bytes:
    """Hash the tensors' descriptions, and samples of their bytes as if they lay in one row."""
    entries = [checkpoint.tensors[name] for name in names]
    described = [
        (name, entry.dtype, entry.shape) for name, entry in zip(names, entries, strict=True)
    ]
    digest = blake2b(repr(described).encode(), digest_size=size)
    ends, total = [], 0
    for entry in entries:
        total += entry.byte_count
        ends.append(total)
    draw = Random(repr(described))
    for _ in range(SAMPLES if total else 0):
        place = draw.randrange(total)
        number = bisect_right(ends, place)
        entry, within = entries[number], place - (ends[number] - entries[number].byte_count)
        digest.update(_bytes_at(files[entry.shard], names[number], within))
    return digest.digest()


def _bytes_at(file: Any, name: str, start: int) -> bytes:
    """Up to SAMPLE_BYTES of a tensor from this byte on; the tensor itself stays on disk."""
    raw = file.get_tensor(name).reshape(-1).view(torch.uint8)
    return bytes(raw[start : start + SAMPLE_BYTES].numpy().tobytes())
