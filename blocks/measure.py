"""What a span costs, in seconds and bytes: measured where it can be, counted where it must be.

1. Speeds are medians of real runs of the loaded blocks; the first run of each kind only warms up.
2. Byte plans come from the model's shapes, before any weight is loaded, and are what a loaded
   stack takes, up to small tensors that a family keeps in float32.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from blocks.cache import StackCache
from blocks.carve import find_layers, is_tied
from blocks.checkpoint import Checkpoint
from blocks.errors import CheckpointError
from blocks.hf.models import causal_class, text_config
from blocks.hf.quantizing import layer_targets
from blocks.load import Dtype, resolve_dtype
from blocks.packed import packs_tied
from blocks.quantize import Quant
from blocks.stack import Stack

# A typical short conversation, and a chunk that keeps a CPU's matrix units busy.
_PAST_TOKENS = 64
_PREFILL_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of work, for one row."""

    decode_seconds_per_block: float  # one token after a short past
    prefill_seconds_per_block_token: float  # each token of a chunk
    head_seconds: float  # final norm and head for one position; 0 without a head


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of memory that the parts of a model take once loaded."""

    block_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int  # also where the head is the embedding's matrix (see `span_bytes`)
    other_bytes: int  # all else outside the blocks: norms, positions
    is_tied: bool  # who has both ends holds one matrix; not so where a tied head is packed

    def span_bytes(self, start: int, stop: int) -> int:
        """What a stack of the blocks `start:stop` takes, ends included, a shared matrix once."""
        holds_first, holds_last = start == 0, stop == len(self.block_bytes)
        total = sum(self.block_bytes[start:stop])
        if holds_first:
            total += self.embedding_bytes
        if holds_last and not (holds_first and self.is_tied):
            total += self.head_bytes
        return total + (self.other_bytes if holds_first or holds_last else 0)


def measure(stack: Stack, seconds: float = 2.0) -> Speed:
    """Time the stack's blocks and head with random hidden states, within about `seconds`."""
    blocks, share = stack.stop - stack.start, seconds / 3
    past, chunk = (
        min(count, stack.context_length // 2) for count in (_PAST_TOKENS, _PREFILL_TOKENS)
    )
    cache = stack.new_cache()
    _Sample(stack, past).run(cache)
    token, prompt = _Sample(stack, 1), _Sample(stack, chunk)

    def decode(logits_for: int | None = None) -> torch.Tensor:
        if cache.length + 1 > stack.context_length:
            cache.rollback(0)
        return token.run(cache, logits_for)

    plain = _median_seconds(decode, share)
    with_head = _median_seconds(lambda: decode(1), share) if stack.holds_head else plain
    prefill = _median_seconds(lambda: prompt.run(stack.new_cache()), share)
    return Speed(plain / blocks, prefill / (blocks * chunk), max(with_head - plain, 0.0))


def cache_bytes_per_token(stack: Stack) -> int:
    """Bytes that one more token adds to a short session's cache, seen in a real step.

    0 for families whose state does not grow. Buffers double, so a session may take twice that.
    """
    cache, token = stack.new_cache(), _Sample(stack, 1)
    token.run(cache)
    one = cache.used_byte_count
    token.run(cache)
    return int(cache.used_byte_count - one)


def plan_bytes(
    checkpoint: Checkpoint,
    dtype: Dtype,
    quant: Quant = "none",
    *,
    device: str = "cpu",
    packs: bool = True,
) -> Sizes:
    """Count what each part of the checkpoint's model takes in `dtype`, without reading weights.

    With `quant`, as much of the blocks as can be is held in that format on the device. `packs` as
    `load_stack` does on this CPU; False for machines elsewhere.
    """
    model = _sketched(checkpoint)
    held_in = resolve_dtype(checkpoint, dtype)
    itemsize = held_in.itemsize

    def taken(*modules: nn.Module | None) -> int:
        weights = {one for module in modules if module for one in module.parameters()}
        return int(sum(weight.numel() for weight in weights) * itemsize)

    path, layers = find_layers(model)
    saved = [0] * len(layers)
    if quant != "none":
        for number, layer in enumerate(layers):
            for target in layer_targets(model, layer, f"{path}.{number}", quant, device):
                weight = model.get_parameter(target.path)
                saved[number] += weight.numel() * itemsize - target.byte_count
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    may_pack = packs and torch.device(device).type == "cpu"
    is_packed = may_pack and head is not None and packs_tied(head.weight.numel(), held_in)
    return Sizes(
        block_bytes=tuple(taken(layer) - less for layer, less in zip(layers, saved, strict=True)),
        embedding_bytes=taken(embedding),
        head_bytes=taken(head),
        other_bytes=taken(model) - taken(layers, embedding, head),
        is_tied=is_tied(model) and not is_packed,
    )


def _sketched(checkpoint: Checkpoint) -> Any:
    """The model without weights. CheckpointError if transformers makes none of its config."""
    try:
        config = text_config(checkpoint.config)
        with torch.device("meta"):
            return causal_class(config)(config)
    except CheckpointError:
        raise
    except Exception as error:  # a family's own code, on values nobody checked
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"transformers makes no model of {checkpoint.folder / 'config.json'} ({reason}); "
            "fetch it again"
        ) from error


class _Sample:
    """So many random hidden states, and whatever the family needs beside them."""

    def __init__(self, stack: Stack, tokens: int) -> None:
        self._stack = stack
        self._hidden, self._sides = stack.sample(tokens)

    def run(self, cache: StackCache, logits_for: int | None = None) -> torch.Tensor:
        """Go on from the cache."""
        return self._stack.run(
            self._hidden,
            cache=cache,
            start=cache.length,
            logits_for=logits_for,
            sides=dict(self._sides),
        )


def _median_seconds(step: Callable[[], torch.Tensor], seconds: float) -> float:
    """The median of as many runs as fit, at least three, after one that does not count."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 4 or time.perf_counter() < end:
        begun = time.perf_counter()
        step().flatten()[-1].item()  # waits for the device
        taken.append(time.perf_counter() - begun)
    return median(taken[1:])
