"""Rotary scalings that go by the length of a text: found, told, and computed as in one forward."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from test_executor_passes import alone, passes, together
from tiny_models import VOCABULARY, some_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blocks.checkpoint import Checkpoint, model_card, open_checkpoint
from blocks.codec import from_raw, to_raw
from blocks.config import length_scaling
from blocks.errors import BlocksError
from blocks.executor import Bounds, Executor, StepJob
from blocks.hf import rotary
from blocks.hf.rotary import LengthScaling, Rotary
from blocks.load import load_stack
from blocks.recorder import TraceRecorder
from blocks.stack import Stack
from blocks.thread import ComputeThread
from blocks.trial import Paging

ORIGINAL, BLOCKS = 20, 3
SIZES: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 9.0, 17.0, 33.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MSCALES = {"short_mscale": 1.0, "long_mscale": 1.4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LONGROPE},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "phimoe": {"rope_parameters": LONGROPE | MSCALES, "num_local_experts": 4},
    "mistral": {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL},
}


def config_of(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **CONFIGS.get(family, {}), **changes})


@pytest.fixture(scope="module", params=CONFIGS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Checkpoint]:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config_of(request.param), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    folder: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model.eval(), open_checkpoint(folder)


def truth(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one forward of a model that has seen no other text."""
    inner = model.model
    with torch.inference_mode(), Rotary(model, inner).at(0):
        return model(input_ids=ids, use_cache=False).logits


def job(key: str, start: int, ids: torch.Tensor, **changes: Any) -> StepJob:
    return StepJob(
        key=key,
        serial=start + 1,
        start=start,
        first=0,
        stop=BLOCKS,
        payload={"ids": to_raw(ids)},
        **changes,
    )


# What a model is found to do


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, LengthScaling((ORIGINAL,))),
        ("phi3", {}, LengthScaling((ORIGINAL,), None, ORIGINAL)),
        ("phimoe", {}, LengthScaling((ORIGINAL,), None, ORIGINAL)),
        ("mistral", {}, LengthScaling((), ORIGINAL)),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ("hunyuan_v1_dense", {"rope_parameters": DYNAMIC | {"alpha": 50.0}}, None),
        ("qwen3", {}, None),
        ("gpt2", {}, None),
    ],
)
def test_a_scaling_is_read_off_the_modules_that_compute_it(
    family: str, changes: dict[str, Any], expected: LengthScaling | None
) -> None:
    sizes = {} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **CONFIGS.get(family, {}), **changes})
    assert length_scaling(config) == expected


def test_the_card_tells_it_where_there_is_one(made: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = made
    card = model_card(checkpoint)["length_scaling"]
    scaling = Rotary(model, model.model).scaling
    assert scaling is not None
    assert card == {
        "switches": list(scaling.switches),
        "grows_after": scaling.grows_after,
        "anew_after": scaling.anew_after,
    }


def test_the_least_length_of_a_regime_stands_for_all_of_it() -> None:
    both = LengthScaling((4, 6), grows_after=8)
    assert [both.regime(length) for length in range(1, 11)] == [0, 0, 0, 0, 5, 5, 7, 7, 9, 10]
    assert all(both.regime(both.regime(n) or 1) == both.regime(n) for n in range(1, 20))


def test_every_scaling_of_the_installed_transformers_is_known_to_go_by_length_or_not() -> None:
    for kind, compute in ROPE_INIT_FUNCTIONS.items():
        if kind in ("longrope", "dynamic"):
            continue
        assert kind in rotary._ANY_LENGTH
        told = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 1.0}
        told |= {"original_max_position_embeddings": 8}
        told |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        config = config_of("llama", rope_parameters=told)
        short, long = (compute(config, torch.device("cpu"), seq_len=n)[0] for n in (4, 100))
        assert torch.equal(short, long), kind


class Tomorrow(nn.Module):
    rope_type = "tides"

    def forward(self, x: Any, position_ids: Any) -> Any: ...


class Renamed(nn.Module):
    rope_type = "longrope"

    def forward(self, x: Any, places: Any) -> Any: ...


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Tomorrow(), "Tomorrow .* scales positions by 'tides'"),
        (Renamed(), "Renamed .* takes no position_ids, but x, places"),
    ],
)
def test_what_is_not_as_known_is_refused_by_name(module: nn.Module, said: str) -> None:
    model = nn.Sequential(module)
    with pytest.raises(BlocksError, match=said):
        Rotary(model, model)


