"""The blocks of a span, loaded here and run as the whole model would run them.

1. Whatever a family does before its first layer or after its last never touches a span in the
   middle: hidden states are injected at the first block and captured after the last one.
2. A step that raises StepError has changed nothing. After any other error the cache is torn, and
   only position 0 can follow.
3. A stack and its parts run one at a time, in any thread: they share layers and hooks.
4. Nothing here needs gradients: all tensors are inference tensors.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from blocks.cache import StackCache
from blocks.carve import Skip, anatomy
from blocks.checkpoint import context_length
from blocks.errors import BlocksError, StepError

_INTEGERS = (torch.int32, torch.int64)


class _Carved:
    """A loaded, carved model and what is known of it; shared by a stack and its parts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = anatomy(model)
        decoder: PretrainedConfig = model.config.get_text_config(decoder=True)
        self.hidden_size: int = decoder.hidden_size
        self.vocabulary_size: int = decoder.vocab_size
        self.context_length = context_length(decoder)
        embedding = model.get_input_embeddings()
        # some families project between embedding and layers
        self.embedding_size: int = getattr(embedding, "embedding_dim", self.hidden_size)
        inner, whole = _parameters(self.parts.inner.forward), _parameters(model.forward)
        self.inner_takes = inner.keys()
        open_ended = any(one.kind is one.VAR_KEYWORD for one in whole.values())
        self.whole_takes = whole.keys() | (inner.keys() if open_ended else set())
        layer = next(one for one in self.parts.layers if not isinstance(one, Skip))
        weight = next(layer.parameters())
        self.dtype: torch.dtype = next(
            (one.dtype for one in layer.parameters() if one.is_floating_point()), torch.float32
        )
        self.device: torch.device = weight.device

    @contextmanager
    def only(self, start: int, stop: int) -> Iterator[None]:
        """Within, loaded layers outside `start:stop` pass their input on like the others."""
        layers = self.parts.layers
        idle = [
            number
            for number, layer in enumerate(layers)
            if not (start <= number < stop or isinstance(layer, Skip))
        ]
        loaded = {number: layers[number] for number in idle}
        try:
            for number, layer in loaded.items():
                layers[number] = Skip(layer, self.parts.arity)
            yield
        finally:
            for number, layer in loaded.items():
                layers[number] = layer


