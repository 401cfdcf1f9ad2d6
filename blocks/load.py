"""Load the blocks of a span from a checkpoint, and nothing else.

1. Only tensors that land in the stack are read, each once and lazily: a span of a model of any
   size costs its own bytes.
2. transformers does the loading, so that all its conversions of old layouts apply.
3. A stack that is returned has every weight from the checkpoint: missing or reshaped tensors are
   refused, never initialised.
"""

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from blocks.carve import carved_class, text_config
from blocks.checkpoint import Checkpoint
from blocks.errors import CheckpointError
from blocks.stack import Stack

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Progress = Callable[[int, int], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a row of the table in transformers' report: name | CONVERSION | details, perhaps in colours
_UNCONVERTED = re.compile(r"^([\w.]+)[^|\n]*\|[^|\n]*CONVERSION", re.MULTILINE)

_SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16"}


class LazySlice:
    """A tensor of a shard that is read when it is indexed, as transformers' loader does it."""

    def __init__(self, source: Any, on_read: Callable[[], None]) -> None:
        self._source, self._on_read = source, on_read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = cast(torch.Tensor, self._source[index])
        self._on_read()
        return tensor

    def get_shape(self) -> list[int]:
        """The shape, without reading."""
        return cast("list[int]", self._source.get_shape())

    def get_dtype(self) -> str:
        """safetensors' name of the dtype, without reading."""
        return cast(str, self._source.get_dtype())


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
    progress: Progress | None = None,
) -> Stack:
    """Return blocks `start:stop` with the ends that belong to them, frozen and ready to run.

    `progress` gets (values read, values in all), from threads of the loader but never from two at
    once. On a CPU without a change of dtype the weights stay pages of the files: leave those be.
    Raises CheckpointError naming the tensor that is missing or has another shape, ValueError for
    blocks that the model does not have.
    """
    if not 0 <= start < stop <= checkpoint.blocks:
        raise ValueError(f"blocks {start}:{stop} are not within 0:{checkpoint.blocks}")
    tally = _Tally(progress)
    config = text_config(checkpoint.config)
    with _quiet() as report:
        try:
            model, found = carved_class(config, start, stop, tally.expect).from_pretrained(
                None,
                config=config,
                state_dict=lazy_tensors(checkpoint, tally.add),
                dtype=resolve_dtype(checkpoint, dtype),
                ignore_mismatched_sizes=True,  # listed, so that we can name them
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, SafetensorError) as error:
            broken = _UNCONVERTED.findall(report.text)
            what = f"tensor {broken[0]} is not whole" if broken else error
            raise CheckpointError(
                f"{checkpoint.folder} could not be loaded ({what}); fetch the checkpoint again"
            ) from error
    _refuse_gaps(checkpoint, found)
    tally.finish()
    return Stack.of(model.requires_grad_(False).to(device), start, stop)


def lazy_tensors(checkpoint: Checkpoint, on_read: Callable[[int], None]) -> dict[str, LazySlice]:
    """Every tensor of the checkpoint, unread; `on_read` is told how many values each has as it is
    read. The files stay open as long as the slices live.
    """
    tensors: dict[str, LazySlice] = {}
    for shard in checkpoint.shards:
        try:
            file: Any = safe_open(checkpoint.folder / shard, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"shard {checkpoint.folder / shard} cannot be read ({error}); fetch it again"
            ) from error
        for name in file.keys():  # noqa: SIM118  # not a mapping
            values = math.prod(checkpoint.tensors[name].shape)
            tensors[name] = LazySlice(file.get_slice(name), partial(on_read, values))
    return tensors


def _refuse_gaps(checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    """CheckpointError for the first weight that transformers had to make up."""
    for name, on_disk, expected in sorted(found["mismatched_keys"]):
        raise CheckpointError(
            f"tensor {name} of {checkpoint.folder} has shape {tuple(on_disk)} where the config "
            f"calls for {tuple(expected)}; fetch the checkpoint again"
        )
    for name in sorted(found["missing_keys"]):
        raise CheckpointError(
            f"tensor {name} is missing in {checkpoint.folder}; fetch the checkpoint again"
        )
    for message in found["error_msgs"]:
        raise CheckpointError(f"{checkpoint.folder} could not be loaded ({message})")


class _Report(logging.Filter):
    """Keeps what transformers reports of its loading, and lets nobody else see it."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text += record.getMessage() + "\n"
        return False


@contextmanager
def _quiet() -> Iterator[_Report]:
    """Within, transformers shows no bars and logs no keys: we drop most of them on purpose.

    Its report is still needed, as no exception names a tensor that could not be converted.
    """
    verbosity, has_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    reporter, report = logging.getLogger(PreTrainedModel.__module__), _Report()
    level = reporter.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reporter.setLevel(logging.WARNING)
    reporter.addFilter(report)
    try:
        yield report
    finally:
        reporter.removeFilter(report)
        reporter.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
