"""Attention by tables gives what attention to each session's keys gives."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from blocks.by_table import Reads, fits_kernel, read_by_kernel, read_plainly
from blocks.pool import Form, Pool

LENGTHS = (1, 7, 12, 3)


def pages_of(
    lengths: Sequence[int], page: int, heads: int, width: int, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, and a table of pages that follow no order; what nobody holds is NaN."""
    generator = torch.Generator().manual_seed(3)
    most = -(-max(lengths) // page)
    order = torch.randperm(len(lengths) * most, generator=generator) + 1
    rooms = torch.randn(2, len(order) + 1, page, heads, width, generator=generator)
    table = order.view(len(lengths), most).int()
    for row, length in enumerate(lengths):
        for index in range(most):
            left = max(0, length - index * page)
            rooms[:, table[row, index], left:] = torch.nan
            if not left:
                table[row, index] = 0
    keys, values = rooms.to(device, dtype)
    return keys, values, table.to(device)


def expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Each row's attention by itself, in float32, to its own keys in one piece."""
    rows = []
    for one, pages, length in zip(query.float(), table.tolist(), LENGTHS, strict=True):
        first = 0 if window is None else max(0, length - window)
        past, contents = (
            torch.cat([room[number] for number in pages])[first:length].float().transpose(0, 1)
            for room in (keys, values)
        )
        shares = len(one) // len(past)
        rows.append(
            functional.scaled_dot_product_attention(
                one[:, None],
                past.repeat_interleave(shares, 0),
                contents.repeat_interleave(shares, 0),
                scale=scale,
            )[:, 0]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_plain_one_gives_what_each_row_gets_alone(
    heads: int, window: int | None, scale: float | None
) -> None:
    keys, values, table = pages_of(LENGTHS, 4, heads, 8, "cpu", torch.float32)
    query = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    found = read_plainly(query, keys, values, table, lengths, scale, window)
    torch.testing.assert_close(found, expected(query, keys, values, table, scale, window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("reads", [read_by_kernel, read_plainly])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_both_give_what_each_row_gets_alone(
    reads: Reads, window: int | None, dtype: torch.dtype
) -> None:
    keys, values, table = pages_of(LENGTHS, 256, 2, 64, "cuda", dtype)
    query = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(5)).to("cuda", dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    found = reads(query, keys, values, table, lengths, None, window)
    wanted = expected(query, keys, values, table, None, window)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=2e-2)


def a_pool(page: int = 256, width: int = 128, value_width: int = 128, **form: object) -> Pool:
    said = {"dtype": torch.bfloat16, "device": torch.device("cpu"), **form}
    return Pool(Form(2, width, value_width, **said), page)  # type: ignore[arg-type]


def test_the_kernel_reads_half_precision_of_even_widths_in_whole_pages_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not fits_kernel(a_pool())
    monkeypatch.setattr(Pool, "_rooms", lambda self, pages: (torch.empty(0), torch.empty(0)))
    gpu = {"device": torch.device("cuda")}
    assert fits_kernel(a_pool(**gpu))
    assert not fits_kernel(a_pool(dtype=torch.float32, **gpu))
    assert not fits_kernel(a_pool(page=64, **gpu))
    assert not fits_kernel(a_pool(width=192, **gpu))  # its values are narrower
    assert not fits_kernel(a_pool(width=264, value_width=264, **gpu))
    assert not fits_kernel(a_pool(width=100, value_width=100, **gpu))
