"""A folder of weights, checked before anything of it is loaded.

1. Only headers are read: opening a checkpoint of any size costs milliseconds and no tensor data.
2. A `Checkpoint` that exists is whole: every shard has the length its header calls for, and holds
   the tensors that the index says it holds. What is inside the tensors is not checked. A shard
   that has yet to be fetched is known by its head, the header with the 8 bytes before it.
3. Nothing is fetched from anywhere and no code of the checkpoint is run; only safetensors are read.
4. Two folders with one fingerprint compute the same, whatever the folders are called.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blocks.config import context_length, json_object, length_scaling, positive, read_config
from blocks.errors import CheckpointError
from blocks.generation import Generation, read_generation
from blocks.hf.models import PretrainedConfig, decoder_config

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

CARD_FORMAT = 1

_ANY_VOCABULARY = 1 << 20

# safetensors itself refuses longer headers
_HEADER_BYTES_LIMIT = 100_000_000
_LENGTH_BYTES = 8  # before the header: its length, little-endian


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as its shard's header describes it; `dtype` is safetensors' name, as "BF16"."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    byte_count: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A whole checkpoint in a folder. `config` is the decoder's part of a composite model's."""

    folder: Path
    config: PretrainedConfig
    tensors: Mapping[str, TensorEntry]
    shards: tuple[str, ...]
    blocks: int
    hidden_size: int
    vocabulary_size: int
    context_length: int  # positions; steps beyond it are refused
    model_type: str
    shard_bytes: Mapping[str, int] = field(default_factory=dict)  # of every shard, whole

    @property
    def absent(self) -> tuple[str, ...]:
        """The shards whose files are not in the folder now."""
        return tuple(shard for shard in self.shards if not (self.folder / shard).is_file())

    def only(self, shards: Iterable[str]) -> "Checkpoint":
        """The same checkpoint, of which only these shards are opened.

        CheckpointError names one that is not here, or is not what its head said.
        """
        kept = tuple(sorted(set(shards)))
        for shard in kept:
            head = _shard_head(self.folder, shard)
            if not all(self._knows(name, entry) for name, entry in head.entries.items()):
                raise CheckpointError(
                    f"shard {self.folder / shard} holds other tensors than its header announced; "
                    "fetch it again"
                )
        return replace(self, shards=kept)

    def _knows(self, name: str, entry: TensorEntry) -> bool:
        known = self.tensors.get(name)
        return known is not None and (known.dtype, known.shape) == (entry.dtype, entry.shape)

    @property
    def weight_map(self) -> dict[str, str]:
        """The shard of every tensor."""
        return {name: entry.shard for name, entry in self.tensors.items()}

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """The bytes of every tensor on disk."""
        return {name: entry.byte_count for name, entry in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class _Head:
    """What a shard's header says: its tensors, and the bytes of the whole shard."""

    entries: Mapping[str, TensorEntry]
    byte_count: int


def open_checkpoint(folder: Path, heads: Path | None = None) -> Checkpoint:
    """Return the checkpoint in `folder`, checked as far as headers go, or raise CheckpointError.

    A shard that is not in `folder` may have its head in the folder `heads`, under the same name.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is an unknown folder: it has no config.json; name the folder of a model"
        )
    shards, index = _shards(folder, heads)
    found = {shard: _shard_head(folder, shard, heads) for shard in shards}
    tensors: dict[str, TensorEntry] = {}
    for head in found.values():
        tensors.update(head.entries)
    for name, shard in index.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(
                f"{INDEX_FILE} of {folder} puts tensor {name} in {shard}, which lacks it; "
                "fetch the checkpoint again"
            )
    config = read_config(folder)
    text = decoder_config(config)
    widest = max((size for entry in tensors.values() for size in entry.shape), default=0)
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=tensors,
        shards=shards,
        blocks=positive(text, "num_hidden_layers", folder, len(tensors)),
        hidden_size=positive(text, "hidden_size", folder, widest),
        # a table that is missing is told by its name when it is loaded
        vocabulary_size=positive(text, "vocab_size", folder, max(widest, _ANY_VOCABULARY)),
        context_length=context_length(text),
        model_type=str(text.model_type),
        shard_bytes={shard: head.byte_count for shard, head in found.items()},
    )


def shard_names(folder: Path) -> tuple[str, ...]:
    """The one shard that is whole by itself, if it is in `folder` or there is no index; else those
    that the index names: transformers' own order.

    CheckpointError for an index that cannot be followed.
    """
    if (folder / SINGLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        return (SINGLE_FILE,)
    return tuple(sorted(set(_index(folder).values())))


def head_bytes(beginning: bytes) -> int:
    """How many bytes a shard's head takes, by the first 8 or more bytes of the shard.

    CheckpointError if they are the beginning of no safetensors file.
    """
    length = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    if len(beginning) < _LENGTH_BYTES or length > _HEADER_BYTES_LIMIT:
        raise CheckpointError("a shard is no safetensors file; choose another model")
    return _LENGTH_BYTES + length


def open_shard(checkpoint: Checkpoint, shard: str) -> Any:
    """Return safetensors' handle of a shard, open as long as it lives. CheckpointError names it."""
    path = checkpoint.folder / shard
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path} cannot be read ({error}); fetch it again") from error


