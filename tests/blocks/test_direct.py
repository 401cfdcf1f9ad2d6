"""The kernel for packed NF4 called directly: the operator's bits, and only where it is known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blocks import direct, formats
from blocks.direct import packed_product
from blocks.formats import Form, Matrix, quantize

SHAPES = [(32, 64), (96, 192), (256, 1152)]


def matrix(outputs: int, inputs: int) -> Matrix:
    if not formats.is_nf4_fast():
        pytest.skip("this CPU has no kernel for packed NF4")
    form = Form("nf4", outputs, inputs, is_packed=True)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    return Matrix(form, quantize(weight, form))


def rows_of(count: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_direct_product_is_the_operators_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    held = matrix(*shape)
    inputs = [rows_of(count, shape[1], dtype) for count in (1, 2, 5, 33, 255)]
    made = [held(rows) for rows in inputs]
    monkeypatch.setattr(formats, "packed_product", lambda library: None)
    assert all(torch.equal(one, held(rows)) for one, rows in zip(made, inputs, strict=True))


def test_a_row_is_the_same_whatever_rows_are_beside_it_and_however_they_lie() -> None:
    held, rows = matrix(96, 192), rows_of(9, 2 * 192, torch.bfloat16)[:, ::2]
    assert not rows.is_contiguous()
    assert torch.equal(held(rows), torch.cat([held(row[None].clone()) for row in rows]))


def library(version: str, *, has_kernel: bool = True, native: Any = None) -> Any:
    """A bitsandbytes that says this of itself. Each is another one: answers are kept."""
    functional = SimpleNamespace(has_avx512bf16=lambda: has_kernel)

    class Library(SimpleNamespace):
        __hash__ = object.__hash__

    return Library(
        __version__=version,
        functional=functional,
        cextension=SimpleNamespace(lib=SimpleNamespace(_lib=native)),
    )


def test_other_releases_and_cpus_without_the_kernel_are_not_called() -> None:
    import bitsandbytes

    known, native = "0.50.2", bitsandbytes.cextension.lib._lib
    assert packed_product(library(known, native=native)) is not None
    assert packed_product(library("0.51.0", native=native)) is None
    assert packed_product(library(known, native=native, has_kernel=False)) is None
    assert packed_product(library(known, native=torch._C)) is None


def test_a_known_release_is_called_directly() -> None:
    import bitsandbytes

    is_known = bitsandbytes.__version__ in direct._KNOWN
    assert (packed_product(bitsandbytes) is not None) == (is_known and formats.is_nf4_fast())
