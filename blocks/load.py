"""Load the blocks of a span from a checkpoint, and nothing else.

1. Only tensors that land in the stack are read, each once and lazily: a span of a model of any
   size costs its own bytes.
2. transformers does the loading, so that all its conversions of old layouts apply.
3. A stack that is returned has every weight from the checkpoint: missing, reshaped or NaN tensors
   are refused, never initialised or served.
4. A quantized stack is the same whether it was quantized just now or read from a saved copy.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open

from blocks.carve import carved_class, forwards_of
from blocks.checkpoint import Checkpoint, open_shard
from blocks.errors import BlocksError, CheckpointError, Unsupported
from blocks.formats import Kind, is_nf4_fast
from blocks.hf import release
from blocks.hf.forwards import check_takes, takes_of
from blocks.hf.loading import filled, quiet
from blocks.hf.models import PreTrainedModel, text_config
from blocks.hf.quantizing import QuantConfig, span_targets
from blocks.needed import needed_shards
from blocks.packed import pack
from blocks.proven import known_takes
from blocks.quantize import Quant, held_parts, hold
from blocks.saved import BUDGET_BYTES, SAFETENSORS_NAMES, SavedCopies, copy_key
from blocks.stack import Stack

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Progress = Callable[[int, int], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SUMMED = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_PIECE_VALUES = 2**20

_SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16"}


class LazySlice:
    """A tensor of a shard that is read when it is indexed, as transformers' loader does it.

    Indexing raises CheckpointError for values that are no numbers.
    """

    def __init__(self, source: Any, label: str, on_read: Callable[[], None]) -> None:
        self._source, self._label, self._on_read = source, label, on_read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = cast(torch.Tensor, self._source[index])
        if has_nan(tensor):
            raise CheckpointError(f"{self._label} holds values that are no numbers; fetch it again")
        self._on_read()
        return tensor

    def get_shape(self) -> list[int]:
        """The shape, without reading."""
        return cast("list[int]", self._source.get_shape())

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, without reading."""
        return cast(str, self._source.get_dtype())


def has_nan(tensor: torch.Tensor) -> bool:
    """Is any value NaN? One pass at the speed of memory, as a sum takes NaN along."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    if tensor.dtype in _SUMMED and bool(tensor.sum().isfinite()):
        return False
    # rare: infinities, or sums beyond the dtype; in pieces, to take no memory to speak of
    return any(bool(one.float().isnan().any()) for one in tensor.reshape(-1).split(_PIECE_VALUES))


class _Tally:
    """Counts values as the loader's threads read them, and tells `progress`, one at a time."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._read = self._total = 0

    def expect(self, model: PreTrainedModel) -> None:
        """The carved model, still empty, is what will be filled; tied tensors come once."""
        tied = model.all_tied_weights_keys
        self._total = sum(
            weight.numel() for name, weight in model.named_parameters() if name not in tied
        )

    def add(self, values: int) -> None:
        """Some values were read."""
        with self._lock:
            self._read = min(self._read + values, self._total)
            if self._progress is not None:
                self._progress(self._read, self._total)

    def finish(self) -> None:
        """Fused or dropped tensors may leave the count short of what was expected."""
        self.add(self._total)


def resolve_dtype(checkpoint: Checkpoint, dtype: Dtype) -> torch.dtype:
    """The dtype to compute in. "auto" is the checkpoint's own, float32 where that would crawl."""
    if dtype != "auto":
        return _DTYPES[dtype]
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype] += entry.byte_count
    name = _SAFETENSORS_NAMES.get(sizes.most_common(1)[0][0], "float32")
    half_is_fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _DTYPES[name] if half_is_fast else torch.float32


def load_stack(
    checkpoint: Checkpoint,
    start: int,
    stop: int,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    quant: Quant = "none",
    saved: Path | None = None,
    saved_budget_bytes: int = BUDGET_BYTES,
    progress: Progress | None = None,
    packs: bool = True,
    is_trial: bool = False,
) -> Stack:
    """Return blocks `start:stop` with the ends that belong to them, frozen and ready to run.

    `dtype` is what the stack computes in, quantized or not. A quantized span is kept as a copy in
    the folder `saved`, if given, and taken from there the next time; all copies together take no
    more than `saved_budget_bytes`. `progress` gets (values read, values in all), from threads of
    the loader but never from two at once. On a CPU large unquantized matrices, heads too, are
    packed if it `packs` (see `blocks.packed`); other weights, where their dtype is the files', stay
    pages of the files, also of the copies: leave those be. `is_trial`: nothing is known of it yet.
    Raises CheckpointError naming the tensor that is missing, has another shape or is NaN,
    MemoryError if shards cannot be mapped, ValueError for blocks that the model does not have.
    """
    if not 0 <= start < stop <= checkpoint.blocks:
        raise ValueError(f"blocks {start}:{stop} are not within 0:{checkpoint.blocks}")
    release.check()
    opened = set(checkpoint.shards).intersection(needed_shards(checkpoint, start, stop))
    needed = checkpoint.only(opened)
    known = "" if is_trial else known_takes(str(checkpoint.config.model_type))
    span = _Span(needed, start, stop, resolve_dtype(checkpoint, dtype), device, progress, known)
    if quant == "none":
        model = span.load()
    else:
        copies = None if saved is None else SavedCopies(saved, saved_budget_bytes)
        model = span.load_quantized(quant, copies)
    stack = Stack.of(model.requires_grad_(False).to(device), start, stop)
    if packs:
        pack(model, looks_up=start == 0)
    return stack