class Stack:
    """Blocks `start:stop` of a model, with the ends that belong to them.

    `holds_embedding`: takes ids, as it has block 0. `holds_head`: gives logits, as it has the last
    block. `blocks` is how many the whole model has.
    """

    def __init__(self, carved: _Carved, start: int, stop: int) -> None:
        self._carved = carved
        self.start, self.stop = start, stop
        self.blocks = len(carved.parts.layers)
        self.holds_embedding = start == 0
        self.holds_head = stop == self.blocks
        self.dtype, self.device = carved.dtype, carved.device
        self.hidden_size = carved.hidden_size
        self.vocabulary_size = carved.vocabulary_size
        self.context_length = carved.context_length

    @classmethod
    def of(cls, model: PreTrainedModel, start: int, stop: int) -> "Stack":
        """The stack of a loaded model that was carved to `start:stop` (or not at all)."""
        return cls(_Carved(model), start, stop)

    def part(self, start: int, stop: int) -> "Stack":
        """A stack of some of these blocks that shares their weights. StepError if not held."""
        if not self.start <= start < stop <= self.stop:
            raise StepError(f"blocks {start}:{stop} are not within {self.start}:{self.stop}")
        return Stack(self._carved, start, stop)

    def new_cache(self) -> StackCache:
        """An empty cache for one session in these blocks."""
        return StackCache(self._carved.model.config, self.start, self.stop)

    def run(
        self,
        inputs: torch.Tensor,
        *,
        cache: StackCache | None = None,
        start: int = 0,
        mask: torch.Tensor | None = None,
        logits_for: int | None = None,
    ) -> torch.Tensor:
        """Run positions `start` to `start + S` and return hidden states [B, S, ...] or logits.

        `inputs`: integer ids [B, S] (needs the embedding) or floating hidden states [B, S, ...,
        hidden_size]. `start` must be the cache's length, 0 without a cache. `mask` [B, start + S]
        tells the tokens (not 0) from the padding of the whole past. With `logits_for=n` (needs the
        head) float32 logits [B, n, vocabulary] of the last n positions, 0 for all of them. Hidden
        states are those after the last block of the stack, before any final norm.

        Raises StepError, having changed nothing, for what no stack could compute as sent.
        """
        self._check(inputs, cache, start, logits_for)
        rows, tokens = inputs.shape[:2]
        mask = self._checked_mask(mask, rows, start + tokens)
        wanted = tokens if logits_for == 0 else logits_for
        if cache is not None:
            cache.begin(rows)
        with torch.inference_mode():
            shared = {
                "position_ids": self._positions(mask, start, tokens, rows),
                "attention_mask": mask,
                "past_key_values": cache,
                "use_cache": cache is not None,
                "return_dict": True,
            }
            output = self._forward(inputs.to(self.device), shared, wanted)
        if cache is not None:
            cache.advance(tokens)
        return output

    def _forward(
        self, inputs: torch.Tensor, shared: dict[str, Any], wanted: int | None
    ) -> torch.Tensor:
        carved = self._carved
        captured: list[torch.Tensor] = []
        with ExitStack() as undo:
            undo.enter_context(carved.only(self.start, self.stop))
            if inputs.is_floating_point():
                undo.enter_context(self._injecting(inputs.to(self.dtype)))
                size = (*inputs.shape[:2], carved.embedding_size)
                # a tensor of its own, as some families write into it
                shared["inputs_embeds"] = torch.zeros(size, dtype=self.dtype, device=self.device)
            else:
                shared["input_ids"] = inputs.long()
            if wanted is None:
                undo.enter_context(self._capturing(captured))
                carved.parts.inner(**_only(shared, carved.inner_takes))
                return captured.pop()
            shared["logits_to_keep"] = wanted
            logits = carved.model(**_only(shared, carved.whole_takes)).logits
        return logits[:, -wanted:].float()  # some families know no logits_to_keep

    @contextmanager
    def _injecting(self, hidden: torch.Tensor) -> Iterator[None]:
        """Within, the first block gets `hidden` in place of what was computed before it."""

        def inject(
            layer: Any, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden, *args[1:]), named
            name = "hidden_states" if "hidden_states" in named else next(iter(named))
            return args, {**named, name: hidden}

        layer = self._carved.parts.layers[self.start]
        with layer.register_forward_pre_hook(inject, with_kwargs=True):
            yield

    @contextmanager
    def _capturing(self, captured: list[torch.Tensor]) -> Iterator[None]:
        """Within, what the last block gives is put into `captured`."""
        parts = self._carved.parts

        def capture(layer: Any, args: Any, output: Any) -> None:
            if isinstance(output, tuple) != bool(parts.arity):
                raise BlocksError(
                    f"layers of {type(parts.inner).__name__} return another form than its loop "
                    "reads; this family cannot be cut"
                )
            captured.append(output[0] if isinstance(output, tuple) else output)

        with parts.layers[self.stop - 1].register_forward_hook(capture):
            yield

    def _check(
        self, inputs: torch.Tensor, cache: StackCache | None, start: int, logits_for: int | None
    ) -> None:
        if inputs.dim() < 2 or 0 in inputs.shape:
            raise StepError(f"inputs need rows and positions, not shape {tuple(inputs.shape)}")
        if inputs.is_floating_point():
            if inputs.dim() < 3 or inputs.shape[-1] != self.hidden_size:
                raise StepError(
                    f"hidden states end in an axis of {self.hidden_size}, not in shape "
                    f"{tuple(inputs.shape)}"
                )
        else:
            self._check_ids(inputs)
        tokens = inputs.shape[1]
        if logits_for is not None and not (self.holds_head and 0 <= logits_for <= tokens):
            raise StepError(
                f"blocks {self.start}:{self.stop} of {self.blocks} cannot give the logits of the "
                f"last {logits_for} of {tokens} positions"
            )
        held = 0 if cache is None else cache.length
        if start != held:
            raise StepError(f"the step starts at position {start}, but {held} are held")
        if start + tokens > self.context_length:
            raise StepError(f"position {start + tokens} is beyond the context of the model")
        if cache is not None:
            if (cache.start, cache.stop) != (self.start, self.stop):
                raise BlocksError(f"a cache of blocks {cache.start}:{cache.stop} does not fit here")
            if cache.rows not in (None, inputs.shape[0]):
                raise StepError(f"{inputs.shape[0]} rows follow a past of {cache.rows} rows")

    def _check_ids(self, ids: torch.Tensor) -> None:
        if not self.holds_embedding:
            raise StepError(f"blocks {self.start}:{self.stop} take hidden states, not ids")
        if ids.dtype not in _INTEGERS or ids.dim() != 2:
            raise StepError(f"ids are int32 or int64 [rows, positions], not {ids.dtype}")
        # out of range a GPU would abort the process, not raise
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary_size:
            raise StepError(f"ids must be below the vocabulary's {self.vocabulary_size}")

    def _checked_mask(
        self, mask: torch.Tensor | None, rows: int, length: int
    ) -> torch.Tensor | None:
        """The mask as the models take it; None when it hides nothing, which is faster."""
        if mask is None:
            return None
        if tuple(mask.shape) != (rows, length) or mask.is_floating_point():
            raise StepError(
                f"a mask is whole numbers of shape {(rows, length)}, not {tuple(mask.shape)}"
            )
        mask = (mask != 0).to(self.device, torch.long)
        return None if bool(mask.all()) else mask

    def _positions(
        self, mask: torch.Tensor | None, start: int, tokens: int, rows: int
    ) -> torch.Tensor:
        """Positions [B, S]; padding does not count, as in transformers' `generate`."""
        if mask is None:
            span = torch.arange(start, start + tokens, device=self.device)
            return span.expand(rows, tokens)
        return (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _only(arguments: dict[str, Any], names: Any) -> dict[str, Any]:
    """Those arguments that a family's forward knows: old ones refuse or misread the others."""
    return {name: value for name, value in arguments.items() if name in names}
