"""Tensors survive the way to bytes and back; in 8 bits, almost."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from blocks.codec import RawTensor, decode_8bit, encode_8bit, from_raw, to_raw
from blocks.errors import BlocksError, StepError


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


# --- 8 bits


def hidden_states(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random hidden states with a few channels 60 times larger, as in real residual streams."""
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    hidden[..., :2] *= 60
    return hidden


def there_and_back(hidden: torch.Tensor) -> torch.Tensor:
    return decode_8bit(encode_8bit(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 256), (2, 5, 64), (7, 128)])
def test_8_bit_codes_scales_and_values_are_bitsandbytes_own(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    hidden = hidden_states(*shape).to(dtype)
    encode_8bit(hidden)  # so that the import below is a silent one
    from bitsandbytes import functional

    codes, state = functional.quantize_blockwise(hidden.float(), blocksize=64)
    parts = encode_8bit(hidden)
    assert from_raw(parts["codes"]).equal(codes)
    assert from_raw(parts["scales"]).view(-1).equal(state.absmax)
    assert decode_8bit(parts).equal(functional.dequantize_blockwise(codes, state))


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((1, 3, 64), (1, 3, 1)),
        ((2, 3, 256), (2, 3, 4)),
        ((1, 4, 70), (1, 4, 2)),
        ((1, 2, 4, 100), (1, 2, 4, 2)),
        ((3, 1), (3, 1)),
        ((63,), (1,)),
        ((1, 0, 64), (1, 0, 1)),
        ((1, 2, 0), (1, 2, 0)),
    ],
)
def test_in_8_bits_every_shape_comes_back_with_a_short_last_group_per_position(
    shape: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    parts = encode_8bit(torch.ones(shape))
    assert {name: raw[:2] for name, raw in parts.items()} == {
        "codes": ("uint8", shape),
        "scales": ("float32", scales),
    }
    back = decode_8bit(parts)
    assert back.dtype == torch.float32
    assert back.is_contiguous()
    assert back.equal(torch.ones(shape))


def test_8_bits_take_one_byte_and_a_sixteenth_per_value() -> None:
    def size(hidden: torch.Tensor) -> int:
        return sum(len(data) for _, _, data in encode_8bit(hidden).values())

    assert size(torch.ones(1, 5, 256)) == 1.0625 * 5 * 256
    assert size(torch.ones(1, 5, 70)) == 5 * (70 + 2 * 4)


def test_a_value_in_8_bits_is_as_near_as_a_half_gap_of_the_code() -> None:
    # a lookup in bitsandbytes' CPU kernel takes the next code but one in rare, close cases
    slack = 2.0**-15
    exact = torch.linspace(-1, 1, 63 * 2001, dtype=torch.float64).view(1, -1, 63)
    exact = torch.cat([torch.ones(1, exact.shape[1], 1), exact], -1).float().double()
    hidden = (exact * 40).float()
    encode_8bit(hidden)
    from bitsandbytes import functional

    code = functional.create_dynamic_map().double()
    values = exact.reshape(-1)
    above = torch.searchsorted(code, values).clamp(1, 255)
    nearest = torch.minimum((code[above] - values).abs(), (code[above - 1] - values).abs())
    error = (there_and_back(hidden).double() / 40 - exact).abs().reshape(-1)
    assert float((error - nearest).max()) <= slack
    assert float(error.max()) <= 0.0071
    small = values.abs() < 0.01
    assert float(error[small].max()) <= 0.0005


def test_an_outlier_coarsens_its_own_64_values_only() -> None:
    hidden = hidden_states(1, 8, 256)
    error = (there_and_back(hidden) - hidden)[..., 64:].norm() / hidden[..., 64:].norm()
    assert float(error) < 0.012
    hidden[..., 0] *= 1000
    assert there_and_back(hidden)[..., 64:].equal(
        there_and_back(hidden_states(1, 8, 256))[..., 64:]
    )


@pytest.mark.parametrize("width", [64, 70, 5])
def test_a_position_has_the_same_codes_alone_and_in_any_chunk(width: int) -> None:
    hidden = hidden_states(2, 6, width)
    together = there_and_back(hidden)
    for row in range(2):
        for position in range(6):
            alone = there_and_back(hidden[row : row + 1, position : position + 1])
            assert alone[0, 0].equal(together[row, position])


def test_zeros_and_the_largest_float32_survive_8_bits() -> None:
    assert not there_and_back(torch.zeros(1, 2, 70)).any()
    largest = torch.finfo(torch.float32).max
    back = there_and_back(torch.full((1, 1, 64), largest))
    assert back.equal(torch.full((1, 1, 64), largest))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinities_are_refused_in_8_bits(odd: float, dtype: torch.dtype) -> None:
    hidden = hidden_states(1, 2, 70).to(dtype)
    hidden[0, 1, 69] = odd
    with pytest.raises(BlocksError, match="NaN or infinities"):
        encode_8bit(hidden)


@pytest.mark.parametrize("tensor", [torch.ones(1, 2, 64, dtype=torch.int64), torch.tensor(1.0)])
def test_what_is_no_hidden_state_is_not_encoded(tensor: torch.Tensor) -> None:
    with pytest.raises(BlocksError, match="for hidden states"):
        encode_8bit(tensor)


CODES: RawTensor = to_raw(torch.zeros(1, 2, 70, dtype=torch.uint8))
SCALES: RawTensor = to_raw(torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"codes": CODES}, "codes and scales"),
        ({"codes": CODES, "scales": SCALES, "more": SCALES}, "codes and scales"),
        ({"codes": to_raw(torch.zeros(1, 2, 70)), "scales": SCALES}, "are uint8"),
        ({"codes": to_raw(torch.tensor(0, dtype=torch.uint8)), "scales": SCALES}, "are uint8"),
        ({"codes": CODES, "scales": to_raw(torch.ones(1, 2, 1))}, "are float32"),
        ({"codes": CODES, "scales": to_raw(torch.ones(2, 2))}, "are float32"),
        ({"codes": CODES, "scales": to_raw(torch.ones(1, 2, 2).half())}, "are float32"),
        ({"codes": CODES, "scales": to_raw(torch.tensor([[[1, math.nan]] * 2]))}, "finite"),
        ({"codes": CODES, "scales": to_raw(torch.tensor([[[1, math.inf]] * 2]))}, "finite"),
        ({"codes": CODES, "scales": to_raw(torch.tensor([[[1, -1.0]] * 2]))}, "not negative"),
        ({"codes": ("uint8", (1, 2, 70), bytes(139)), "scales": SCALES}, "139 bytes"),
    ],
)
def test_8_bit_parts_that_do_not_add_up_are_the_senders_fault(
    parts: dict[str, RawTensor], why: str
) -> None:
    with pytest.raises(StepError, match=why):
        decode_8bit(parts)


_SCRIPT = """
import sys, torch
import blocks.codec
assert "bitsandbytes" not in sys.modules
blocks.codec.decode_8bit(blocks.codec.encode_8bit(torch.ones(1, 2, 64)))
assert "bitsandbytes" in sys.modules
"""


def test_bitsandbytes_is_imported_by_the_first_8_bit_codes_and_says_nothing() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
