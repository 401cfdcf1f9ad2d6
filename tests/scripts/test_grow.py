"""scripts/grow.py: a grown Llama is its source in another shape."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "grow.py"
PROMPT = [[3, 17, 42, 8, 25]]
Make = Callable[..., Path]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grow", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grow = load_script()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a maker of tiny random Llamas in which every weight matters."""

    def build(shards: int = 1, **shape: Any) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                "eos_token_id": None,
                "initializer_range": 0.3,
                **shape,
            }
        )
        model = LlamaForCausalLM(config)
        for weight in model.parameters():
            if weight.dim() == 1:  # norms begin as ones, biases as zeros: a mix-up would not show
                weight.data += 0.3 * torch.randn_like(weight)
        folder = tmp_path_factory.mktemp("llama") / "source"
        size = sum(weight.nbytes for weight in model.parameters())
        model.save_pretrained(folder, max_shard_size=size // shards + 1)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return build


def logits_and_tokens(folder: Path) -> tuple[torch.Tensor, list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(PROMPT)
    told = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    with torch.no_grad():
        return model(told).logits, told[0].tolist()


def check_same_function(source: Path, grown: Path) -> None:
    wanted_logits, wanted_tokens = logits_and_tokens(source)
    logits, tokens = logits_and_tokens(grown)
    assert tokens == wanted_tokens
    assert len(set(tokens)) > 5, "a model stuck on one token would prove little"
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"width": 4},
        {"width": 3},
        {"halve": True},
        {"more": 2},
        {"total": 5},
        {"total": 11},
        {"head_dim": 32},
        {"head_dim": 16},
        {"width": 2, "head_dim": 32, "total": 7},
    ],
    ids=str,
)
def test_a_grown_model_writes_the_tokens_of_its_source(
    make: Make, tmp_path: Path, how: dict[str, int], tied: bool
) -> None:
    source = make(tie_word_embeddings=tied)
    config = grow.grow(source, tmp_path / "grown", **how)
    check_same_function(source, tmp_path / "grown")
    assert config["tie_word_embeddings"] is tied


def test_a_model_with_biases_and_one_key_head_and_scaled_frequencies_keeps_its_function(
    make: Make, tmp_path: Path
) -> None:
    rotary = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    source = make(attention_bias=True, mlp_bias=True, num_key_value_heads=1, rope_parameters=rotary)
    grow.grow(source, tmp_path / "grown", width=2, head_dim=16, total=8)
    check_same_function(source, tmp_path / "grown")


def test_the_grown_model_has_the_shape_that_was_asked_for(make: Make, tmp_path: Path) -> None:
    grow.grow(make(), tmp_path / "grown", width=4, head_dim=32, total=10)
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert (config["hidden_size"], config["intermediate_size"]) == (128, 160)
    assert (config["num_hidden_layers"], config["head_dim"]) == (10, 32)
    assert model.model.layers[9].self_attn.q_proj.weight.shape == (128, 128)
    assert model.model.layers[9].mlp.gate_proj.weight.shape == (160, 128)


def test_shards_of_the_source_are_read_and_shards_with_an_index_are_written(
    make: Make, tmp_path: Path
) -> None:
    source = make(shards=3)
    assert len(list(source.glob("*.safetensors"))) > 1
    grow.grow(source, tmp_path / "grown", width=2, shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "grown").glob("*.safetensors"))
    index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
    assert files == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "grown" / file).stat().st_size < 110_000 for file in files)
    check_same_function(source, tmp_path / "grown")


def test_the_weights_have_the_dtype_asked_for_else_the_source_s(make: Make, tmp_path: Path) -> None:
    source = make()
    for name, asked in (("half", "bfloat16"), ("same", None)):
        grow.grow(source, tmp_path / name, width=2, dtype=asked)
        kinds = {w.dtype for w in load_file(tmp_path / name / "model.safetensors").values()}
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert kinds == {getattr(torch, asked or "float32")}
        assert config["dtype"] == (asked or "float32")


def test_tokenizer_and_generation_files_travel_along(make: Make, tmp_path: Path) -> None:
    grow.grow(make(), tmp_path / "grown")
    assert (tmp_path / "grown" / "tokenizer.json").is_file()
    assert (tmp_path / "grown" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"total": 2}, "only grow"),
        ({"head_dim": 12}, "multiple of 8"),
        ({"head_dim": 4}, "multiple of 8"),
        ({"width": 0}, "1 or more"),
    ],
)
def test_a_shape_that_cannot_be_reached_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path, how: dict[str, int], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        grow.grow(make(), tmp_path / "grown", **how)
    assert not (tmp_path / "grown").exists()


def test_a_rotary_table_that_depends_on_the_head_s_width_is_refused(
    make: Make, tmp_path: Path
) -> None:
    source = make(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="yarn"):
        grow.grow(source, tmp_path / "grown", head_dim=16)


def test_as_many_blocks_as_possible_act() -> None:
    def parts(total: int) -> list[str]:
        return [block.part for block in grow.planned(2, halve=False, more=0, total=total)]

    assert parts(2) == ["whole", "whole"]
    assert parts(3) == ["whole", "attention", "mlp"]
    assert parts(4) == ["attention", "mlp"] * 2
    assert parts(6) == ["attention", "mlp", "nothing"] * 2


def test_what_is_shared_out_evenly_adds_up_and_differs_by_at_most_one() -> None:
    for count in range(12):
        for among in range(1, 7):
            shares = grow.evenly(count, among)
            assert (len(shares), sum(shares)) == (among, count)
            assert max(shares) - min(shares) <= 1
