"""A pass on a device waits for it once, for what it came to, and keeps the devices apart.

Tried without one: on torch's meta device tensors have no values, so that nothing can be read of
them, and nothing may be computed from these and from ones of this process.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import blocks.passes
from blocks.codec import to_raw
from blocks.decoding import Decoder
from blocks.ends import CandidateWish
from blocks.errors import BlocksError
from blocks.forward import Carved
from blocks.jobs import StepJob
from blocks.legs import Legs
from blocks.passes import run_alone, run_jointly
from blocks.pool import Pools
from blocks.stack import Stack
from blocks.steps import Bounds, Chunk, Cutter, Step

DEVICE = torch.device("meta")
BLOCKS = 3
VOCABULARY = 96


COPIES = {"aten::copy_", "aten::_to_copy"}


class Apart(TorchDispatchMode):
    """Refuses to compute from two devices; only copies take from one to the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        devices = {one.device for one in flat if torch.is_tensor(one) and one.dim()}
        if len(devices) > 1 and func._schema.name not in COPIES:
            raise AssertionError(f"{func} of {devices}")
        return func(*args, **(kwargs or {}))


class Landings:
    """Counts what is brought back, and brings zeros."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.count += 1
        return [torch.zeros(one.shape, dtype=one.dtype) for one in tensors]


@pytest.fixture
def landings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Landings]:
    """Within, devices are kept apart and landings are counted."""
    landings = Landings()
    monkeypatch.setattr(blocks.passes, "brought", landings)
    with Apart(), torch.inference_mode():
        yield landings


def fake_stack() -> Stack:
    config = LlamaConfig(
        num_hidden_layers=BLOCKS,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    carved = Carved(model.requires_grad_(False))
    assert carved.device == DEVICE
    return Stack(carved, 0, BLOCKS, Decoder(carved, Pools(256)))


def chunk_of(
    stack: Stack, key: str, start: int, tokens: int, outputs: Any, wish: CandidateWish | None
) -> Chunk:
    ids = to_raw(torch.zeros(1, 1, dtype=torch.int32))
    payload = {"ids": (ids[0], (1, tokens), bytes(4 * tokens))}
    job = StepJob(
        key=key,
        serial=1,
        start=start,
        first=0,
        stop=BLOCKS,
        payload=payload,
        outputs=outputs,
        candidates=wish,
    )
    (chunk,) = Cutter(stack, Bounds()).chunks(Step(job))
    return chunk


WISHES = (
    CandidateWish(8),
    CandidateWish(8),
    CandidateWish(8, penalised=(3, 5), bias=((7, 1.0),), allowed=(1, 2, 3, 4, 5, 6, 7, 8, 9)),
    None,
)


def test_a_joint_step_of_many_wishes_waits_for_the_device_once(landings: Landings) -> None:
    stack = fake_stack()
    legs = Legs(stack)
    for number in range(len(WISHES)):
        run_alone(legs, [chunk_of(stack, f"{number}", 0, 3 + 2 * number, "none", None)])
    steps = [
        chunk_of(stack, f"{number}", 3 + 2 * number, 1, "last", wish)
        for number, wish in enumerate(WISHES)
    ]
    landings.count = 0
    outcomes = run_jointly(legs, steps)
    assert landings.count == 1
    for outcome, wish in zip(outcomes, WISHES, strict=True):
        # what lands says that its logits are no numbers
        assert outcome.error is None if wish is None else "not numbers" in outcome.error


def test_a_prompt_waits_for_the_device_once_and_for_nothing_before(landings: Landings) -> None:
    stack = fake_stack()
    legs = Legs(stack)
    with pytest.raises(BlocksError, match="not numbers"):  # as zeros say
        run_alone(legs, [chunk_of(stack, "a", 0, 7, "last", WISHES[2])])
    assert landings.count == 1


def test_a_pass_that_comes_to_nothing_is_waited_for_too(
    landings: Landings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(blocks.passes, "wait_for", waited.append)
    stack = fake_stack()
    run_alone(Legs(stack), [chunk_of(stack, "a", 0, 7, "none", None)])
    assert waited == [DEVICE]


def test_computing_from_two_devices_is_seen_here(landings: Landings) -> None:
    with pytest.raises(AssertionError, match="meta"):
        torch.ones(2) + torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="item"):
        int(torch.ones(2, device=DEVICE).sum())
