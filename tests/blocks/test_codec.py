"""Tensors survive the way to bytes and back."""

import warnings

import pytest
import torch

from blocks.codec import from_raw, to_raw
from blocks.errors import StepError


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32"],
)
@pytest.mark.parametrize("shape", [(1, 3), (2, 1, 4, 5), (1, 0), (0, 3), (7,)])
def test_every_dtype_and_shape_comes_back_equal(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(
        getattr(torch, dtype)
    )
    raw = to_raw(tensor)
    assert raw[:2] == (dtype, shape)
    assert isinstance(raw[2], bytes)
    back = from_raw(raw)
    assert back.dtype == tensor.dtype
    assert back.equal(tensor)


def test_values_go_out_in_c_order_however_they_lie_in_memory() -> None:
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3).t()
    assert to_raw(tensor) == (
        "int32",
        (3, 2),
        b"".join(bytes([n, 0, 0, 0]) for n in (0, 3, 1, 4, 2, 5)),
    )


def test_read_only_bytes_at_odd_addresses_are_taken_without_a_warning_and_copied() -> None:
    held = bytearray(b"x" + bytes([1, 0, 0, 0, 2, 0, 0, 0]))
    view = memoryview(held)[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = from_raw(("int32", (2,), view.toreadonly()))
    held[1] = 9
    assert tensor.tolist() == [1, 2]


@pytest.mark.parametrize(
    "raw",
    [
        ("float64", (1,), bytes(8)),
        ("int32", (2,), bytes(7)),
        ("int32", (-1, -2), bytes(8)),
        ("float32", (2, 2), bytes(12)),
    ],
)
def test_bytes_that_do_not_add_up_are_the_senders_fault(raw: tuple) -> None:
    with pytest.raises(StepError):
        from_raw(raw)
