"""What some families' layers need beside the hidden state, and how it gets from stack to stack.

Most need nothing. Where they do, named tensors [B, S, ...] travel beside "hidden":

"ids"        [B, S] the token ids, for layers that route by them
"first"      [B, S, hidden_size] what the first block got, for layers that look at it again
"per_layer"  [B, S, n, w] an input of its own for each of the n blocks still to come
"carried"    [B, S, ...] what a layer hands to the next one beside the hidden state
"keys.7", "values.7"   [B, S, heads, w] keys and values that block 7 shares with later blocks

1. Decided from the model: from what its layers take, what its loop hands on, what its config says
   of shared keys. The table below, and that of attributes in `_lacks_own_choice` and
   `_shared_widths`, are the names that transformers gives to these things.
2. The stack of block 0 makes them from the ids; the others take what they need and pass on what
   later blocks need. A missing one is a StepError that names it.
3. A stack that shares another's keys keeps them in its own cache, as if it had that layer.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from blocks.carve import Anatomy, Skip, handed_on
from blocks.errors import BlocksError, StepError
from blocks.hf.models import layer_kinds, sharing_modes

Sides = dict[str, torch.Tensor]

# A layer's argument, and the name under which its value travels.
_BY_ARGUMENT = {
    "input_ids": "ids",
    "original_hidden_states": "first",
    "per_layer_input": "per_layer",
}
_SHARED_ARGUMENT = "shared_kv_states"
_SHARED = ("keys", "values")

_INTEGERS = (torch.int32, torch.int64)

# Rows and positions of the probe: primes that no family has as a number of streams.
_PROBE_ROWS, _PROBE_TOKENS = 5, 7


@dataclass(frozen=True, slots=True)
class SidePlan:
    """What the layers of a model need beside the hidden state.

    `tails` gives the axes of each side after rows and positions. Where layers have further
    streams before rows and positions (`leads_with_streams`), on the wire these come after.
    """

    blocks: int
    arguments: Mapping[str, str]  # name of the side -> a layer's argument
    carried: str | None  # the argument that gets what the layer before handed on
    takers: frozenset[int]  # the blocks that need it
    shared: Mapping[int, tuple[str, frozenset[int]]]  # block that stores -> its key, who reuses
    tails: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hidden_tail: tuple[int, ...] = ()
    leads_with_streams: bool = False
    hands_on_choices: bool = False  # of positions, by an indexer

    @property
    def is_needed(self) -> bool:
        """Does anything travel beside the hidden state?"""
        return self.blocks > 0

    def lent(self, start: int, stop: int) -> tuple[int, ...]:
        """The blocks before `start` whose keys some of the blocks `start:stop` reuse."""
        return tuple(
            number
            for number, (_, reusers) in sorted(self.shared.items())
            if number < start and any(reuser in range(start, stop) for reuser in reusers)
        )

    def needed(self, start: int) -> tuple[str, ...]:
        """The names of the sides that blocks from `start` on need beside hidden states."""
        if start == self.blocks:
            return ()
        names = list(self.arguments)
        if start in self.takers:
            names.append("carried")
        for number in self.lent(start, self.blocks):
            names += [f"keys.{number}", f"values.{number}"]
        return tuple(names)

    def tail(self, name: str, start: int) -> tuple[int, ...] | None:
        """The axes of a side after rows and positions, as blocks from `start` get it."""
        tail = self.tails.get(name)
        if name == "per_layer" and tail is not None:
            return (self.blocks - start, *tail)
        return tail


NOTHING = SidePlan(0, {}, None, frozenset(), {})


class _Enough(Exception):  # no error: the probe has seen what it wanted
    """The probe has reached the first layer."""


def plan_sides(parts: Anatomy, model: Any, device: torch.device) -> SidePlan:
    """Decide what the layers of this model, carved or not, need beside the hidden state."""
    layers = parts.layers
    blocks = len(layers)
    taken = {name for layer in layers for name in argument_names(layer)}
    arguments = {side: name for name, side in _BY_ARGUMENT.items() if name in taken}
    carried = handed_on(type(parts.owner), parts.path.rpartition(".")[2])
    if isinstance(carried, int):
        carried = argument_names(layers[0])[carried]
    shared = _shared(parts, model) if _SHARED_ARGUMENT in taken else {}
    takers = frozenset(
        number for number in range(1, blocks) if carried and _lacks_own_choice(layers[number])
    )
    if not (arguments or takers or shared):
        return NOTHING
    plan = SidePlan(blocks, arguments, carried, takers, shared)
    return replace(_probed(plan, parts, device), hands_on_choices=bool(_indexers(layers[0])))


@functools.cache
def _names_of(kind: type) -> tuple[str, ...]:
    names = tuple(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return names[1:]


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """The arguments of a layer's forward, in order; of the layer itself where it is a stub."""
    return _names_of(type(_twin(layer)))  # type: ignore[arg-type]  # a class is hashable


