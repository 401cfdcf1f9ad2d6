"""One forward through some blocks of a carved model: what goes in, what runs, what is taken out.

1. Whatever a family does before its first layer or after its last never touches a span in the
   middle: hidden states are injected at the first block and captured after the last one.
2. Hooks and stand-ins are undone whatever happens, so forwards of different spans may follow each
   other. They share layers, so only one runs at a time.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blocks.attention import Rows
from blocks.carve import Skip, anatomy
from blocks.config import context_length
from blocks.errors import BlocksError
from blocks.hf.attention import base_of, configs_of
from blocks.hf.caches import DynamicCache
from blocks.hf.forwards import cache_argument, forgets_state, parameters_of
from blocks.hf.models import PretrainedConfig, PreTrainedModel, decoder_config
from blocks.hf.rotary import Rotary
from blocks.sides import Exchange, Sides, plan_sides


class Output(NamedTuple):
    """What a forward gives: hidden states [B, S, ...] after its last block, before any norm, and
    float32 logits [B, n, vocabulary] if they were wanted.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None

    @property
    def asked(self) -> torch.Tensor:
        """The logits if they were wanted, else the hidden states."""
        return self.hidden if self.logits is None else self.logits


class Carved:
    """A loaded, carved model and what is known of it; shared by a stack and its parts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = anatomy(model)
        decoder: PretrainedConfig = decoder_config(model.config)
        self.hidden_size: int = decoder.hidden_size
        self.vocabulary_size: int = decoder.vocab_size
        self.context_length = context_length(decoder)
        embedding = model.get_input_embeddings()
        # some families project between embedding and layers
        self.embedding_size: int = getattr(embedding, "embedding_dim", self.hidden_size)
        inner, whole = parameters_of(self.parts.inner.forward), parameters_of(model.forward)
        self.inner_takes = inner.keys()
        # learned positions that nobody tells: the family counts them from the cache's length
        self._counts_before = "position_ids" not in inner and any(
            isinstance(module, nn.Embedding) and module is not embedding
            for module in self._around_layers()
        )
        owner = self.parts.owner
        self._counts_around = owner is not self.parts.inner and "get_seq_length" in _source_of(
            type(owner).forward
        )
        open_ended = any(one.kind is one.VAR_KEYWORD for one in whole.values())
        self.whole_takes = whole.keys() | (inner.keys() if open_ended else set())
        layer = next(one for one in self.parts.layers if not isinstance(one, Skip))
        # some keep small parts in float32; a quantized layer may have buffers only
        sizes: Counter[torch.dtype] = Counter()
        for weight in layer.parameters():
            if weight.is_floating_point():
                sizes[weight.dtype] += weight.numel()
        self.dtype: torch.dtype = (
            sizes.most_common(1)[0][0] if sizes else model.config.dtype or torch.float32
        )
        self.device: torch.device = next(chain(layer.parameters(), layer.buffers())).device
        self.sides = plan_sides(self.parts, model, self.device)
        self._configs = configs_of(model)
        self._attention = base_of(self._configs)
        self.rotary = Rotary(model, self.parts.inner)
        self.tried: dict[tuple[object, ...], bool] = {}  # kind of block -> attends by rows

    def _around_layers(self) -> Iterator[nn.Module]:
        """The modules that are run with ids and are no part of a layer."""
        within = set(self.parts.layers.modules())
        return (module for module in self.parts.inner.modules() if module not in within)

    @property
    def attends(self) -> tuple[str, Sequence[Any]]:
        """What may stand in for another attention: the family's own, and the configs that name it.

        BlocksError where its attention cannot be exchanged.
        """
        if self._attention is None:
            raise BlocksError("the attention of this family cannot be exchanged")
        return self._attention, self._configs

    def attention(self, *, is_joint: bool) -> Rows | None:
        """Attention by rows for one step, None where the family cannot attend so.

        On a GPU a kernel for each row costs more than padding: keys lie in pages (`blocks.pool`).
        """
        if self._attention is None or self.device.type != "cpu":
            return None
        return Rows(self._attention, self._configs, is_joint)

    def forward(
        self,
        span: range,
        inputs: torch.Tensor,
        shared: dict[str, Any],
        *,
        cache: DynamicCache | None = None,
        wanted: int | None = None,
        sides: Sides | None = None,
        regime: int = 0,
    ) -> Output:
        """Run the blocks of `span` on ids [B, S] or hidden states [B, S, ...].

        `shared` are the arguments of the family's forward beside these; those it does not know are
        left out, but for the cache (None: none is kept), without which the past would be lost.
        `sides` came with hidden states, and holds what later blocks need afterwards.
        With `wanted` there are logits of so many last positions. `regime`: of the length of the
        text, where positions are computed by it (see `blocks.hf.rotary`).
        """
        shared = {**shared, **self._cache_arguments(cache), "return_dict": True}
        captured: list[torch.Tensor] = []
        logits: torch.Tensor | None = None
        sides = {} if sides is None else sides
        tokens = inputs.shape[1]
        is_hidden = inputs.is_floating_point()
        exchange = Exchange(
            self.sides, self.parts.layers, span, cache, tokens, sides if is_hidden else {}
        )
        shared |= self._hidden_arguments(inputs) if is_hidden else {"input_ids": inputs}
        with ExitStack() as undo:
            undo.enter_context(self._only(span))
            undo.enter_context(self.rotary.at(regime))
            if self.sides.is_needed:
                undo.enter_context(exchange.attached())
            if is_hidden:
                undo.enter_context(self._injecting(span.start, inputs))
            undo.enter_context(self._capturing(span.stop - 1, captured))
            if wanted is None:
                self.parts.inner(**_only(shared, self.inner_takes))
            else:
                logits = self._logits(shared, tokens, wanted)
        given = exchange.finish()
        sides.clear()
        sides.update(given)
        return Output(captured.pop(), logits)

    def _logits(self, shared: dict[str, Any], tokens: int, wanted: int) -> torch.Tensor:
        """Run the whole, for the logits of so many last positions."""
        shared["logits_to_keep"] = wanted
        if self.sides.is_needed:
            # by number the family might drop positions while blocks still want them all
            shared["logits_to_keep"] = torch.arange(tokens - wanted, tokens, device=self.device)
        logits: torch.Tensor = self.model(**_only(shared, self.whole_takes)).logits
        return logits[:, -wanted:].float()  # some know no logits_to_keep

    def _hidden_arguments(self, hidden: torch.Tensor) -> dict[str, Any]:
        """What the family's forward starts from where hidden states will take its place."""
        rows, tokens = hidden.shape[:2]
        if self.sides.is_needed:
            # by ids it computes all that its layers take, in the right shapes
            return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long, device=self.device)}
        size = (rows, tokens, self.embedding_size)
        # a tensor of its own, as some families write into it
        return {"inputs_embeds": torch.zeros(size, dtype=self.dtype, device=self.device)}

    def _cache_arguments(self, cache: DynamicCache | None) -> dict[str, Any]:
        if cache is None:
            return {"use_cache": False}
        return {"use_cache": True, self._cache_name: cache}

    @functools.cached_property
    def _cache_name(self) -> str:
        return cache_argument(self.parts.inner)

    @contextmanager
    def recomputing(self, span: range) -> Iterator[None]:
        """Within, layers keep only their inputs for a backward pass and run again in it.

        A chunk of 2048 positions then keeps megabytes where it would keep a gigabyte.
        """
        layers = [self.parts.layers[number] for number in span]
        forwards = [layer.forward for layer in layers]
        try:
            for layer, forward in zip(layers, forwards, strict=True):
                layer.forward = functools.partial(
                    checkpoint, forward, use_reentrant=False, preserve_rng_state=False
                )
            yield
        finally:
            for layer in layers:
                del layer.forward  # what it hides is the class's own

    def counts_positions(self, span: range) -> bool:
        """Does the family count positions by the cache's length, the same for rows of a batch?

        Before block 0 or, as its source says, in these layers or in what runs them with what was
        embedded already.
        """
        return (
            (span.start == 0 and self._counts_before)
            or self._counts_around
            or any(_counts_positions(kind) for kind in self._kinds(span))
        )

    def forgets_state(self, span: range) -> bool:
        """Would several positions after a past be computed as if there was none?"""
        return any(forgets_state(_source_of(kind.forward)) for kind in self._kinds(span))

    def _kinds(self, span: range) -> set[Any]:
        """The classes of which these layers are made."""
        return {type(part) for number in span for part in self.parts.layers[number].modules()}

    @property
    def widens_masks(self) -> bool:
        """Does the family put columns of its own before a mask, for positions that nobody sent?"""
        return "attention_mask = torch.cat(" in _source_of(type(self.parts.inner).forward)

    def keeps_state(self, span: range) -> bool:
        """Has a step left something in these layers themselves, where sessions would mix?"""
        layers = self.parts.layers
        return any(True for number in span for _ in _left_by_inference(layers[number]))

    def thaw(self) -> None:
        """Make every tensor that inference has left in the model usable by a backward pass."""
        for store, name in list(_left_by_inference(self.model)):
            store[name] = store[name].clone()

    @contextmanager
    def _only(self, span: range) -> Iterator[None]:
        """Within, loaded layers outside the span pass their input on like the others."""
        layers = self.parts.layers
        loaded = {
            number: layer
            for number, layer in enumerate(layers)
            if number not in span and not isinstance(layer, Skip)
        }
        try:
            for number, layer in loaded.items():
                layers[number] = Skip(layer, self.parts.arity)
            yield
        finally:
            for number, layer in loaded.items():
                layers[number] = layer

    @contextmanager
    def _injecting(self, number: int, hidden: torch.Tensor) -> Iterator[None]:
        """Within, that block gets `hidden` in place of what was computed before it."""
        if self.sides.leads_with_streams:
            hidden = hidden.movedim(2, 0)

        def inject(
            layer: Any, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden, *args[1:]), named
            name = "hidden_states" if "hidden_states" in named else next(iter(named))
            return args, {**named, name: hidden}

        layer = self.parts.layers[number]
        with layer.register_forward_pre_hook(inject, with_kwargs=True):
            yield

    @contextmanager
    def _capturing(self, number: int, captured: list[torch.Tensor]) -> Iterator[None]:
        """Within, what that block gives is put into `captured`."""

        def capture(layer: Any, args: Any, output: Any) -> None:
            if isinstance(output, tuple) != bool(self.parts.arity):
                raise BlocksError(
                    f"layers of {type(self.parts.owner).__name__} return another form than its "
                    "loop reads; this family cannot be cut"
                )
            hidden = output[0] if isinstance(output, tuple) else output
            captured.append(hidden.movedim(0, 2) if self.sides.leads_with_streams else hidden)

        with self.parts.layers[number].register_forward_hook(capture):
            yield


def _only(arguments: dict[str, Any], names: Any) -> dict[str, Any]:
    """Those arguments that a family's forward knows: old ones refuse or misread the others."""
    return {name: value for name, value in arguments.items() if name in names}


def _counts_positions(kind: Any) -> bool:
    """Does the forward of this part of a layer make positions of the cache's length?"""
    source = _source_of(kind.forward)
    return "get_seq_length" in source and "arange" in source


@functools.cache
def _source_of(forward: Any) -> str:
    """The source of a module's forward, "" where it is not written in Python and sees tensors."""
    try:
        return inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""


def _left_by_inference(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where within the module steps have left tensors: those and no others are of inference."""
    for part in module.modules():
        for store in (vars(part), part._buffers):
            for name, value in store.items():
                if torch.is_tensor(value) and value.is_inference():
                    yield store, name
