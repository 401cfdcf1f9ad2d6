"""What a step must be so that a stack can compute it: asked before anything has changed."""

import torch

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.forward import Carved
from blocks.sides import Sides, check_sides

_INTEGERS = (torch.int32, torch.int64)


class StepChecks:
    """The checks of steps through the blocks `start:stop` of a model.

    Each raises StepError for what no stack could compute as sent.
    """

    def __init__(self, carved: Carved, start: int, stop: int) -> None:
        self._carved, self._start, self._stop = carved, start, stop
        self._blocks = len(carved.parts.layers)

    def step(
        self, inputs: torch.Tensor, cache: StackCache | None, start: int, logits_for: int | None
    ) -> None:
        """Check ids [B, S] or hidden states [B, S, ...] from position `start` on, and the logits
        wanted. BlocksError for a cache of other blocks.
        """
        if inputs.dim() < 2 or 0 in inputs.shape:
            raise StepError(f"inputs need rows and positions, not shape {tuple(inputs.shape)}")
        if inputs.is_floating_point():
            self._check_hidden(inputs)
        else:
            self._check_ids(inputs)
        tokens = inputs.shape[1]
        has_head = self._stop == self._blocks
        if logits_for is not None and not (has_head and 0 <= logits_for <= tokens):
            raise StepError(
                f"blocks {self._start}:{self._stop} of {self._blocks} cannot give the logits of "
                f"the last {logits_for} of {tokens} positions"
            )
        held = 0 if cache is None else cache.length
        if start != held:
            raise StepError(f"the step starts at position {start}, but {held} are held")
        if start + tokens > self._carved.context_length:
            raise StepError(f"position {start + tokens} is beyond the context of the model")
        if cache is not None:
            if (cache.start, cache.stop) != (self._start, self._stop):
                raise BlocksError(f"a cache of blocks {cache.start}:{cache.stop} does not fit here")
            if cache.rows not in (None, inputs.shape[0]):
                raise StepError(f"{inputs.shape[0]} rows follow a past of {cache.rows} rows")

    def gradient(self, inputs: torch.Tensor, grad: torch.Tensor) -> None:
        """Check hidden states [B, S, ...] from position 0 and a gradient of what they become."""
        self.step(inputs, None, 0, None)
        if not inputs.is_floating_point():
            raise StepError("ids have no gradient: send hidden states")
        if grad.shape != inputs.shape or not grad.is_floating_point():
            raise StepError(
                f"the gradient of hidden states of shape {tuple(inputs.shape)} has their shape, "
                f"not {tuple(grad.shape)}, and is floating, not {grad.dtype}"
            )

    @staticmethod
    def discrete(name: str, side: torch.Tensor) -> torch.Tensor:
        """The side, if no gradient runs through it. BlocksError else."""
        if side.is_floating_point():
            raise BlocksError(f'gradients through "{name}" are not computed: this family cannot')
        return side

    def sides(self, inputs: torch.Tensor, sides: Sides, past: int) -> Sides:
        """What these blocks need of the sides that came with hidden states; nothing beside ids."""
        if not inputs.is_floating_point():
            return {}
        plan = self._carved.sides
        check_sides(plan, sides, self._start, inputs.shape[0], inputs.shape[1], past)
        needed = plan.needed(self._start)
        if "ids" in needed:
            self._check_range(sides["ids"])
        return {name: sides[name] for name in needed}

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        tail = self._carved.sides.hidden_tail
        fits = tuple(hidden.shape[2:]) == tail if tail else hidden.dim() > 2
        if not fits or hidden.shape[-1] != self._carved.hidden_size:
            raise StepError(
                f"hidden states end in an axis of {self._carved.hidden_size}, not in shape "
                f"{tuple(hidden.shape)}"
            )

    def _check_ids(self, ids: torch.Tensor) -> None:
        if self._start:
            raise StepError(f"blocks {self._start}:{self._stop} take hidden states, not ids")
        if ids.dtype not in _INTEGERS or ids.dim() != 2:
            raise StepError(f"ids are int32 or int64 [rows, positions], not {ids.dtype}")
        self._check_range(ids)

    def _check_range(self, ids: torch.Tensor) -> None:
        vocabulary = self._carved.vocabulary_size
        # out of range a GPU would abort the process, not raise
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise StepError(f"ids must be below the vocabulary's {vocabulary}")
