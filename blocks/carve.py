"""Cut the blocks of a span out of any causal language model of transformers, by no family's name.

A carved model is the family's own class: masks, positions, rotary tables, routing and layer types
all come from transformers. Layers held elsewhere are stubs that pass their input on.

1. Layers keep their absolute numbers and parameters their names: families decide by number, and
   the checkpoint's names must still fit.
2. A stack keeps everything outside the layers if it holds the first or the last block, and nothing
   with weights if it holds neither.
3. Of the big matrices only the needed ones stay: what is looked up by token with block 0, the head
   with the last block. A tied head without block 0 keeps the embedding's tensor, as storage.
4. Nothing of ours is registered on the model: a second name of a module would make the loader
   initialise loaded weights again.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from blocks.errors import BlocksError, CheckpointError
from blocks.hf.forwards import parameters_of
from blocks.hf.models import PretrainedConfig, PreTrainedModel, causal_class, decoder_config


class Skip(nn.Module):  # type: ignore[misc]  # torch is not followed
    """Stands for a layer that is not run here: returns its first argument in the layer's form.

    `arity` 0 returns a bare tensor, n a tuple of n. Attributes are answered by `twin`, the layer
    itself (on the meta device where it was never loaded), which is no submodule of this one.
    """

    def __init__(self, twin: nn.Module, arity: int) -> None:
        super().__init__()
        self.__dict__.update(twin=twin, arity=arity)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["twin"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the hidden states on."""
        hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        arity = self.__dict__["arity"]
        return (hidden, *(None,) * (arity - 1)) if arity else hidden


class Void(nn.Module):  # type: ignore[misc]  # torch is not followed
    """Stands for a module outside the layers that this stack does not need.

    An embedding or a linear module gives zeros of its width, everything else passes its input on.
    What it gives never reaches a held layer: the real hidden states are injected there.
    """

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        width = getattr(twin, "embedding_dim", getattr(twin, "out_features", None))
        self.__dict__.update(twin=twin, width=width)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["twin"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros in the dtype of what it stands for, or the first argument."""
        # what embeds may be given embeddings; a learned position's first argument may be the mask
        # of the whole past
        value = kwargs.get("inputs_embeds")
        if value is None:
            value = kwargs.get("position_ids")
        if value is None:
            given = (one for one in (*args, *kwargs.values()) if one is not None)
            value = next(given)  # some are told of ids that are not there
        twin, width = self.__dict__["twin"], self.__dict__["width"]
        if width is None:
            return value
        is_embedding = hasattr(twin, "embedding_dim")
        axes = value.shape if is_embedding else value.shape[:-1]
        dtype = twin.weight.dtype if is_embedding else value.dtype
        return torch.zeros(*axes, width, dtype=dtype, device=value.device)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parts of a carved model are. `arity` is the form of a layer's output (see Skip)."""

    path: str  # of the layer list in the model, as "model.layers"
    owner: nn.Module  # the module that owns the list and runs it
    inner: nn.Module  # what is called with ids: the owner, or the nearest one around it
    layers: nn.ModuleList
    arity: int


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and list of the decoder's layers: the outermost list of the right length.

    BlocksError when there is none: a family this way of cutting cannot serve.
    """
    count = decoder_config(model.config).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise BlocksError(f"{type(model).__name__} has no list of {count} layers to cut")
    return min(found, key=lambda one: one[0].count("."))


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a model, carved or not."""
    path, layers = find_layers(model)
    *around, name = path.split(".")
    owner = _at(model, around)
    inner = next(
        (
            module
            for depth in range(len(around), -1, -1)
            if "input_ids" in parameters_of((module := _at(model, around[:depth])).forward)
        ),
        owner,
    )
    return Anatomy(path, owner, inner, layers, layer_arity(type(owner), name))


def forwards_of(model: PreTrainedModel) -> tuple[type, ...]:
    """The classes whose forwards a step calls: the model, what is called with ids, its layers."""
    parts = anatomy(model)
    layers = (one.__dict__["twin"] if isinstance(one, Skip) else one for one in parts.layers)
    return tuple(dict.fromkeys(map(type, (model, parts.inner, *layers))))


def _at(model: PreTrainedModel, names: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(names))


def layer_arity(inner: type[nn.Module], name: str) -> int:
    """What the loop over `self.<name>` expects of a layer: 0 a tensor, n a tuple of n.

    Read from the loop's source, because a stub must answer in the layers' form before any real
    layer has run. A running stack compares it with what its layers return.
    """
    tree = _source(inner)
    assignment = _layer_assignment(tree, name)
    return 0 if assignment is None else _arity_of(assignment.targets[0], tree)


def handed_on(inner: type[nn.Module], name: str) -> str | int | None:
    """Which argument of a layer takes the second thing that the layer before returned.

    Its name or, where the loop passes it without, its place; None if nothing is handed on.
    """
    assignment = _layer_assignment(_source(inner), name)
    if assignment is None or not isinstance(assignment.targets[0], ast.Tuple):
        return None
    _, second, *_ = assignment.targets[0].elts
    call = cast(ast.Call, assignment.value)
    handed = ast.unparse(second)
    for keyword in call.keywords:
        if ast.unparse(keyword.value) == handed:
            return keyword.arg
    places = (place for place, value in enumerate(call.args) if ast.unparse(value) == handed)
    return next(places, None)


def _source(inner: type[nn.Module]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(inner.forward))))
    except (OSError, SyntaxError) as error:
        raise BlocksError(
            f"{inner.__name__} has no source to read its layers' form from"
        ) from error