class _Span:
    """A span that is being loaded: what all ways to load it have in common."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        start: int,
        stop: int,
        dtype: torch.dtype,
        device: str,
        progress: Progress | None,
        known: str,
    ) -> None:
        self._known = known  # to be what the family's forwards take
        self._checkpoint, self._start, self._stop = checkpoint, start, stop
        self._dtype, self._device, self._progress = dtype, device, progress

    def load(
        self,
        config: QuantConfig | None = None,
        held: Mapping[str, Any] | None = None,
        shape: Callable[[PreTrainedModel], None] = lambda model: None,
    ) -> PreTrainedModel:
        """Load from the checkpoint and, if given, from tensors `held` elsewhere.

        `config` quantizes what is read, `shape` changes the empty model before anything is.
        """
        checkpoint, tally = self._checkpoint, _Tally(self._progress)

        def on_carved(model: PreTrainedModel) -> None:
            check_takes(takes_of(forwards_of(model)), self._known)
            tally.expect(model)
            shape(model)

        text = text_config(checkpoint.config)
        kind = carved_class(text, self._start, self._stop, on_carved)
        tensors = {**lazy_tensors(checkpoint, tally.add), **(held or {})}
        with quiet() as report:
            try:
                model, found = filled(kind, text, tensors, self._dtype, config)
            except (RuntimeError, ValueError, SafetensorError, Unsupported) as error:
                if "Cannot allocate memory" in str(error):
                    raise MemoryError(str(error)) from error
                if config is not None and config.failures:
                    raise BlocksError(config.failures[0]) from error
                if isinstance(error, Unsupported):
                    raise
                broken = report.unconverted
                what = f"tensor {broken} is not whole" if broken else error
                raise CheckpointError(
                    f"{checkpoint.folder} could not be loaded ({what}); fetch the checkpoint again"
                ) from error
        _refuse_gaps(checkpoint, found)
        tally.finish()
        return cast(PreTrainedModel, model)

    def load_quantized(self, kind: Kind, copies: SavedCopies | None) -> PreTrainedModel:
        """The quantized model, from a saved copy if there is a good one."""
        if copies is None:
            return self._quantize(kind)
        form = {
            "kind": kind,
            "device": torch.device(self._device).type,
            "dtype": str(self._dtype),
            "packed": str(kind == "nf4" and is_nf4_fast()),
        }
        key = copy_key(self._checkpoint, self._start, self._stop, form)
        path = copies.find(key)
        if path is not None:
            model = self._restore(kind, path)
            if model is not None:
                return model
            copies.drop(path)
        model = self._quantize(kind)
        copies.write(key, held_parts(model))
        return model

    def _quantize(self, kind: Kind) -> PreTrainedModel:
        model = self.load(QuantConfig(kind, self._device, self._dtype))
        model.hf_quantizer.remove_quantization_config(model)
        return model

    def _restore(self, kind: Kind, path: Path) -> PreTrainedModel | None:
        """The model with the parts of a copy; None if they are not what the model holds."""

        def shape(model: PreTrainedModel) -> None:
            for target in span_targets(model, kind, self._device):
                hold(model, target, self._dtype)

        file: Any = safe_open(path, framework="pt")
        held = {name: _Given(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        try:
            model = self.load(held=held, shape=shape)
        except CheckpointError:
            return None  # if the checkpoint is to blame, loading it will say so again
        parts = held_parts(model)
        # transformers may convert what it loads: only tensors that went through untouched are right
        is_same = parts.keys() == held.keys() and all(
            part.data_ptr() == held[name].tensor.data_ptr() for name, part in parts.items()
        )
        return model if is_same else None


class _Given:
    """A tensor that is there already, in the form in which transformers' loader wants it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return SAFETENSORS_NAMES[self.tensor.dtype]


def lazy_tensors(checkpoint: Checkpoint, on_read: Callable[[int], None]) -> dict[str, LazySlice]:
    """Every tensor of the checkpoint, unread; `on_read` is told how many values each has as it is
    read. The files stay open as long as the slices live.
    """
    tensors: dict[str, LazySlice] = {}
    for shard in checkpoint.shards:
        file = open_shard(checkpoint, shard)
        for name in file.keys():  # noqa: SIM118  # not a mapping
            values = math.prod(checkpoint.tensors[name].shape)
            label = f"tensor {name} of shard {checkpoint.folder / shard}"
            tensors[name] = LazySlice(file.get_slice(name), label, partial(on_read, values))
    return tensors


def _refuse_gaps(checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    """CheckpointError for the first weight that transformers had to make up."""
    for name, on_disk, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"tensor {name} of {_file_of(checkpoint, name)} has shape {tuple(on_disk)} where the "
            f"config calls for {tuple(expected)}; fetch the checkpoint again"
        )
    for name in sorted(found["missing_keys"]):
        raise CheckpointError(
            f"tensor {name} is missing in {checkpoint.folder}; fetch the checkpoint again"
        )
    for message in found["error_msgs"]:
        raise CheckpointError(f"{checkpoint.folder} could not be loaded ({message})")


def _file_of(checkpoint: Checkpoint, name: str) -> Path:
    """The shard that holds the tensor, or the folder where transformers made it of several."""
    entry = checkpoint.tensors.get(name)
    return checkpoint.folder / entry.shard if entry else checkpoint.folder
