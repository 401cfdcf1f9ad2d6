"""Tiny random models of several families, saved in several shards, and runs of cut-up ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from blocks.cache import StackCache
from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.load import load_stack
from blocks.shrink import tiny_config
from blocks.sides import Sides
from blocks.stack import Stack

BLOCKS = 6
VOCABULARY = 96
WINDOW = 5  # of gemma3's sliding layers: shorter than every text in these tests

_COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = {
    **_COMMON,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma3_text": {**_LLAMA, "sliding_window": WINDOW},
    "bloom": _COMMON,
    "gpt2": {**_COMMON, "max_position_embeddings": 128},
    "qwen3_next": {  # recurrent layers: cannot roll back
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "falcon_mamba": {**_COMMON, "state_size": 8, "time_step_rank": 4},  # recurrent layers only
    "recurrent_gemma": {**_LLAMA, "lru_width": 32, "attention_window_size": 8},  # state in modules
    "deepseek_v32": {  # sparse attention: an indexer chooses which positions are looked at
        **_LLAMA,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 6,
        "index_n_heads": 8,  # few would tie at 0, and ties are broken at will
        "index_head_dim": 8,
    },
}
# Whose layers need more than the hidden state, and what to change in the smallest config.
WITH_SIDES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "per_layer_config": {f"{number:02d}": {"head_dim": 32} for number in (1, 3, 5)},
    },
    "zamba": {},
    "zamba2": {},
    "deepseek_v4": {},
    "hy_v4": {},
    "zaya": {},
}
PROVEN = ("llama", "qwen3_moe", "gemma3_text", "bloom", "gpt2")
CUTS = (
    (range(2), range(2, 5), range(5, 6)),
    (range(3), range(3, 6)),
    (range(1), range(1, 2), range(2, 6)),
)


@dataclass(frozen=True)
class TinyModel:
    """The whole model, what transformers makes of its folder, and the folder."""

    whole: PreTrainedModel
    checkpoint: Checkpoint


def build(family: str, folder: Path, *, tied: bool) -> TinyModel:
    """Make a random model of the family, save it in shards and load it back whole."""
    torch.manual_seed(7)
    if family in FAMILIES:
        config = AutoConfig.for_model(family, **FAMILIES[family], tie_word_embeddings=tied)
    else:
        values = {**tiny_config(family).to_dict(), **WITH_SIDES.get(family, {})}
        config = AutoConfig.for_model(**values | {"tie_word_embeddings": tied})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases too, or errors in them would not show
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TinyModel(whole, open_checkpoint(folder))


def some_ids(count: int, *, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Random ids [rows, count] that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, count), generator=generator)


def load_cut(checkpoint: Checkpoint, cut: Sequence[range]) -> list[Stack]:
    """Load one stack per span."""
    return [load_stack(checkpoint, span.start, span.stop) for span in cut]


def logits_of(
    stacks: Sequence[Stack],
    ids: torch.Tensor,
    caches: Sequence[StackCache | None] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Send ids through the stacks one after the other, going on from the caches."""
    values, sides = ids, Sides()
    for stack, cache in zip(stacks, caches or [None] * len(stacks), strict=True):
        start = cache.length if cache else 0
        wanted = 0 if stack.holds_head else None
        values = stack.run(
            values, cache=cache, start=start, mask=mask, logits_for=wanted, sides=sides
        )
    return values


def whole_logits(model: TinyModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """What transformers computes in one forward."""
    with torch.inference_mode():
        return model.whole(input_ids=ids, use_cache=False, **arguments).logits.float()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal within 1e-5, and not because there is nothing in them."""
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