def _layer_assignment(tree: ast.AST, name: str) -> ast.Assign | None:
    """The statement of the loop over `self.<name>` that runs a layer and keeps what it gives."""
    called = {name} | {
        target.id
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For) and _mentions(loop.iter, {name})
        for target in ast.walk(loop.target)
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _runs_layer(node.value, called)
        ):
            return node
    return None


def _runs_layer(call: ast.Call, called: set[str]) -> bool:
    """Is this `layer(...)`, or a checkpointing function given `layer` or `layer.__call__`?"""
    if isinstance(call.func, ast.Name | ast.Subscript) and _mentions(call.func, called):
        return True
    checkpointed = isinstance(call.func, ast.Attribute) and "checkpoint" in call.func.attr
    return checkpointed and bool(call.args) and _mentions(call.args[0], called)


def _arity_of(target: ast.expr, tree: ast.AST) -> int:
    if isinstance(target, ast.Tuple):
        return len(target.elts)
    read = ast.unparse(target)
    # a loop that asks whether it got a tuple takes a bare tensor, too
    optional = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp) and ast.unparse(node.test).startswith(f"isinstance({read},")
        for part in ast.walk(node)
    }
    indices = [
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and id(node) not in optional
        and ast.unparse(node.value) == read
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, int)
    ]
    return max(indices, default=-1) + 1


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(
        (isinstance(part, ast.Name) and part.id in names)
        or (isinstance(part, ast.Attribute) and part.attr in names)
        for part in ast.walk(node)
    )


def carve(model: PreTrainedModel, start: int, stop: int) -> None:
    """Replace in place what the stack `start:stop` does not hold; before weights are loaded.

    CheckpointError for an encoder, which reads texts to their end before it says anything of them.
    """
    parts = anatomy(model)
    _check_decodes(model, parts)
    lent = _lent_modules(model, parts, range(start, stop))
    for number in range(len(parts.layers)):
        if not start <= number < stop:
            stub = parts.layers[number] = Skip(parts.layers[number], parts.arity)
            for name in lent.get(number, ()):
                stub._modules[name] = getattr(stub, name)  # `add_module` sees it there already
    holds_first, holds_last = start == 0, stop == len(parts.layers)
    if not (holds_first or holds_last):
        _empty_ends(model, parts.path)
    elif not holds_last:
        void(model, model.get_output_embeddings())
    elif not holds_first:
        _void_tables(model, parts.path)
    names = {name for name, _ in model.named_parameters()}
    model.all_tied_weights_keys = {
        name: source
        for name, source in model.all_tied_weights_keys.items()
        if name in names and source in names
    }


