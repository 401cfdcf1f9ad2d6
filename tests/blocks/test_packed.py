"""Packed matrices give what plain ones give, the same for a row whatever is beside it."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_models import BLOCKS, TinyModel, assert_same, some_ids, whole_logits
from torch import nn

from blocks import packed
from blocks.load import load_stack
from blocks.measure import plan_bytes
from blocks.packed import ALIKE_ROWS, KEPT_SHARE, LEAST_VALUES, PackedLinear, can_pack, pack
from blocks.stack import Stack
from blocks.steps import Bounds

Get = Callable[[str, bool], TinyModel]

pytestmark = pytest.mark.skipif(not can_pack(), reason="this CPU has no such matrix units")

KINDS = sorted(packed._kinds(LEAST_VALUES), key=str) if can_pack() else []  # of this CPU
ANY_SIZE = dict.fromkeys(KINDS, 1)


def linear(
    outputs: int, inputs: int, kind: torch.dtype = torch.float32, *, bias: bool
) -> nn.Linear:
    torch.manual_seed(outputs)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=kind).requires_grad_(False)
    nn.init.normal_(layer.weight)
    return layer


def rows_of(count: int, inputs: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(1)).to(kind)


def packed_stack(model: TinyModel, start: int = 0, stop: int = BLOCKS) -> Stack:
    stack = load_stack(model.checkpoint, start, stop)
    assert pack(stack._carved.model, least_values=ANY_SIZE) > 0
    return stack


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(96, 32), (100, 70), (256, 1152), (1152, 256)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_rows_product_is_the_same_whatever_rows_are_beside_it(
    kind: torch.dtype, shape: tuple[int, int], bias: bool
) -> None:
    layer, rows = PackedLinear(linear(*shape, kind, bias=bias)), rows_of(300, shape[1], kind)
    first, last = layer(rows[:ALIKE_ROWS]), layer(rows[-ALIKE_ROWS:])
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, ALIKE_ROWS):
        assert torch.equal(layer(rows[:count]), first[:count]), count
        assert torch.equal(layer(rows[-count:]), last[-count:]), count
    whole = layer(rows)
    sums_in_pieces = kind is torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    for count in (ALIKE_ROWS, 33, 64, 128):
        for ours, theirs in (
            (layer(rows[:count]), whole[:count]),
            (layer(rows[-count:]), whole[-count:]),
        ):
            if sums_in_pieces:  # float32 sums in another order, then rounded to 8 bits
                terms = float(rows.float().norm(dim=1).max()) * shape[1] ** 0.5
                torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5 * terms)
            else:
                assert torch.equal(ours, theirs), count


def test_a_joint_pass_has_no_more_rows_than_get_the_same_product_on_every_cpu() -> None:
    assert Bounds().joint_legs <= ALIKE_ROWS


@pytest.mark.parametrize("shape", [(96, 32), (100, 70), (256, 1152)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_right_but_for_rounding(shape: tuple[int, int], bias: bool) -> None:
    plain, rows = linear(*shape, bias=bias), rows_of(9, shape[1])
    layer, exact = PackedLinear(plain), copy.deepcopy(plain).double()
    terms = rows.abs().double() @ exact.weight.abs().T
    error = (layer(rows).double() - exact(rows.double())).abs()
    assert float((error / terms).max()) < 8 * torch.finfo(torch.float32).eps
    assert layer(rows.view(3, 3, -1)).shape == (3, 3, shape[0])
    assert torch.equal(layer(rows.view(3, 3, -1)).view(9, -1), layer(rows))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_who_looks_at_a_packed_weight_gets_it_and_leaves_a_plain_layer(kind: torch.dtype) -> None:
    plain = linear(96, 32, kind, bias=True)
    with torch.inference_mode():
        layer = PackedLinear(plain)
        assert torch.equal(layer.weight, plain.weight)
    assert type(layer) is nn.Linear
    assert not layer.weight.is_inference()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert not [one for one in vars(layer).values() if torch.is_tensor(one)]
    rows = rows_of(3, 32, kind)
    assert torch.equal(layer(rows), plain(rows))


@pytest.mark.parametrize("count", [1, 6])
def test_gradients_run_through_a_packed_layer(count: int) -> None:
    plain = linear(96, 32, bias=True)
    grads = []
    for layer in (plain, PackedLinear(plain)):
        rows = rows_of(count, 32).requires_grad_()
        (layer(rows.view(1, count, 32)) ** 2).sum().backward()
        grads.append(rows.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-4)


def test_what_is_small_shared_or_of_another_dtype_stays_as_it_is() -> None:
    model = nn.ModuleDict(
        {
            "large": nn.Linear(1024, LEAST_VALUES[torch.float32] // 1024),
            "small": nn.Linear(1023, LEAST_VALUES[torch.float32] // 1024),
            "of_half": nn.Linear(1024, LEAST_VALUES[torch.float32] // 1024, dtype=torch.float16),
            "embedding": nn.Embedding(LEAST_VALUES[torch.float32] // 1024, 1024),
            "head": nn.Linear(1024, LEAST_VALUES[torch.float32] // 1024, bias=False),
        }
    )
    model["head"].weight = model["embedding"].weight
    assert pack(model) == 1
    assert isinstance(model["large"], PackedLinear)
    assert not any(isinstance(model[name], PackedLinear) for name in ("small", "of_half", "head"))


def test_packing_stops_while_a_part_of_the_memory_is_still_free() -> None:
    model = nn.Sequential(*(linear(64, 32, bias=False) for _ in range(10)))
    size = model[0].weight.nbytes

    def spare_bytes() -> int:
        """Room for ten such matrices, and each one packed takes some."""
        return size * (10 - sum(isinstance(one, PackedLinear) for one in model))

    assert pack(model, least_values=ANY_SIZE, spare_bytes=spare_bytes) == 10 - 10 * KEPT_SHARE


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "falcon_mamba"])
def test_a_packed_stack_computes_what_the_whole_model_computes(
    tiny_model: Get, family: str
) -> None:
    model = tiny_model(family, False)
    stack, ids = packed_stack(model), some_ids(12)
    cache = stack.new_cache()
    parts = [
        stack.run(chunk, cache=cache, start=cache.length, logits_for=0)
        for chunk in ids.split([9, 1, 1, 1], dim=1)
    ]
    assert_same(torch.cat(parts, dim=1), whole_logits(model, ids))


def test_a_packed_stack_has_the_gradient_of_a_plain_one(llama: TinyModel) -> None:
    plain, packed = load_stack(llama.checkpoint, 1, 4), packed_stack(llama, 1, 4)
    hidden, _ = plain.sample(7)
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    packed.run(hidden)
    assert_same(packed.backward(hidden, grad), plain.backward(hidden, grad))


def test_loading_packs_large_matrices_unless_told_not_to(
    llama: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("blocks.load.pack", lambda model, *, looks_up: asked.append(looks_up))
    load_stack(llama.checkpoint, 1, 3, packs=False)
    assert not asked
    load_stack(llama.checkpoint, 1, 3)
    load_stack(llama.checkpoint, 0, 3, quant="int8")  # its head is not quantized
    assert asked == [False, True]


@pytest.fixture
def small_tied_heads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_TIED_VALUES", 1)


@pytest.mark.usefixtures("small_tied_heads_too")
@pytest.mark.parametrize("span", [(0, BLOCKS), (3, BLOCKS)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_tied_head_is_packed_and_the_embedding_stays_where_tokens_are_looked_up(
    tiny_model: Get, family: str, span: tuple[int, int]
) -> None:
    checkpoint, (first, _) = tiny_model(family, True).checkpoint, span
    plain, stack = (load_stack(checkpoint, *span, packs=packs) for packs in (False, True))
    model = stack._carved.model
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert any("emb" in name or "wte" in name for name, _ in model.named_parameters()) == (
        not first
    )
    inputs = some_ids(7) if stack.holds_embedding else stack.sample(7)[0]
    assert_same(stack.run(inputs, logits_for=0), plain.run(inputs, logits_for=0))


@pytest.mark.usefixtures("small_tied_heads_too")
@pytest.mark.parametrize("span", [(0, 2), (2, 4), (4, BLOCKS), (0, BLOCKS)])
def test_a_packed_tied_head_is_in_the_plan_of_bytes(tiny_model: Get, span: tuple[int, int]) -> None:
    checkpoint = tiny_model("llama", True).checkpoint
    model = load_stack(checkpoint, *span)._carved.model
    plain = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    heads = [one.byte_count for one in model.modules() if isinstance(one, PackedLinear)]
    assert len(heads) == (span[1] == BLOCKS)
    assert plan_bytes(checkpoint, "float32").span_bytes(*span) == sum([*plain.values(), *heads])


@pytest.mark.usefixtures("small_tied_heads_too")
def test_a_matrix_that_a_third_module_shares_or_none_is_no_tied_heads(tiny_model: Get) -> None:
    apart = load_stack(tiny_model("llama", False).checkpoint, 0, BLOCKS)._carved.model
    assert not isinstance(apart.get_output_embeddings(), PackedLinear)
    model = load_stack(tiny_model("llama", True).checkpoint, 0, BLOCKS, packs=False)._carved.model
    model.model.other = nn.Linear(1, 1, bias=False)
    model.model.other.weight = model.lm_head.weight
    pack(model)
    assert not isinstance(model.get_output_embeddings(), PackedLinear)


def test_a_tied_head_without_much_to_win_stays_the_embeddings(tiny_model: Get) -> None:
    model = load_stack(tiny_model("llama", True).checkpoint, 0, BLOCKS)._carved.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