def _twin(layer: nn.Module) -> nn.Module:
    return layer.__dict__["twin"] if isinstance(layer, Skip) else layer


def _lacks_own_choice(layer: nn.Module) -> bool:
    """Does the layer need what the one before hands on? Not if it has an indexer of its own."""
    return not any(indexer is not None for indexer in _indexers(layer))


def _indexers(layer: nn.Module) -> list[Any]:
    """What the parts of a layer call their indexer, None for one of another layer."""
    return [
        vars(part).get("indexer", part._modules.get("indexer"))
        for part in _twin(layer).modules()
        if "indexer" in vars(part) or "indexer" in part._modules
    ]


def _shared(parts: Anatomy, model: Any) -> dict[int, tuple[str, frozenset[int]]]:
    """Which block's keys and values later blocks reuse, under which key of the shared dict."""
    modes = sharing_modes(model.config)
    keys = layer_kinds(model.config) or [""] * len(modes)
    reused: dict[int, set[int]] = {}
    for number, mode in enumerate(modes):
        if mode == "reuse":
            stores = (
                other
                for other in range(number - 1, -1, -1)
                if modes[other] == "store" and keys[other] == keys[number]
            )
            if (store := next(stores, None)) is not None:
                reused.setdefault(store, set()).add(number)
    return {number: (keys[number], frozenset(users)) for number, users in reused.items()}


