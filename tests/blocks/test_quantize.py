"""Quantized blocks: what they compute, what they weigh, and the traps that others fall into."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from quant_models import MIXTURES, SPAN, difference, loaded_bytes, some_hidden, write
from torch import nn
from torch.nn.functional import linear

from blocks import formats
from blocks.checkpoint import Checkpoint
from blocks.experts import QuantExperts
from blocks.formats import Form, Matrix, form_of, quantize
from blocks.load import load_stack
from blocks.quantize import Quant, QuantLinear, choose_quant, held_parts

Get = Callable[[str], Checkpoint]

FORMS = [
    Form("int8", 96, 192),
    Form("nf4", 96, 192, is_packed=True),
    Form("nf4", 96, 192),
    Form("nf4", 100, 48 * 4),
    Form("nf4", 64, 288),  # bitsandbytes' kernel for AVX512 takes the wrong scales for it
    Form("nf4", 32, 64, is_packed=True),  # a lone tile, which `_packed` left as a view
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A function that writes each family once."""
    folder = tmp_path_factory.mktemp("quantized")
    return lambda family: write(family, folder)


def held(form: Form, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Matrix]:
    if form.is_packed and not formats.is_nf4_fast():
        pytest.skip("this CPU has no kernel for packed NF4")
    torch.manual_seed(1)
    weight = (torch.randn(form.outputs, form.inputs) * 0.02).to(dtype)
    return weight, Matrix(form, quantize(weight, form))


# --- one matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_codes_and_scales_are_those_of_bitsandbytes_to_the_bit(dtype: torch.dtype) -> None:
    import bitsandbytes.functional as functional

    weight, matrix = held(Form("nf4", 100, 192), dtype)
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(matrix.parts["codes"], codes.flatten())
    assert torch.equal(matrix.parts["scales"], state.absmax)
    assert torch.equal(matrix.whole(dtype), functional.dequantize_4bit(codes, state))


def test_packed_nf4_holds_the_same_matrix_up_to_its_rounder_scales() -> None:
    _, flat = held(Form("nf4", 96, 192))
    _, packed = held(Form("nf4", 96, 192, is_packed=True))
    assert difference(packed.whole(torch.float32), flat.whole(torch.float32)) < 0.004


def test_the_tables_do_not_depend_on_where_they_are_first_needed() -> None:
    """transformers builds models on meta, with their dtype as torch's default."""
    weight, matrix = held(Form("nf4", 100, 192))
    for table in (formats._nf4_code, formats._dynamic_code):
        table.cache_clear()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            formats._nf4_code(torch.device("cpu"))
            formats._dynamic_code(torch.device("cpu"))
    finally:
        torch.set_default_dtype(dtype)
    again = quantize(weight, matrix.form)
    assert all(torch.equal(again[name], part) for name, part in matrix.parts.items())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_that_of_the_matrix_made_whole(
    form: Form, rows: int, dtype: torch.dtype
) -> None:
    weight, matrix = held(form)
    inputs = torch.randn(2, rows, form.inputs).to(dtype)
    product = matrix(inputs)
    assert (product.dtype, product.shape) == (dtype, (2, rows, form.outputs))
    exact = linear(inputs.float(), matrix.whole(torch.float32))
    assert difference(product, exact) < 0.006  # bfloat16's rounding
    limit = 0.02 if form.kind == "int8" else 0.12
    assert difference(matrix.whole(torch.float32), weight) < limit


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_rows_give_no_rows(form: Form) -> None:
    assert held(form)[1](torch.zeros(2, 0, form.inputs)).shape == (2, 0, form.outputs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_parts_are_those_that_the_form_foretold(form: Form) -> None:
    _, matrix = held(form)
    found = {name: (tuple(part.shape), part.dtype) for name, part in matrix.parts.items()}
    assert found == form.parts
    assert form.byte_count == sum(part.nbytes for part in matrix.parts.values())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_are_right_after_inference(form: Form) -> None:
    _, matrix = held(form)
    with torch.inference_mode():
        matrix(torch.randn(1, form.inputs))
    inputs = torch.randn(3, form.inputs, requires_grad=True)
    upstream = torch.randn(3, form.outputs)
    (got,) = torch.autograd.grad(matrix(inputs), inputs, upstream)
    assert difference(got, upstream @ matrix.whole(torch.float32)) < 1e-5


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_running_changes_nothing_that_is_held(form: Form) -> None:
    _, matrix = held(form)
    before = {name: part.clone() for name, part in matrix.parts.items()}
    for inputs in (torch.randn(1, form.inputs), torch.randn(300, form.inputs)):
        matrix(inputs)
        matrix(inputs.requires_grad_()).sum().backward()
    assert all(torch.equal(before[name], part) for name, part in matrix.parts.items())


def test_int8_bears_activations_beyond_the_range_of_float16() -> None:
    _, matrix = held(FORMS[0])
    inputs = torch.full((2, 192), 1e5, dtype=torch.bfloat16)
    assert matrix(inputs).isfinite().all()


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        (96, 192, True),
        (100, 192, False),  # rows come in tiles of 32
        (96, 98 * 2, False),  # scales must not cross rows; 96 * 196 is a multiple of 64
        (8, 192, None),  # a router
        (96, 32, None),
        (96, 97, None),
        (33, 66, None),  # 33 * 66 is no multiple of 64
    ],
)
def test_sizes_decide_how_nf4_is_held(
    monkeypatch: pytest.MonkeyPatch, outputs: int, inputs: int, expected: bool | None
) -> None:
    monkeypatch.setattr(formats, "is_nf4_fast", lambda: True)
    form = form_of("nf4", outputs, inputs, device="cpu")
    assert (form and form.is_packed) == expected
    elsewhere = form_of("nf4", outputs, inputs, device="cuda")
    assert elsewhere is None or not elsewhere.is_packed