def test_dynamic_scaling_stretches_the_context_by_its_factor(
    made: tuple[PreTrainedModel, Checkpoint],
) -> None:
    is_dynamic = made[1].config.rope_parameters["rope_type"] == "dynamic"
    assert made[1].context_length == (4 * ORIGINAL if is_dynamic else 128)


# What is computed


def test_chunks_of_a_prompt_are_parts_of_one_forward(
    made: tuple[PreTrainedModel, Checkpoint], thread: ComputeThread
) -> None:
    model, checkpoint = made
    ids = some_ids(ORIGINAL + 14, seed=1)
    bounds = Bounds(chunk_positions=8)
    with closing(Executor(load_stack(checkpoint, 0, BLOCKS), thread, bounds)) as executor:
        by_executor = alone(executor, [job("a", 0, ids)])
        whole = {"sequence_length": ids.shape[1]}
        by_client = alone(
            executor, [job("b", 0, ids[:, :9], **whole), job("b", 9, ids[:, 9:], **whole)]
        )
    with torch.inference_mode(), Rotary(model, model.model).at(0):
        theirs = model.model(input_ids=ids, use_cache=False).last_hidden_state
    ours = from_raw(by_executor[0].output["hidden"])
    both = torch.cat([from_raw(done.output["hidden"]) for done in by_client], dim=1)
    torch.testing.assert_close(ours, both, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.model.norm(ours), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_joint_pass_computes_each_text_by_its_own_length(
    made: tuple[PreTrainedModel, Checkpoint], is_paged: bool
) -> None:
    model, checkpoint = made
    stack = load_stack(checkpoint, 0, BLOCKS)
    if is_paged:
        is_recorded = checkpoint.model_type == "llama"  # tracing takes seconds
        recorder = TraceRecorder() if is_recorded else None
        paging = Paging(page_tokens=16, recorder=recorder)
        stack = Stack.of(stack._carved.model, 0, BLOCKS, paging)
    texts = [some_ids(length, seed=length) for length in (ORIGINAL + 9, 6, ORIGINAL - 4, 9)]
    caches = [stack.new_cache() for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        stack.run(text[:, :-3], cache=cache)
    for left in (3, 2, 1):
        steps = [text[:, text.shape[1] - left][None] for text in texts]
        found = stack.run_joined(steps, caches, wants_logits=[True] * len(texts))
    theirs = [truth(model, text)[:, -1:] for text in texts]
    scaling = stack._carved.rotary.scaling
    is_growing = scaling is not None and scaling.grows_after
    for number, (mine, his) in enumerate(zip(found, theirs, strict=True)):
        if number or not is_growing:  # its keys are those of shorter texts
            torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-4)


def test_a_replay_shares_no_pass_over_the_length_where_positions_change(
    made: tuple[PreTrainedModel, Checkpoint], thread: ComputeThread
) -> None:
    _, checkpoint = made
    ids = some_ids(ORIGINAL + 4, seed=2)
    jobs = [job("a", 0, ids[:, : ORIGINAL - 3])]
    jobs += [
        job("a", place, ids[:, place : place + 1]) for place in range(ORIGINAL - 3, ORIGINAL + 4)
    ]
    with closing(Executor(load_stack(checkpoint, 0, BLOCKS), thread)) as executor:
        singly = alone(executor, jobs)
    with closing(Executor(load_stack(checkpoint, 0, BLOCKS), thread)) as executor:
        replayed = together(executor, thread, jobs)
        grows = checkpoint.config.rope_parameters["rope_type"] == "dynamic"
        assert passes(replayed) == [ORIGINAL, 1, 1, 1, 1] if grows else [ORIGINAL, 4]
    for ours, theirs in zip(replayed, singly, strict=True):
        mine, his = from_raw(ours.output["hidden"]), from_raw(theirs.output["hidden"])
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-4)


def test_a_pass_leaves_nothing_in_the_modules(made: tuple[PreTrainedModel, Checkpoint]) -> None:
    _, checkpoint = made
    stack, other = (load_stack(checkpoint, 0, BLOCKS) for _ in range(2))
    short = some_ids(ORIGINAL, seed=3)
    stack.run(some_ids(ORIGINAL + 30, seed=4))
    assert torch.equal(stack.run(short), other.run(short))
    assert not stack.keeps_state
