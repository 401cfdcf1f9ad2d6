"""The gradient that a stack gives is the whole model's, whatever ran before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, CUTS, PROVEN, TinyModel, assert_same, some_ids

from blocks.carve import anatomy
from blocks.errors import StepError
from blocks.load import load_stack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]
States = dict[int, torch.Tensor]


@contextmanager
def states_kept(layers: torch.nn.ModuleList) -> Iterator[States]:
    """Within, forwards leave here what goes into each layer, and comes out of the last: tracked."""
    states: States = {}

    def keep(number: int, value: Any) -> None:
        hidden = value[0] if isinstance(value, tuple) else value
        if hidden.is_leaf:
            hidden.requires_grad_()
        hidden.retain_grad()
        states[number] = hidden

    def before(number: int) -> Any:
        return lambda layer, args, named: keep(number, args or named["hidden_states"])

    hooks = [
        layer.register_forward_pre_hook(before(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda layer, args, output: keep(len(layers), output))
    )
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def whole_states(model: TinyModel, ids: torch.Tensor, **arguments: Any) -> States:
    """The hidden states between the whole model's layers, each with the gradient of some loss."""
    with states_kept(anatomy(model.whole).layers) as states:
        logits = model.whole(input_ids=ids, use_cache=False, **arguments).logits
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
        mask = arguments.get("attention_mask", torch.ones_like(ids))
        (logits * weights * mask[..., None]).sum().backward()
    return states


def assert_gradient(stack: Stack, states: States, mask: torch.Tensor | None = None) -> None:
    """The stack turns the gradient of its output into that of its input."""
    asked, answered = states[stack.start], states[stack.stop]
    assert answered.grad is not None
    ours = stack.backward(asked.detach(), answered.grad, mask=mask)
    assert_same(ours, asked.grad)


@pytest.mark.parametrize("family", [*PROVEN, "qwen3_next"])
def test_stacks_hand_the_whole_models_gradient_back_from_the_last_to_the_first(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    states = whole_states(model, some_ids(11, rows=2))
    grad = states[BLOCKS].grad
    for span in reversed(CUTS[0]):
        stack = load_stack(model.checkpoint, span.start, span.stop)
        grad = stack.backward(states[span.start].detach(), grad)
        assert_same(grad, states[span.start].grad)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_the_gradient_of_a_left_padded_batch_is_the_whole_models(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    arguments = {"attention_mask": mask}
    if family != "bloom":
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    states = whole_states(model, some_ids(9, rows=2), **arguments)
    assert_gradient(load_stack(model.checkpoint, 1, 4), states, mask)


def test_the_gradient_is_right_after_inference_and_inside_of_it(llama: TinyModel) -> None:
    states = whole_states(llama, some_ids(7))
    stack = load_stack(llama.checkpoint, 2, 5)
    cache = stack.new_cache()
    with torch.inference_mode():
        stack.run(states[2].clone(), cache=cache)
        asked, given = states[2].detach().clone(), states[5].grad.clone()
        mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
        assert_same(stack.backward(asked, given), states[2].grad)
        assert not torch.equal(stack.backward(asked, given, mask=mask), states[2].grad)
    assert_same(stack.run(states[5].detach()[:, :1], cache=cache, start=7), cached(stack, states))


def cached(stack: Stack, states: States) -> torch.Tensor:
    """What the step after those of `states[2]` gives in a session that never saw a gradient."""
    cache = stack.new_cache()
    stack.run(states[2].detach(), cache=cache)
    return stack.run(states[5].detach()[:, :1], cache=cache, start=7)


def test_a_table_that_inference_left_in_a_layer_does_not_break_the_gradient(
    llama: TinyModel,
) -> None:
    stack = load_stack(llama.checkpoint, 2, 5)
    states = whole_states(llama, some_ids(7))
    layer = stack._carved.parts.layers[3]
    with torch.inference_mode():
        layer.register_buffer("table", torch.ones(32))  # as families do that cache positions
    layer.register_forward_hook(lambda layer, args, output: output * layer.table)
    assert_gradient(stack, states)


def test_layers_run_twice_and_keep_neither_gradients_nor_our_changes(llama: TinyModel) -> None:
    stack = load_stack(llama.checkpoint, 1, 5)
    runs: list[int] = []
    layers = stack._carved.parts.layers
    for number in range(1, 5):
        attention = layers[number].self_attn
        attention.register_forward_hook(lambda *_, number=number: runs.append(number))
    states = whole_states(llama, some_ids(5))
    part = stack.part(2, 4)
    assert_gradient(part, states)
    assert runs == [2, 3, 3, 2]
    assert not any("forward" in vars(layer) for layer in layers)
    assert not any(weight.grad is not None for weight in stack._carved.model.parameters())


def test_a_bfloat16_gradient_is_near_the_float32_one_and_in_bfloat16(llama: TinyModel) -> None:
    states = whole_states(llama, some_ids(6))
    stack = load_stack(llama.checkpoint, 2, 5, dtype="bfloat16")
    ours = stack.backward(states[2].detach(), states[5].grad)
    assert ours.dtype == torch.bfloat16
    assert (ours - states[2].grad).norm() < 0.05 * states[2].grad.norm()


@pytest.mark.parametrize(
    ("inputs", "grad", "reason"),
    [
        (some_ids(3), torch.zeros(1, 3, 32), "ids have no gradient"),
        (torch.zeros(1, 3, 32), torch.zeros(1, 2, 32), "has their shape"),
        (torch.zeros(1, 3, 32), torch.zeros(1, 3, 32, dtype=torch.long), "is floating"),
        (torch.zeros(1, 3, 31), torch.zeros(1, 3, 31), "end in an axis of 32"),
        (torch.zeros(1, 129, 32), torch.zeros(1, 129, 32), "beyond the context"),
    ],
)
def test_a_gradient_that_cannot_be_computed_is_the_senders_fault(
    llama: TinyModel, inputs: torch.Tensor, grad: torch.Tensor, reason: str
) -> None:
    with pytest.raises(StepError, match=reason):
        load_stack(llama.checkpoint, 0, 2).backward(inputs, grad)