def small_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files beside the weights that a client needs, by name; those that exist."""
    paths = {name: checkpoint.folder / name for name in SMALL_FILES}
    return {name: path for name, path in paths.items() if path.is_file()}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hex sha256 of what makes two checkpoints the same model: names, shards, dtypes and shapes
    of the tensors, and every byte of the small files, the config among them.

    The weights themselves are not read; digests of blocks are what catches damage there.
    """
    facts = {
        "tensors": {
            name: [entry.shard, entry.dtype, list(entry.shape)]
            for name, entry in checkpoint.tensors.items()
        },
        "files": {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in small_files(checkpoint).items()
        },
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a client without torch must know of the model, as JSON can hold it.

    It is the same wherever the checkpoint lies: the name is that of its architecture.
    Ends of sequence are those at which transformers' `generate` stops: see `read_generation`.
    `length_scaling` is there if positions go by length.
    """
    generation = generation_of(checkpoint)
    scaling = length_scaling(checkpoint.config)
    return {
        "format": CARD_FORMAT,
        "name": str(next(iter(checkpoint.config.architectures or ()), checkpoint.model_type)),
        "model_type": checkpoint.model_type,
        "blocks": checkpoint.blocks,
        "hidden_size": checkpoint.hidden_size,
        "vocabulary_size": checkpoint.vocabulary_size,
        "context_length": checkpoint.context_length,
        "end_of_sequence_ids": generation.end_ids,
        "begin_of_sequence_id": generation.begin_id,
        "generation": generation.settings,
        **({"length_scaling": scaling.told()} if scaling else {}),
    }


def generation_of(checkpoint: Checkpoint) -> Generation:
    """What the checkpoint's files say of how transformers' `generate` is to choose."""
    return read_generation(checkpoint.folder, checkpoint.vocabulary_size)


def _shards(folder: Path, heads: Path | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The shards' file names, and the shard of each tensor by the index (empty without one)."""
    places = [folder] if heads is None else [folder, heads]
    if any((place / SINGLE_FILE).is_file() for place in places):
        return (SINGLE_FILE,), {}
    if (folder / INDEX_FILE).is_file():
        index = _index(folder)
        return tuple(sorted(set(index.values()))), index
    others = sorted(path.name for path in folder.glob("*.bin"))
    named = sorted(one.name for one in folder.glob("*.safetensors") if "-of-" not in one.name)
    held = f"only {others[0]}, which can run code when read" if others else "no weights"
    held = f"only {named[0]}, a name that transformers does not look for" if named else held
    raise CheckpointError(f"{folder} holds {held}; it must hold {SINGLE_FILE} or {INDEX_FILE}")


def _index(folder: Path) -> dict[str, str]:
    """The shard of each tensor by the index. CheckpointError for one that cannot be followed."""
    index = json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; fetch it again")
    for shard in index.values():
        # an index may come from a stranger: it must not lead out of the folder
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} names {shard!r}, which is no file name")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX_FILE} names {shard}; only .safetensors are read"
            )
    return index


def _shard_head(folder: Path, shard: str, heads: Path | None = None) -> _Head:
    """What a shard says of itself. CheckpointError if it is not whole, or not here nor its head."""
    path = folder / shard
    if path.is_file():
        head, size = _read_head(path), path.stat().st_size
        if size != head.byte_count:
            raise CheckpointError(
                f"shard {path} has {size} bytes and its header calls for {head.byte_count}; "
                "it was cut off or damaged, fetch it again"
            )
        return head
    if heads is not None and (heads / shard).is_file():
        return _read_head(heads / shard)
    raise CheckpointError(f"shard {path} is missing; fetch the checkpoint again")


def _read_head(path: Path) -> _Head:
    """Read a shard's header, or a head. CheckpointError if it is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _HEADER_BYTES_LIMIT):
            raise CheckpointError(f"shard {path} was cut off in its header; fetch it again")
        raw = file.read(length)
    try:
        entries = {
            name: (str(value["dtype"]), tuple(map(int, value["shape"])), *value["data_offsets"])
            for name, value in json.loads(raw).items()
            if name != "__metadata__"
        }
        end = max((stop for _, _, _, stop in entries.values()), default=0)
        tensors = {
            name: TensorEntry(path.name, dtype, shape, stop - start)
            for name, (dtype, shape, start, stop) in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"shard {path} has a damaged header; fetch it again") from error
    return _Head(tensors, _LENGTH_BYTES + length + end)
