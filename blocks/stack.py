"""The blocks of a span, loaded here and run as the whole model would run them.

1. Weights are frozen; only inputs have gradients (`backward`). What `run` returns are inference
   tensors, which no backward pass takes.
2. A step that raises StepError has changed nothing. After any other error the cache is torn, and
   only position 0 can follow.
3. A stack and its parts run one at a time, in any thread: they share layers and hooks.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from blocks.apart import attends_apart
from blocks.attention import Rows
from blocks.cache import StackCache
from blocks.decoding import Decoder
from blocks.errors import BlocksError, StepError
from blocks.forward import Carved
from blocks.hf.models import PreTrainedModel
from blocks.join import why_not_joined
from blocks.joint import Row, run_rows
from blocks.masks import checked_mask, positions
from blocks.sides import Sides, sample_sides
from blocks.step_checks import StepChecks
from blocks.transfer import sent
from blocks.trial import Paging, decoder_of


class Stack:
    """Blocks `start:stop` of a model, with the ends that belong to them.

    `holds_embedding`: takes ids, as it has block 0. `holds_head`: gives logits, as it has the last
    block. `blocks` is how many the whole model has.
    """

    def __init__(
        self, carved: Carved, start: int, stop: int, decoder: Decoder | None = None
    ) -> None:
        self._carved, self._decoder = carved, decoder
        self.start, self.stop = start, stop
        self._span = range(start, stop)
        self._may_join: bool | None = None
        self._is_apart: bool | None = None
        self._unowned: StackCache | None = None
        self._parts: dict[tuple[int, int], Stack] = {}  # no more than there are spans within
        self._checks = StepChecks(carved, start, stop)
        self.blocks = len(carved.parts.layers)
        self.holds_embedding = start == 0
        self.holds_head = stop == self.blocks
        self.dtype, self.device = carved.dtype, carved.device
        self.hidden_size = carved.hidden_size
        self.vocabulary_size = carved.vocabulary_size
        self.context_length = carved.context_length

    @classmethod
    def of(
        cls, model: PreTrainedModel, start: int, stop: int, paging: Paging | None = None
    ) -> "Stack":
        """The stack of a loaded model that was carved to `start:stop` (or not at all).

        Keys lie in pages, and steps are recorded, as `paging` says; None: as suits the device.
        """
        carved = Carved(model)
        wish = paging or Paging.on(carved.device)
        decoder = None if wish is None else decoder_of(carved, cls(carved, start, stop), wish)
        return cls(carved, start, stop, decoder)

    def part(self, start: int, stop: int) -> "Stack":
        """A stack of some of these blocks that shares their weights. StepError if not held."""
        if not self.start <= start < stop <= self.stop:
            raise StepError(f"blocks {start}:{stop} are not within {self.start}:{self.stop}")
        if (start, stop) not in self._parts:
            self._parts[start, stop] = Stack(self._carved, start, stop, self._decoder)
        return self._parts[start, stop]

    def new_cache(self) -> StackCache:
        """An empty cache for one session in these blocks."""
        lent = self._carved.sides.lent(self.start, self.stop)
        pools = None if self._decoder is None else self._decoder.pools
        return StackCache(self._carved.model.config, self.start, self.stop, lent, pools)

    def regime(self, sequence_length: int) -> int:
        """What must be equal in steps that share a pass, by the length of their texts."""
        scaling = self._carved.rotary.scaling
        return 0 if scaling is None else scaling.regime(min(sequence_length, self.context_length))

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of what these blocks need beside hidden states: nothing in most families."""
        return self._carved.sides.needed(self.start)

    def sample(self, tokens: int) -> tuple[torch.Tensor, Sides]:
        """Random hidden states [1, tokens, ...] and sides to measure with, the same every time."""
        generator = torch.Generator().manual_seed(0)
        tail = self._carved.sides.hidden_tail or (self.hidden_size,)
        hidden = torch.randn(1, tokens, *tail, generator=generator)
        sides = sample_sides(self._carved.sides, self.start, tokens, generator)
        return self._placed(hidden), {name: self._placed(side) for name, side in sides.items()}

    def run(
        self,
        inputs: torch.Tensor,
        *,
        cache: StackCache | None = None,
        start: int = 0,
        mask: torch.Tensor | None = None,
        logits_for: int | None = None,
        sides: Sides | None = None,
        sequence_length: int | None = None,
    ) -> torch.Tensor:
        """Run positions `start` to `start + S` and return hidden states [B, S, ...] or logits.

        `inputs`: integer ids [B, S] (needs the embedding) or floating hidden states [B, S, ...,
        hidden_size]. `start` must be the cache's length, 0 without a cache. `mask` [B, start + S]
        tells the tokens (not 0) from the padding of the whole past. With `logits_for=n` (needs the
        head) float32 logits [B, n, vocabulary] of the last n positions, 0 for all of them. Hidden
        states are those after the last block of the stack, before any final norm. `sides` is what
        travels beside hidden states in families that need more (see `needs`, most need nothing): a
        stack takes from it what it needs, and leaves in it what later blocks need.
        `sequence_length`: how many positions the one forward of the whole model has that this is a
        part of (a chunk of a prompt: the prompt's); None: as many as these end at.

        Raises StepError, having changed nothing, for what no stack could compute as sent.
        """
        self._checks.step(inputs, cache, start, logits_for)
        rows, tokens = inputs.shape[:2]
        regime = self.regime(sequence_length or start + tokens)
        mask = checked_mask(mask, rows, start + tokens, self.device)
        beside = self._checked_sides(inputs, sides, start)
        wanted = tokens if logits_for == 0 else logits_for
        if tokens == 1 and mask is None and cache is not None and self._reads_pages(cache):
            return self._paged_step(inputs, cache, wanted is not None, regime)
        if tokens > 1 and cache is not None and cache.length and self.forgets_state:
            output = self._one_by_one(inputs, cache, mask, wanted, beside, regime)
        else:
            output = self._pass(inputs, cache, start, mask, wanted, beside, regime)
        if sides is not None:
            sides.clear()
            sides.update(beside)
        return output

    def _pass(
        self,
        inputs: torch.Tensor,
        cache: StackCache | None,
        start: int,
        mask: torch.Tensor | None,
        wanted: int | None,
        sides: Sides,
        regime: int,
    ) -> torch.Tensor:
        """Run what was checked in one go."""
        rows, tokens = inputs.shape[:2]
        if cache is not None:
            cache.make_ready(tokens)
            cache.begin(rows)
        alone = self._apart_alone(cache, tokens, mask)
        with torch.inference_mode(), alone.attached() if alone else nullcontext():
            at = positions(mask, start, tokens, rows, self.device)
            shared = {"position_ids": at, "attention_mask": mask}
            output = self._carved.forward(
                self._span,
                self._placed(inputs),
                shared,
                cache=cache,
                wanted=wanted,
                sides=sides,
                regime=regime,
            ).asked
        if cache is not None:
            cache.advance(tokens)
        return output

    def run_joined(
        self,
        inputs: Sequence[torch.Tensor],
        caches: Sequence[StackCache],
        *,
        wants_logits: Sequence[bool] = (),
        sides: Sequence[Sides] = (),
        sequence_lengths: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Run the next position of several sessions as one batch, each through its cache's blocks.

        `inputs`: one position of one row each, ids or hidden states as in `run`, without padding,
        into the first block of its cache; each cache has a past and holds blocks of this stack.
        Returns in their order hidden states [1, 1, ...] after the last block of the cache, or, for
        each session that `wants_logits`, float32 logits [1, 1, vocabulary]. In float32 what each
        would get alone, but for the rounding of larger products. `sides` and `sequence_lengths`,
        one for each session, are as in `run`. One session alone runs as in `run`.

        Raises StepError, having changed nothing, for what no stack could compute as sent, and
        BlocksError where `why_not_joined` of a session's blocks says why. After any other error
        all these caches are torn.
        """
        wishes = wants_logits or [False] * len(inputs)
        beside = sides or [{} for _ in inputs]
        lengths = sequence_lengths or [cache.length + 1 for cache in caches]
        parts = [self.part(cache.start, cache.stop) for cache in caches]
        if len(inputs) == 1:
            alone = parts[0].run(
                inputs[0],
                cache=caches[0],
                start=caches[0].length,
                logits_for=1 if wishes[0] else None,
                sides=beside[0],
                sequence_length=lengths[0],
            )
            return [alone]
        if len({id(cache) for cache in caches}) < len(caches):
            raise StepError("a session can take one step at a time")
        rows = [
            part._row(one, cache, wish, side, length)
            for part, one, cache, wish, side, length in zip(
                parts, inputs, caches, wishes, beside, lengths, strict=True
            )
        ]
        for part in parts:
            if not part._joins:
                raise BlocksError(part.why_not_joined)
        with torch.inference_mode():
            run_rows(self._carved, rows, self._ghosts, self._by_rows, self._decoder)
        return [self._handed(row, side) for row, side in zip(rows, beside, strict=True)]

    @staticmethod
    def _handed(row: Row, side: Sides) -> torch.Tensor:
        side.clear()
        side.update(row.sides)
        return row.values

    def _row(
        self, one: torch.Tensor, cache: StackCache, wants_logits: bool, sides: Sides, length: int
    ) -> Row:
        """A session's next position, checked and placed."""
        self._checks.step(one, cache, cache.length, 1 if wants_logits else None)
        if one.shape[:2] != (1, 1) or not cache.length:
            raise StepError("sessions join with one position of one row, and with a past")
        if cache.is_torn:
            raise BlocksError("an earlier step failed half way, so this cache can only start anew")
        checked = self._checked_sides(one, sides, cache.length)
        values = one if self._reads_pages(cache) else self._placed(one)  # a board places all
        return Row(cache, values, checked, wants_logits, self.regime(length))

    def _one_by_one(
        self,
        inputs: torch.Tensor,
        cache: StackCache,
        mask: torch.Tensor | None,
        wanted: int | None,
        sides: Sides,
        regime: int,
    ) -> torch.Tensor:
        """Several positions after a past, for layers that would forget it; all was checked."""
        parts, passed = [], []
        for place in range(inputs.shape[1]):
            start = cache.length
            beside = {name: side[:, place : place + 1] for name, side in sides.items()}
            shown = None if mask is None else mask[:, : start + 1]
            one, logits = inputs[:, place : place + 1], None if wanted is None else 1
            parts.append(self._pass(one, cache, start, shown, logits, beside, regime))
            passed.append(beside)
        sides.clear()
        sides.update({name: torch.cat([one[name] for one in passed], 1) for name in passed[0]})
        return torch.cat(parts if wanted is None else parts[-wanted:], dim=1)

    def _paged_step(
        self, inputs: torch.Tensor, cache: StackCache, wants_logits: bool, regime: int
    ) -> torch.Tensor:
        """The next position of a session alone, by tables."""
        row = Row(cache, inputs, {}, wants_logits, regime)
        with torch.inference_mode():
            run_rows(self._carved, [row], self._ghosts, decoder=self._decoder)
        return row.values

    def _reads_pages(self, cache: StackCache) -> bool:
        """Is the next position of this session run by tables?"""
        return self._decoder is not None and cache.is_paged and not cache.is_torn

    @property
    def _joins(self) -> bool:
        """Can sessions of these blocks share a batch? Looked at once; a step has run in them."""
        if self._may_join is None:
            self._may_join = self.why_not_joined is None
        return self._may_join

    def _by_rows(self, blocks: range) -> Rows | None:
        """Attention by rows for a joint step of these blocks, None where they cannot have it."""
        apart = self.part(blocks.start, blocks.stop)._attends_apart
        return self._carved.attention(is_joint=True) if apart else None

    def _apart_alone(
        self, cache: StackCache | None, tokens: int, mask: torch.Tensor | None
    ) -> Rows | None:
        """Attention by rows for a session's step by itself, where that is faster."""
        if tokens != 1 or mask is not None or cache is None or not cache.length:
            return None
        alone = self._carved.attention(is_joint=False)
        if alone is None or not alone.is_faster(self.dtype) or not self._joins:
            return None
        return alone if self._attends_apart else None

    def _ghosts(self, start: int, stop: int) -> StackCache:
        """A cache of these blocks that no session has, kept: making one takes milliseconds."""
        part = self.part(start, stop)
        if part._unowned is None:
            part._unowned = part.new_cache()
        return part._unowned

    @functools.cached_property
    def forgets_state(self) -> bool:
        """Are positions after a past run one by one, as these layers would else forget it?"""
        return self._carved.forgets_state(self._span)

    @property
    def keeps_state(self) -> bool:
        """True if a step has left something in these blocks that is no part of a cache."""
        return self._carved.keeps_state(self._span)

    @property
    def joins_by_rows(self) -> bool:
        """Do joint steps of these blocks pad nothing, as keys lie in pages or are read by rows?

        Asked when a step has run in them, and where `why_not_joined` forbids nothing.
        """
        return self._decoder is not None or self._attends_apart

    @property
    def _attends_apart(self) -> bool:
        """Are keys of buffers read by rows? Tried once for each kind of block."""
        if self._is_apart is None:
            parts = [self.part(block, block + 1) for block in self._span]
            self._is_apart = all(attends_apart(self._carved, part) for part in parts)
        return self._is_apart

    @property
    def why_not_joined(self) -> str | None:
        """None if sessions of these blocks can share a batch, else why not, in one sentence."""
        if self.keeps_state:
            return f"blocks {self.start}:{self.stop} keep a state of their own between steps"
        if self._carved.counts_positions(self._span):
            return "this family counts positions itself, the same for all rows of a batch"
        if self._carved.widens_masks:
            return "this family widens masks by positions of its own, so none can be padded"
        plan = self._carved.sides
        if "carried" in (*plan.needed(self.start), *plan.needed(self.stop)):
            # often a choice of positions, and these are other ones in a padded batch
            return f"what blocks {self.start}:{self.stop} hand on or are handed cannot be joined"
        return why_not_joined(self.new_cache())

    def backward(
        self,
        inputs: torch.Tensor,
        grad: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        sides: Sides | None = None,
    ) -> torch.Tensor:
        """The gradient of a loss in `inputs`, given its gradient `grad` in what `run` gives.

        `inputs`: floating hidden states [B, S, ..., hidden_size] from position 0; `grad` and the
        answer have the shape of the hidden states, the answer the dtype of the stack. `sides` came
        with them. Stateless: runs the blocks again, and each once more, so that only their inputs
        are kept.

        Raises StepError for what no stack could compute as sent, BlocksError for families whose
        sides have gradients of their own.
        """
        self._checks.gradient(inputs, grad)
        rows, tokens = inputs.shape[:2]
        mask = checked_mask(mask, rows, tokens, self.device)
        beside = self._checked_sides(inputs, sides, 0)
        with torch.inference_mode(False), torch.enable_grad(), self._carved.recomputing(self._span):
            self._carved.thaw()
            # copies: what came out of an inference would not be tracked
            asked = self._placed(inputs).clone().requires_grad_()
            at = positions(mask, 0, tokens, rows, self.device)
            shared = {"position_ids": at, "attention_mask": None if mask is None else mask.clone()}
            beside = {
                name: self._checks.discrete(name, side).clone() for name, side in beside.items()
            }
            output = self._carved.forward(self._span, asked, shared, sides=beside).hidden
            for name, side in beside.items():
                self._checks.discrete(name, side)
            answer: torch.Tensor
            (answer,) = torch.autograd.grad(output, asked, self._placed(grad).clone())
        return answer

    def _checked_sides(self, inputs: torch.Tensor, sides: Sides | None, past: int) -> Sides:
        """What these blocks need of the sides, where the weights are; nothing beside ids."""
        needed = self._checks.sides(inputs, sides or {}, past)
        return {name: self._placed(side) for name, side in needed.items()}

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the weights are, a floating one in their dtype, ids as indices."""
        is_ids = tensor.dtype == torch.int32
        dtype = self.dtype if tensor.is_floating_point() else torch.long if is_ids else None
        return sent(tensor, self.device, dtype)