def test_scales_that_cross_rows_are_right_too() -> None:
    weight, matrix = held(Form("nf4", 96, 98 * 2))
    assert difference(matrix.whole(torch.float32), weight) < 0.12


def test_a_kernel_that_reads_the_packed_layout_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(rows), len(codes), dtype=rows.dtype)

    monkeypatch.setattr(formats, "packed_product", lambda library: other)
    assert not formats.is_nf4_fast.__wrapped__()


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo", "odd", *MIXTURES])
def test_quantized_blocks_compute_what_their_whole_matrices_would(
    checkpoint: Get, family: str, quant: Quant
) -> None:
    stack = load_stack(checkpoint(family), *SPAN, quant=quant)
    plain = load_stack(checkpoint(family), *SPAN)
    put_whole(stack._carved.model, plain._carved.model)
    hidden = some_hidden(9)
    change, got = (one.run(hidden) - hidden for one in (plain, stack))
    assert by_token(got, change) < 0.01


def by_token(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The median of the tokens' differences: rounding sends one to another expert at times."""
    return median(map(difference, ours[0], theirs[0]))


def put_whole(quantized: nn.Module, plain: nn.Module) -> None:
    """Give a plain model the very weights that a quantized one multiplies with."""
    others = dict(plain.named_modules())
    with torch.no_grad():
        for path, module in quantized.named_modules():
            if isinstance(module, QuantLinear):
                other = others[path]
                is_turned = not isinstance(other, nn.Linear)
                other.weight.copy_(module.weight.t() if is_turned else module.weight)
            elif isinstance(module, QuantExperts):
                for name in module.forms:
                    getattr(others[path], name).copy_(getattr(module, name))


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_a_stacks_gradient_is_right_after_inference(
    checkpoint: Get, family: str, quant: Quant
) -> None:
    stack = load_stack(checkpoint(family), *SPAN, quant=quant)
    plain = load_stack(checkpoint(family), *SPAN)
    put_whole(stack._carved.model, plain._carved.model)
    hidden, upstream = some_hidden(9), some_hidden(9, seed=1)
    stack.run(hidden)
    got, right = (one.backward(hidden, upstream) - upstream for one in (stack, plain))
    assert by_token(got, right) < 0.02


@pytest.mark.parametrize("quant", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_saving_changes_nothing_in_live_weights(checkpoint: Get, family: str, quant: Quant) -> None:
    stack = load_stack(checkpoint(family), *SPAN, quant=quant)
    model, hidden = stack._carved.model, some_hidden(5)
    first = stack.run(hidden)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    assert torch.equal(stack.run(hidden), first)
    after = model.state_dict()
    assert before.keys() == after.keys() >= held_parts(model).keys()
    assert all(torch.equal(before[name], part) for name, part in after.items())


@pytest.mark.parametrize(
    ("family", "quant", "limit"),
    [
        ("llama", "nf4", 0.30),
        ("mixtral", "nf4", 0.35),
        ("gpt_oss", "nf4", 0.35),
        ("qwen3_moe", "nf4", 0.35),
        ("llama", "int8", 0.55),
        ("mixtral", "int8", 0.55),
    ],
)
def test_experts_are_quantized_like_the_rest_by_bytes(
    checkpoint: Get, family: str, quant: Quant, limit: float
) -> None:
    whole = loaded_bytes(load_stack(checkpoint(family), *SPAN, dtype="bfloat16"))
    stack = load_stack(checkpoint(family), *SPAN, dtype="bfloat16", quant=quant)
    assert loaded_bytes(stack) <= limit * whole


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_stay_as_they_are(checkpoint: Get, family: str) -> None:
    model = load_stack(checkpoint(family), *SPAN, quant="nf4")._carved.model
    routers = [one for name, one in model.named_parameters() if "gate" in name or "router" in name]
    assert routers
    assert all(one.dtype == torch.float32 for one in routers)


def test_experts_that_no_token_chose_are_not_touched(checkpoint: Get) -> None:
    model = load_stack(checkpoint("mixtral"), *SPAN, quant="nf4")._carved.model
    experts: Any = next(one for one in model.modules() if isinstance(one, QuantExperts))
    used: list[int] = []
    inner = experts.expert
    experts.expert = lambda name, number: used.append(number) or inner(name, number)
    hidden, chosen = some_hidden(3)[0], torch.tensor([[0, 3], [3, 0], [0, 4]])  # 4 is nobody
    mixed = experts(hidden, chosen, torch.full((3, 2), 0.5))
    assert set(used) == {0, 3}
    alone = experts(hidden[2:], torch.tensor([[0, 0]]), torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(mixed[2:], alone)


@pytest.mark.parametrize("family", ["llama", "olmo", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_a_quantized_stack_keeps_its_dtype_of_computing(
    checkpoint: Get, family: str, dtype: Any, quant: Quant
) -> None:
    stack = load_stack(checkpoint(family), *SPAN, dtype=dtype, quant=quant)
    assert stack.dtype == getattr(torch, dtype)
    assert stack.run(some_hidden(2)).dtype == stack.dtype
    assert not any(one.requires_grad for one in stack._carved.model.parameters())


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_the_ends_are_not_quantized(checkpoint: Get, quant: Quant) -> None:
    for span in ((0, 1), (3, 4)):
        model = load_stack(checkpoint("llama"), *span, quant=quant)._carved.model
        assert any("layers" in name for name in held_parts(model))
        assert all("layers" in name for name in held_parts(model))
    logits = load_stack(checkpoint("llama"), 3, 4, quant=quant).run(some_hidden(4), logits_for=1)
    assert logits.shape == (1, 1, 96)


def test_sizes_that_the_kernel_does_not_take_are_told_in_one_sentence(
    checkpoint: Get, caplog: pytest.LogCaptureFixture
) -> None:
    if not formats.is_nf4_fast():
        pytest.skip("this CPU has no kernel for packed NF4")
    with caplog.at_level(logging.WARNING):
        load_stack(checkpoint("odd"), *SPAN, quant="nf4")
        load_stack(checkpoint("llama"), *SPAN, quant="nf4")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "6 of 14 matrices have sizes" in said
    assert "200 x 128" in said


def test_experts_that_only_their_family_can_compute_stay_and_are_told(
    checkpoint: Get, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        stack = load_stack(checkpoint("llama4_text"), *SPAN, quant="nf4")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be quantized" in said
    assert "experts" in said
    assert stack.run(some_hidden(3)).isfinite().all()


# --- which format -----------------------------------------------------------------------------

SIZES: dict[Quant, int] = {"none": 10_000_000_000, "int8": 5_200_000_000, "nf4": 2_800_000_000}


@pytest.mark.parametrize(
    ("device", "free", "chosen", "said"),
    [
        ("cpu", 13_000, "none", "no quantization: the blocks take 10.00 GB of 13.00 GB free"),
        ("cpu", 12_000, "int8", "int8: the blocks take 5.20 GB"),
        ("cpu", 5_000, "nf4", "(no quantization 10.00 GB, int8 5.20 GB would not fit)"),
        ("cpu", 3_000, "nf4", "fewer blocks must be held"),
        ("cuda", 13_000, "none", "on this cuda"),
        ("cuda", 12_000, "nf4", "NF4: the blocks take 2.80 GB"),
    ],
)
def test_auto_takes_the_most_exact_format_that_fits_and_says_so(
    device: str, free: int, chosen: Quant, said: str
) -> None:
    choice = choose_quant("auto", device_kind=device, free_bytes=free * 10**6, span_bytes=SIZES)
    assert choice.quant == chosen
    assert said in choice.sentence


@pytest.mark.parametrize("wanted", ["none", "int8", "nf4"])
def test_what_is_asked_for_is_chosen_whatever_fits(wanted: Quant) -> None:
    choice = choose_quant(
        wanted, device_kind="cpu", free_bytes=0, span_bytes=SIZES, is_nf4_fast=False
    )
    assert choice.quant == wanted
    assert "as asked for" in choice.sentence
    assert ("slow here" in choice.sentence) == (wanted == "nf4")


# --- bitsandbytes itself ----------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from blocks.checkpoint import open_checkpoint
from blocks.load import load_stack
found = open_checkpoint(Path(sys.argv[1]))
load_stack(found, 1, 2)
load_stack(found, 1, 2, quant="int8")
assert "bitsandbytes" not in sys.modules, "imported for nothing"
load_stack(found, 1, 2, quant="nf4")
assert "bitsandbytes" in sys.modules
"""


def test_bitsandbytes_is_imported_for_nf4_alone_and_says_nothing(checkpoint: Get) -> None:
    folder: Path = checkpoint("llama").folder
    made = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
