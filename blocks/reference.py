"""The whole model of transformers that a trial compares with: tiny, random, and saved.

1. It runs as its users run it: with its own cache, and with positions as `generate` gives them.
2. What is compared with is what the saved folder holds, loaded back by transformers.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from blocks.carve import anatomy, find_layers
from blocks.errors import BlocksError
from blocks.hf.caches import whole_cache
from blocks.hf.forwards import cache_argument, parameters_of
from blocks.hf.models import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    is_composite,
)
from blocks.hf.rotary import Rotary
from blocks.shrink import VOCABULARY

_SEED = 7
_NOISE = 0.1  # on every weight: norms and biases at their defaults would hide errors in them

# Ids of texts stay below those that a shrunk config gives to images and other special tokens.
_FIRST_ID, _LAST_ID = 3, VOCABULARY * 3 // 4


class Trouble(Exception):
    """The trial cannot go on; the sentence says at what it ended."""


class TheirsError(Exception):
    """transformers' own whole model does not run so."""


def told(error: BaseException) -> str:
    """An error as half a sentence of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:160]
    return text if isinstance(error, BlocksError) else f"{type(error).__name__}: {text}"


def some_ids(count: int, *, seed: int, rows: int = 1) -> torch.Tensor:
    """Random ids [rows, count] that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_FIRST_ID, _LAST_ID, (rows, count), generator=generator)


class Whole:
    """The whole model of transformers, run as its users run it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        named = parameters_of(model.forward)
        self.takes = set(named)
        self.inner = anatomy(model).inner
        if any(one.kind is one.VAR_KEYWORD for one in named.values()):
            self.takes |= parameters_of(self.inner.forward).keys()
        self.rotary = Rotary(model, self.inner)

    def run(
        self,
        ids: torch.Tensor,
        cache: Any = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        regime: int = 0,
    ) -> torch.Tensor:
        """float32 logits [B, S, vocabulary] of ids [B, S] that follow the cache's past.

        Positions are counted from 0 unless told, as `generate` does: some families by themselves
        begin elsewhere. `regime`: of the length of the text that they are a chunk of. No other text
        is left behind.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand(ids.shape)
        arguments: dict[str, Any] = {"use_cache": cache is not None, "position_ids": positions}
        if cache is not None:
            arguments[cache_argument(self.inner)] = cache
        if mask is not None:
            arguments["attention_mask"] = mask
        known = {name: value for name, value in arguments.items() if name in self.takes}
        try:
            with torch.inference_mode(), self.rotary.at(regime):
                return cast(torch.Tensor, self.model(input_ids=ids, **known).logits.float())
        except Exception as error:
            raise TheirsError(told(error)) from error

    def session(
        self, ids: torch.Tensor, chunks: Sequence[int], mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits of ids that come in chunks, with positions as `generate` gives them."""
        cache, parts, done = whole_cache(self.model.config), [], 0
        counted = torch.ones_like(ids) if mask is None else mask
        positions = (counted.cumsum(-1) - 1).clamp(min=0)
        for chunk in ids.split(list(chunks), dim=1):
            past, done = done, done + chunk.shape[1]
            shown = None if mask is None else mask[:, :done]
            parts.append(self.run(chunk, cache, shown, positions[:, past:done]))
        return torch.cat(parts, dim=1)

    def said(self, ids: torch.Tensor, *prompt: int) -> torch.Tensor:
        """The logits from the last position of the prompt on, as `generate` computes them: the
        prompt, in so many chunks, then one position at a time, and all anew where it drops its
        cache.
        """
        scaling, length = self.rotary.scaling, sum(prompt)
        regime = scaling.regime(length) if scaling and len(prompt) > 1 else 0
        cache, parts, done = whole_cache(self.model.config), [], 0
        for end in (*accumulate(prompt), *range(length + 1, ids.shape[1] + 1)):
            if scaling and end > length and done == scaling.anew_after:
                cache, done = whole_cache(self.model.config), 0
            positions = torch.arange(done, end)[None]
            own = regime if end < length else 0
            parts.append(self.run(ids[:, done:end], cache, None, positions, own)[:, -1:])
            done = end
        return torch.cat(parts[len(prompt) - 1 :], dim=1)

    def gradient(
        self, ids: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What enters the block, a random gradient of what leaves the last, and the gradient in
        the former that comes of it; rows and positions first, as between stacks.
        """
        _, layers = find_layers(self.model)
        seen: dict[str, torch.Tensor] = {}

        def enter(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            name = "hidden_states" if "hidden_states" in named else next(iter(named), "")
            hidden = args[0] if args else named[name]
            seen["in"] = hidden.detach().clone().requires_grad_()
            return ((seen["in"], *args[1:]), named) if args else (args, {**named, name: seen["in"]})

        def leave(layer: Any, args: Any, output: Any) -> None:
            seen["out"] = output[0] if isinstance(output, tuple) else output

        hooks = (
            layers[block].register_forward_pre_hook(enter, with_kwargs=True),
            layers[-1].register_forward_hook(leave),
        )
        generator = torch.Generator().manual_seed(_SEED)
        known = {"use_cache": False} if "use_cache" in self.takes else {}
        try:
            self.model(input_ids=ids, **known)
            given = torch.randn(seen["out"].shape, generator=generator)
            (made,) = torch.autograd.grad(seen["out"], seen["in"], given)
        except Exception as error:
            raise TheirsError(told(error)) from error
        finally:
            for hook in hooks:
                hook.remove()
        values = (seen["in"].detach(), given, made)
        if seen["in"].shape[:2] != ids.shape:  # streams come first in a few families
            values = tuple(value.movedim(0, 2) for value in values)
        return values


def _loaded(family: Any, folder: Path, has_images: bool) -> Whole:
    """The saved model, if it runs on text; of a composite that does not, the text part."""
    try:
        whole = Whole(family.from_pretrained(folder, dtype=torch.float32).eval())
        whole.run(some_ids(3, seed=0))
    except TheirsError:
        if not has_images:
            raise
        whole = _loaded(AutoModelForCausalLM, folder, False)
    return whole


def saved_model(config: PretrainedConfig, folder: Path) -> Whole:
    """A random model of the config, saved in `folder` and loaded back. Trouble says what failed."""
    torch.manual_seed(_SEED)
    has_images = is_composite(config)
    family = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    try:
        model = family.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * _NOISE)
        model.save_pretrained(folder)
        whole = _loaded(type(model), folder, has_images)
    except TheirsError as why:
        raise Trouble(f"transformers' whole model does not run: {why}") from why
    except Exception as error:
        raise Trouble(f"transformers' whole model does not run: {told(error)}") from error
    whole.model.requires_grad_(False)
    return whole
