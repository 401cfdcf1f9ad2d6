"""Small models whose matrices are large enough to be quantized, in the layouts that matter."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.quantize import held_parts
from blocks.stack import Stack

BLOCKS = 4
HIDDEN = 128
SPAN = (1, 3)

_COMMON: dict[str, Any] = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},  # Conv1D: matrices the other way round, with biases
    "olmo": {"num_key_value_heads": 4},  # nothing but matrices in a block
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {  # experts with biases, the other way round, with a gate of their own
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 192},  # computes its own
    "odd": {"intermediate_size": 200},  # llama with a size that the packed kernel does not take
}
MIXTURES = ("mixtral", "gpt_oss", "qwen3_moe")


@cache
def write(family: str, folder: Path) -> Checkpoint:
    """Save a random model of the family, its norms and biases random too."""
    torch.manual_seed(3)
    kind = "llama" if family == "odd" else family
    config = AutoConfig.for_model(kind, **{**_COMMON, **CONFIGS[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder / family, max_shard_size="200KB")
    return open_checkpoint(folder / family)


def some_hidden(tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Random hidden states [1, tokens, HIDDEN]."""
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def loaded_bytes(stack: Stack) -> int:
    """Bytes of all weights of a stack, in whatever form."""
    model = stack._carved.model
    tensors = [*model.parameters(), *held_parts(model).values()]
    return sum({one.data_ptr(): one.nbytes for one in tensors}.values())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the size of theirs."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