def _probed(plan: SidePlan, parts: Anatomy, device: torch.device) -> SidePlan:
    """The plan with the shapes that the first layer gets, and without what it gets as None."""
    got: dict[str, Any] = {}
    names = argument_names(parts.layers[0])

    def look(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        got.update(zip(names, args, strict=False))
        got.update(named)
        raise _Enough

    ids = torch.zeros(_PROBE_ROWS, _PROBE_TOKENS, dtype=torch.long, device=device)
    hook = parts.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with hook, torch.no_grad(), suppress(_Enough):
        parts.inner(input_ids=ids, use_cache=False)
    hidden = got[names[0]]
    leads = tuple(hidden.shape[:2]) != (_PROBE_ROWS, _PROBE_TOKENS)
    tails: dict[str, tuple[int, ...]] = {
        side: tuple(got[argument].shape[2:])
        for side, argument in plan.arguments.items()
        if got.get(argument) is not None
    }
    for number in plan.shared:
        tails |= dict.fromkeys(
            (f"keys.{number}", f"values.{number}"), _shared_widths(parts, number)
        )
    return replace(
        plan,
        arguments={side: name for side, name in plan.arguments.items() if side in tails},
        tails=tails,
        hidden_tail=tuple((hidden.movedim(0, 2) if leads else hidden).shape[2:]),
        leads_with_streams=leads,
    )


def _shared_widths(parts: Anatomy, number: int) -> tuple[int, int]:
    """Heads and width of the keys that a layer stores."""
    attention: Any = _twin(parts.layers[number]).self_attn
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim


def check_sides(
    plan: SidePlan, sides: Mapping[str, torch.Tensor], start: int, rows: int, tokens: int, past: int
) -> None:
    """StepError unless all that blocks from `start` on need is there, in shapes they can take.

    For a step of `tokens` positions after `past` others.
    """
    for name in plan.needed(start):
        side = sides.get(name)
        if side is None:
            raise StepError(f'blocks from {start} on need "{name}" beside hidden states')
        tail = plan.tail(name, start)
        fits = tuple(side.shape[2:]) == tail if tail is not None else side.dim() > 2
        if tuple(side.shape[:2]) != (rows, tokens) or not fits or not side.numel():
            raise StepError(
                f'"{name}" of {rows} rows and {tokens} positions cannot have shape '
                f"{tuple(side.shape)}"
            )
        is_index = name == "ids" or (name == "carried" and plan.hands_on_choices)
        if side.dtype not in _INTEGERS if is_index else not side.is_floating_point():
            raise StepError(f'"{name}" cannot be {side.dtype}')
        if name != "carried" or not is_index:
            continue
        # out of range a GPU would abort the process, not raise
        if not 0 <= int(side.min()) <= int(side.max()) < past + tokens:
            raise StepError(f'"carried" chooses among the {past + tokens} positions there are')


def sample_sides(plan: SidePlan, start: int, tokens: int, generator: torch.Generator) -> Sides:
    """Sides for one row of random hidden states into block `start`, as good as any for measuring.

    BlocksError where their shape is not known before a step.
    """
    sides: Sides = {}
    for name in plan.needed(start):
        tail = plan.tail(name, start)
        if name == "ids":
            sides[name] = torch.zeros(1, tokens, dtype=torch.long)
        elif tail is not None:
            sides[name] = torch.randn(1, tokens, *tail, generator=generator)
        elif plan.hands_on_choices:
            sides[name] = torch.zeros(1, tokens, 1, dtype=torch.long)
        else:
            raise BlocksError(f'nobody knows the shape of "{name}" before a step has run')
    return sides


@dataclass(slots=True)
class Exchange:
    """The sides of one forward of the blocks `span`: what comes in, and what goes on.

    `given` are the sides that came with hidden states, none where ids came.
    """

    plan: SidePlan
    layers: nn.ModuleList
    span: range
    cache: Any
    tokens: int
    given: Mapping[str, torch.Tensor]
    passed: Sides = field(default_factory=dict)
    per_layer: dict[int, torch.Tensor] = field(default_factory=dict)
    shared: Any = None  # the model's own dict of shared keys and values

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the layers get and give their sides; one forward runs in it."""
        with ExitStack() as undo:
            for number in range(self.span.start, self.plan.blocks):
                before = functools.partial(self._before, number)
                hook = self.layers[number].register_forward_pre_hook(before, with_kwargs=True)
                undo.enter_context(hook)
            after = self.layers[self.span.stop - 1].register_forward_hook(self._after)
            undo.enter_context(after)
            yield

    def _before(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a layer runs: hand it what came for it, or note what it would have got."""
        names = argument_names(layer)
        arguments = {**dict(zip(names, args, strict=False)), **named}
        if number == self.span.start:
            self.shared = arguments.get(_SHARED_ARGUMENT, {})
            if self.given:
                self._lend()
        if not self.given:
            if number >= self.span.stop:
                self._note(number, arguments)
            return None
        if number not in self.span:
            return None
        replaced = {
            argument: self.given[side][:, :, number - self.span.start]
            if side == "per_layer"
            else self.given[side]
            for side, argument in self.plan.arguments.items()
        }
        if number == self.span.start and "carried" in self.given and self.plan.carried:
            replaced[self.plan.carried] = self.given["carried"]
        places = dict(zip(names, range(len(args)), strict=False))
        values = list(args)
        for argument in replaced.keys() & places.keys():
            values[places[argument]] = replaced.pop(argument)
        known = {name: value for name, value in replaced.items() if name in names}
        return tuple(values), {**named, **known}

    def _lend(self) -> None:
        """Put the keys that an earlier stack's layers share where the layers look for them."""
        for number in self.plan.lent(self.span.start, self.span.stop):
            keys, values = (self.given[f"{what}.{number}"].transpose(1, 2) for what in _SHARED)
            if self.cache is not None:
                keys, values = self.cache.update(keys, values, number)
            self.shared[self.plan.shared[number][0]] = keys, values

    def _note(self, number: int, arguments: Mapping[str, Any]) -> None:
        for side, argument in self.plan.arguments.items():
            value = arguments.get(argument)
            if side == "per_layer" and value is not None:
                self.per_layer[number] = value
            elif value is not None:
                self.passed[side] = value

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        """After the last layer: what it hands on, and the keys that later blocks reuse."""
        stop = self.span.stop
        if "carried" in self.plan.needed(stop):
            self.passed["carried"] = self._of_the_past(output[1])
        for number in self.plan.lent(stop, self.plan.blocks):
            key, _ = self.plan.shared[number]
            if key in self.shared:
                for what, value in zip(_SHARED, self.shared[key], strict=True):
                    new = value[:, :, -self.tokens :]
                    self.passed[f"{what}.{number}"] = new.transpose(1, 2)

    def _of_the_past(self, handed: torch.Tensor) -> torch.Tensor:
        """What a layer hands on, made to depend on each position's own past only.

        An indexer that may choose more positions than there are chooses later ones of the same
        pass, which are hidden from the layers but would be none at all in a step by itself.
        """
        if not self.plan.hands_on_choices:
            return handed
        past = 0 if self.cache is None else self.cache.length
        own = torch.arange(past, past + self.tokens, device=handed.device)[:, None]
        return torch.where(handed > own, handed[..., :1], handed)  # its first choice, once more

    def finish(self) -> Sides:
        """What later blocks need, once the forward is done."""
        passed, later = self.passed, self.plan.needed(self.span.stop)
        if self.per_layer:
            passed["per_layer"] = torch.stack(
                [self.per_layer[number] for number in sorted(self.per_layer)], dim=2
            )
        for name in later:
            if name not in passed:
                side = self.given[name]
                passed[name] = side[:, :, len(self.span) :] if name == "per_layer" else side
        return {name: passed[name] for name in later}