def _check_decodes(model: PreTrainedModel, parts: Anatomy) -> None:
    decoder = decoder_config(model.config)
    if getattr(decoder, "is_decoder", None) is not False:
        return
    if "is_decoder" in ast.unparse(_source(type(parts.inner))):
        raise CheckpointError(
            f"config.json says is_decoder false, so this {decoder.model_type} is an encoder, where "
            "what follows changes what went before; set it to true if the weights were trained as "
            "a decoder's, or choose another model"
        )


def _lent_modules(model: PreTrainedModel, parts: Anatomy, span: range) -> dict[int, set[str]]:
    """Modules of layers elsewhere whose weights are those of held layers too, by layer.

    On disk they are there under the name of one layer only. Its stub keeps them, as storage.
    """
    lent: dict[int, set[str]] = {}
    depth = parts.path.count(".") + 1
    for name, source in model.all_tied_weights_keys.items():
        if name.startswith(f"{parts.path}.") and source.startswith(f"{parts.path}."):
            (taker, _), (giver, module) = (
                one.split(".")[depth : depth + 2] for one in (name, source)
            )
            if int(taker) in span and int(giver) not in span:
                lent.setdefault(int(giver), set()).add(module)
    return lent


def is_tied(model: PreTrainedModel) -> bool:
    """Does the head share the embedding's matrix? Asked before weights are loaded and tied."""
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    tied = model.all_tied_weights_keys
    return any(key.rpartition(".")[0] in names for key in (*tied, *tied.values()))


def _empty_ends(model: PreTrainedModel, path: str) -> None:
    """Void all that has learned weights beside the way from the model down to its layers.

    Frozen ones are tables of positions, made by a formula: some layers are handed these.
    """
    names = path.split(".")
    for depth, kept in enumerate(names):
        parent = model.get_submodule(".".join(names[:depth]))
        for name, child in list(parent.named_children()):
            if name != kept and any(weight.requires_grad for weight in child.parameters()):
                setattr(parent, name, _emptied(child))


def _emptied(module: nn.Module) -> nn.Module:
    """A stand-in for the module; a list of modules becomes one of stand-ins."""
    if isinstance(module, nn.ModuleList):
        return nn.ModuleList([_emptied(one) for one in module])
    return Void(module)


def _void_tables(model: PreTrainedModel, path: str) -> None:
    """Void what is looked up by token outside the layers, but for a matrix that is the head's too.

    Some families have a second table by token, larger than all else.
    """
    embedding = model.get_input_embeddings()
    kept = embedding if is_tied(model) else None
    decoder = decoder_config(model.config).to_dict()
    sizes = {value for name, value in decoder.items() if name.startswith("vocab_size")}
    for name, module in list(model.named_modules()):
        is_table = isinstance(module, nn.Embedding) and module.num_embeddings in sizes
        in_layers = name.startswith(f"{path}.")
        if module is not kept and not in_layers and (is_table or module is embedding):
            void(model, module)


def void(model: PreTrainedModel, unneeded: nn.Module | None) -> None:
    """Put a stand-in wherever the model has this module."""
    for name, module in list(model.named_modules()):
        if unneeded is not None and module is unneeded:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, Void(module))


def carved_class(
    config: PretrainedConfig,
    start: int,
    stop: int,
    on_carved: Callable[[PreTrainedModel], None] = lambda model: None,
) -> type[PreTrainedModel]:
    """The family's class, carving itself as it is built, before `on_carved` and any weights.

    It keeps the family's name and module: transformers finds the conversions of weights by them.
    """
    base = causal_class(config)

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        carve(self, start, stop)
        on_carved(self)

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
