"""Make a config of any family tiny: same class and structure, few layers, small sizes.

1. Sizes shrink, switches stay: kinds of layers, biases, tying, norms, routing, rotary scaling.
2. Every kind of layer that the config has is among the layers that are left, while there is room.
3. Windows, chunks and sparse choices become shorter than the texts of the trial, so that they bite,
   and so do the lengths beyond which rotary scalings change.
4. No family's name decides, but for a short table of those whose sizes depend on each other in a
   way of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.errors import CheckpointError
from blocks.hf.models import CONFIG_MAPPING, PretrainedConfig

BLOCKS = 6
VOCABULARY = 96
WINDOW = 5  # positions; the trial's texts are longer
ORIGINAL = 10  # positions of a text whose scaling goes by length; the trial's texts cross it
_TOWER_LAYERS = 3  # of vision and audio towers: another number than BLOCKS, not to be taken for it
_HEADS, _HEAD_DIM, _HIDDEN = 4, 16, 64
_POSITIONS = 128
_SHARING = 2  # layers that reuse the keys of earlier ones

_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"),
)
_HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim")

# What each size becomes, unless it is smaller already.
_SIZES: dict[str, int] = {
    **dict.fromkeys(_HIDDEN_SIZES, _HIDDEN),
    **dict.fromkeys(_HEAD_COUNTS, _HEADS),
    **dict.fromkeys(("swa_num_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_query_groups"), _HEADS),
    **dict.fromkeys(("dim_head", "d_head", "attention_head_size", "kv_channels"), _HEAD_DIM),
    **dict.fromkeys(("linear_head_dim", "swa_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dim_ff", "d_inner"), 96),
    **dict.fromkeys(("dff", "feed_forward_size"), 96),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 8),
    **dict.fromkeys(("moe_num_experts", "zero_expert_num"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "n_shared_experts"), 2),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts"), 2),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "hc_lowrank", "laurel_rank"), 16),
    **dict.fromkeys(("adapter_rank", "gated_norm_rank", "router_hidden_size"), 16),
    # sums over few heads are often exactly 0, and which of equals a top-k picks is anybody's guess
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 16),
    **dict.fromkeys(("n_groups",), 2),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("index_topk", "index_block_size", "index_topk_blocks"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "o_groups"), 2),
    **dict.fromkeys(("num_kv_shared_layers",), _SHARING),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_d_ssm",), 2 * _HIDDEN),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "rel_extent", "d_rel"), 16),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("hidden_size_per_layer_input", "lru_width", "ple_embed_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _POSITIONS),
    **dict.fromkeys(("seq_length", "model_max_length", "context_length"), _POSITIONS),
    **dict.fromkeys(("original_max_position_embeddings",), _POSITIONS // 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "keep_window_size"), WINDOW),
    **dict.fromkeys(("local_attention", "floor_scale", "log_scaling_n_floor"), WINDOW),
    **dict.fromkeys(("max_window_layers",), BLOCKS // 2),
    **dict.fromkeys(("ngram_vocab_size_base", "encoder_hash_byte_group_vocab"), VOCABULARY),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), _HIDDEN),
    **dict.fromkeys(("patch_size",), 8),
}

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Lists of the numbers of layers, not one entry per layer.
_LAYER_NUMBERS = (
    *("moe_layers", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers"),
    *("cross_attention_layers", "ple_layer_ids", "attn_layer_indices"),
)

# Sizes that hang together in a way of the family's own.
_OWN_WAYS: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"head_dim": 32, "qk_nope_head_dim": 24},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {"indexer_head_dim": 32, "indexer_budget": 8, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 8]},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
    },
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * place for place in range(64)],
    "long_factor": [2.0 + 0.5 * place for place in range(64)],
    "original_max_position_embeddings": 4096,
}

# What default configs do not say although the class needs it, or leave out although it is what
# the family is for. Configs of real checkpoints say it all.
_SAID_BY_DEFAULT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    # the whole composite masks what a stack need not, which rounds otherwise where layers are full
    # and not in the last stack: its text part alone shows that shared keys arrive
    "gemma4_unified": {"text_config": {"num_kv_shared_layers": 0}},
    "granitemoehybrid": {"layer_types": ["linear_attention"] * 2 + ["full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {
        "layer_types": ["conv", "conv", "full_attention"],
        "full_attn_idxs": [*range(2, 32, 3)],
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "minicpm3": {"rope_parameters": _LONGROPE},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "phi3": {"rope_parameters": _LONGROPE},
    "phi4_multimodal": {"rope_parameters": _LONGROPE},
    "phimoe": {"rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"default_language": "en_XX"},
}

_KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    *("swa_num_key_value_heads", "multi_query_group_num"),
)

# What is of the weights on disk, or of code that is not transformers' own.
_NOT_KEPT = ("quantization_config", "auto_map", "dtype", "torch_dtype", "_name_or_path")

Values = dict[str, Any]


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default config of a model type, made tiny. CheckpointError if there is no such type."""
    try:
        kind = CONFIG_MAPPING[model_type]
    except KeyError as error:
        raise CheckpointError(f"this transformers has no model type {model_type}") from error
    config = kind.from_dict(shrunk_values(_filled(kind().to_dict()), BLOCKS))
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # as causal language models these families are nothing else
    return config


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A tiny config of the same class and structure; the given one is left as it is.

    Raises whatever the config's own class raises for sizes that it does not take.
    """
    return type(config).from_dict(shrunk_values(config.to_dict(), BLOCKS))


def shrunk_values(values: Mapping[str, Any], layers: int) -> Values:
    """The values of a config, made tiny, with that many layers; nested configs with them."""
    count = _layer_count(values)
    kept = _kept(values, _columns(values, count or layers), layers)
    own_ways = _OWN_WAYS.get(str(values.get("model_type")), {})
    small: Values = {}
    for name, value in values.items():
        if name in _NOT_KEPT:
            continue
        if name in _LAYER_COUNTS and type(value) is int:
            small[name] = layers
        elif name == "per_layer_config":
            small[name] = _per_layer(values, kept, own_ways)
        elif isinstance(value, Mapping):
            small[name] = _shrunk_map(name, value)
        elif isinstance(value, list) and name not in _TOKENS:
            small[name] = _shrunk_list(name, value, kept, count)
        else:
            small[name] = _shrunk_number(name, value)
    small.update(_related(values))
    small.update(own_ways)
    if isinstance(small.get("rope_parameters"), dict):
        _fit_rotary(small["rope_parameters"], small)
        _cross_lengths(small)
    return small


def kept_layers(columns: Sequence[Any], wanted: int) -> tuple[int, ...]:
    """Which `wanted` layers to keep, in order, so that every kind is among them.

    `columns` tells the kind of each layer. Too few layers are gone through again.
    """
    count = len(columns)
    if count < wanted:
        return tuple(number % count for number in range(wanted))
    firsts: dict[str, int] = {}
    for number in range(count):
        firsts.setdefault(repr(columns[number]), number)
    chosen = sorted(firsts.values())[:wanted]
    others = (number for number in range(count) if number not in chosen)
    return tuple(sorted([*chosen, *(next(others) for _ in range(wanted - len(chosen)))]))


def _kept(values: Mapping[str, Any], columns: Sequence[Any], layers: int) -> Sequence[int]:
    """The layers to keep; the last, where they share keys, are of kinds that come before, too."""
    shared = min(values.get("num_kv_shared_layers") or 0, _SHARING)
    head = kept_layers(columns, layers - shared)
    after = head[-1] + 1
    if len(columns) - after < shared:
        return kept_layers(columns, layers)
    return (*head, *(after + number for number in kept_layers(columns[after:], shared)))


def _filled(values: Mapping[str, Any], said: Mapping[str, Any] | None = None) -> Values:
    """Default values with what they leave unsaid; nested configs with theirs.

    A short list of kinds of layers goes on as it begins.
    """
    if said is None:
        said = _SAID_BY_DEFAULT.get(str(values.get("model_type")), {})
    filled = {**values, **said}
    for name, value in filled.items():
        if isinstance(values.get(name), Mapping):
            nested = said.get(name) if isinstance(value, Mapping) else None
            filled[name] = _filled(values[name], nested)
        elif name == "num_kv_shared_layers" and value == 0 and name not in said:
            filled[name] = _SHARING  # most of its checkpoints do
        elif name == "layer_types" and name in said:
            count = _layer_count(values) or BLOCKS
            filled[name] = [value[number % len(value)] for number in range(count)]
    return filled


def _layer_count(values: Mapping[str, Any]) -> int | None:
    for name in _LAYER_COUNTS:
        if type(values.get(name)) is int:
            return int(values[name])
    kinds = values.get("layers_block_type")  # where the list of kinds is the count
    return len(kinds) if isinstance(kinds, list) else None


def _columns(values: Mapping[str, Any], count: int) -> list[list[Any]]:
    """For each layer what the config says of it alone."""
    told: list[list[Any]] = [[] for _ in range(count)]
    for name, value in values.items():
        for number, column in enumerate(told):
            if name in _LAYER_NUMBERS and isinstance(value, list):
                column.append(number in value)
            elif name == "per_layer_config":
                column.append(_by_layer(values).get(number))
            elif isinstance(value, list) and len(value) == count:
                column.append(value[number])
    return told


def _shrunk_number(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _TOKENS:
        return _TOKENS[name]
    if type(value) is int and name.endswith(("_token_id", "_token_index")):
        return min(value, VOCABULARY - 1)
    if type(value) is int and name.endswith("_vocab_size"):
        return min(value, VOCABULARY)
    if type(value) is int and name.endswith("_embed_dim"):
        return min(value, _HIDDEN)
    return min(value, _SIZES[name]) if type(value) is int and name in _SIZES else value


def _shrunk_list(name: str, value: list[Any], kept: Sequence[int], count: int | None) -> list[Any]:
    if name in _LAYER_NUMBERS:
        return [new for new, old in enumerate(kept) if old in value]
    if len(value) != count:
        return value
    own = name.removesuffix("_per_layer")
    return [_shrunk_number(own, value[number]) for number in kept]


def _per_layer(values: Mapping[str, Any], kept: Sequence[int], own_ways: Values) -> Values:
    """What single layers have of their own, by their new numbers."""
    said = _by_layer(values)
    found: Values = {}
    for new, old in enumerate(kept):
        own = said.get(old, {})
        small = {name: _shrunk_number(name, value) for name, value in own.items()}
        small |= {name: size for name, size in _related({**values, **own}).items() if name in own}
        small |= {name: size for name, size in own_ways.items() if name in own}
        if small:
            found[f"{new:02d}"] = small
    return found


def _by_layer(values: Mapping[str, Any]) -> dict[int, Values]:
    said = values.get("per_layer_config") or {}
    return {int(number): dict(own) for number, own in said.items() if str(number).isdigit()}


def _shrunk_map(name: str, value: Mapping[str, Any]) -> Values:
    if name.endswith(("_config", "decoder")):
        is_text = any(word in name for word in ("text", "decoder", "llm", "language"))
        return shrunk_values(value, BLOCKS if is_text else _TOWER_LAYERS)
    return {
        key: _shrunk_map(key, one) if isinstance(one, Mapping) else _shrunk_number(key, one)
        for key, one in value.items()
    }


def _first(values: Mapping[str, Any], names: Sequence[str]) -> int | None:
    found = (values.get(name) for name in names)
    return next((value for value in found if type(value) is int), None)


def _related(values: Mapping[str, Any]) -> Values:
    """Sizes whose relation to another size is part of the structure."""
    heads, hidden = _first(values, _HEAD_COUNTS), _first(values, _HIDDEN_SIZES)
    found: Values = {}
    for name in _KEY_VALUE_HEADS:
        count = values.get(name)
        if type(count) is int:
            found[name] = _HEADS if count == heads else min(count, 2)
    wide = values.get("head_dim")
    if type(wide) is int and heads and hidden:
        if wide == values.get("qk_rope_head_dim"):
            found["head_dim"] = _SIZES["qk_rope_head_dim"]
        else:
            share = hidden / heads
            found["head_dim"] = int(_HEAD_DIM * (0.5 if wide < share else 1 + (wide > share)))
    for name, part in (("attention_hidden_size", 1), ("attention_head_dim", _HEADS)):
        if type(values.get(name)) is int and heads and hidden:
            times = values[name] * (heads if part > 1 else 1) / hidden
            found[name] = int(_HIDDEN // part * times)
    shared = values.get("num_kv_shared_layers")
    if type(shared) is int and shared == _layer_count(values):
        found["num_kv_shared_layers"] = BLOCKS
    embedded = values.get("word_embed_proj_dim")
    if type(embedded) is int:
        found["word_embed_proj_dim"] = _HIDDEN if embedded == hidden else _HIDDEN // 2
    return found


def _cross_lengths(small: Values) -> None:
    """Let scalings that go by the length of a text change within the texts of the trial."""
    told = small["rope_parameters"]
    for rope in [told, *(one for one in told.values() if isinstance(one, dict))]:
        if rope.get("rope_type") == "longrope":
            for owner in (rope, small):
                if "original_max_position_embeddings" in owner:
                    owner["original_max_position_embeddings"] = ORIGINAL
        elif rope.get("rope_type") == "dynamic" and not rope.get("alpha"):
            small["max_position_embeddings"] = ORIGINAL
            rope["factor"] = max(rope.get("factor") or 1.0, 4.0)


def _fit_rotary(rope: Values, small: Mapping[str, Any]) -> None:
    """Cut the lists of rotary scaling to the width of the tiny heads."""
    heads, hidden = _first(small, _HEAD_COUNTS) or 1, _first(small, _HIDDEN_SIZES) or 0
    width = small.get("qk_rope_head_dim") or small.get("head_dim") or hidden // heads
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    for name, value in rope.items():
        if isinstance(value, dict):
            _fit_rotary(value, small)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            rope[name] = value[:half]
        elif name == "mrope_section" and isinstance(value, list):
            share = half // len(value)
            rope[name] = [half - share * (len(value) - 1), *[share] * (len(value) - 1)]
