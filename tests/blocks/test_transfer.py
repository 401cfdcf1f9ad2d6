"""What comes back from a device in one piece comes back to the bit."""

import torch

from blocks.transfer import brought, packed, sent, unpacked


def test_tensors_of_every_kind_come_out_of_one_piece_as_they_went_in() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(3, 5, generator=generator),
        torch.tensor([True, False, True]),
        torch.randn(1, 7, generator=generator).to(torch.bfloat16),
        torch.empty(0, 4),
        torch.arange(9, dtype=torch.int32).view(3, 3).t(),
        torch.tensor(2**40),
        torch.full((2,), torch.nan, dtype=torch.float16),
    ]
    back = unpacked(packed(tensors), tensors)
    for one, other in zip(back, tensors, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8),
            other.contiguous().reshape(-1).view(torch.uint8),
        )


def test_what_is_here_already_is_not_copied() -> None:
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.int32)]
    assert all(one is other for one, other in zip(brought(tensors), tensors, strict=True))
    assert sent(tensors[0], torch.device("cpu")) is tensors[0]
    assert sent(tensors[0], torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16
