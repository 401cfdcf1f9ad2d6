"""scripts/quality.py: what quantized weights and an 8-bit wire cost, on a few tokens."""

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from blocks import formats

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as python does for the script that it runs
quality = import_module("quality")
sys.path.remove(str(SCRIPTS))

TOKENS = 100
STORIES = [
    "Tom had a little red ball. He liked to play with it in the park. One day, the ball was lost, "
    "and Tom was very sad. His mom said that they could look for it.",
    "The sun was warm and a small bird sang in the big tree. A girl named Sue came and listened. "
    '"You sing so well," said Sue, and the bird was happy.',
    "It rained all day. Ben stayed at home and made a house of boxes for his cat. The cat went in, "
    "turned around, and came out again. They laughed and had some soup.",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """The demo model, measured on a few tokens."""
    return quality.measure(quality.DEMO, STORIES, TOKENS, "float32")


@pytest.fixture(scope="module")
def rows(figures: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["quant"], row["wire"]): row for row in figures["rows"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Stories, of which four are held out."""
    told = [f"Story {n}. {STORIES[n % 3]} {STORIES[(n + 1) % 3]}" for n in range(102)]
    (tmp_path / "tinystories-a.txt").write_text("<|endoftext|>".join(told))
    return tmp_path


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(quality.DEMO / "tokenizer.json"))


def test_every_format_meets_every_wire_on_the_same_tokens_in_three_stacks(
    figures: dict[str, Any], rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    assert (figures["model"], figures["tokens"], figures["stacks"]) == ("demo", TOKENS, 3)
    assert list(rows) == [(one, wire) for one in ("none", "int8", "nf4") for wire in quality.WIRES]


def test_the_stacks_hold_each_block_once_and_in_order() -> None:
    stacks = quality.stacks_of(quality.open_checkpoint(quality.DEMO), "none", "float32")
    assert [(one.start, one.stop) for one in stacks] == [(0, 2), (2, 5), (5, 8)]


def test_unquantized_blocks_on_a_raw_wire_read_as_the_whole_model(
    figures: dict[str, Any], rows: dict[tuple[str, str], dict[str, Any]]
) -> None:
    row = rows["none", "raw"]
    assert row["perplexity"] == pytest.approx(figures["whole_perplexity"], rel=1e-5)
    assert row["ratio"] == pytest.approx(1, abs=1e-5)
    assert row["top_1_percent"] == 100


def test_the_whole_model_s_perplexity_is_that_of_transformers_own_loss(
    figures: dict[str, Any], tokenizer: Tokenizer
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quality.DEMO, dtype=torch.float32)
    nats, left = 0.0, TOKENS
    for story in STORIES:
        ids = torch.tensor([tokenizer.encode(story).ids[: left + 1]])
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        left -= ids.shape[1] - 1
        if not left:
            break
    assert left == 0
    assert figures["whole_perplexity"] == pytest.approx(math.exp(nats / TOKENS), rel=1e-5)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantized_weights_read_differently_but_no_nonsense(
    rows: dict[tuple[str, str], dict[str, Any]], quant: str
) -> None:
    row = rows[quant, "raw"]
    assert abs(row["ratio"] - 1) > 1e-5
    assert row["ratio"] == pytest.approx(1, abs=0.2)
    assert row["top_1_percent"] > 70


def test_nf4_reads_as_the_whole_model_with_its_matrices_quantized_by_hand(
    rows: dict[tuple[str, str], dict[str, Any]], tokenizer: Tokenizer
) -> None:
    """A scale per 64 values and the nearest of 16 levels: nothing of bitsandbytes is called."""
    from transformers import AutoModelForCausalLM

    levels = torch.tensor(formats._NF4_VALUES)
    model = AutoModelForCausalLM.from_pretrained(quality.DEMO, dtype=torch.float32).eval()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(-1, 64)
            largest = groups.abs().amax(1, keepdim=True)
            nearest = (groups[..., None] / largest[..., None] - levels).abs().argmin(-1)
            groups.copy_(levels[nearest] * largest)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids).logits

    by_hand = quality.read(logits_of, quality.cut(STORIES, tokenizer, TOKENS, 512))
    assert rows["nf4", "raw"]["perplexity"] == pytest.approx(by_hand.perplexity, rel=0.01)


def test_nf4_agrees_less_than_int8(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert rows["nf4", "raw"]["top_1_percent"] < rows["int8", "raw"]["top_1_percent"]


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
def test_an_8_bit_wire_changes_the_perplexity_but_by_less_than_3_per_cent(
    rows: dict[tuple[str, str], dict[str, Any]], quant: str
) -> None:
    coded, raw = rows[quant, "8-bit"]["ratio"], rows[quant, "raw"]["ratio"]
    assert coded != raw
    assert coded == pytest.approx(raw, rel=0.03)


def test_texts_are_cut_to_the_context_and_to_the_tokens_that_are_counted(
    tokenizer: Tokenizer,
) -> None:
    ids = [tokenizer.encode(story).ids for story in STORIES]
    assert quality.cut(STORIES, tokenizer, 10_000, 512) == ids
    assert quality.cut(STORIES, tokenizer, 30, 21) == [ids[0][:21], ids[1][:11]]
    assert quality.cut(["", *STORIES], tokenizer, 5, 512) == [ids[0][:6]]


def test_a_model_that_finds_every_token_equally_likely_has_the_vocabulary_for_perplexity() -> None:
    reading = quality.read(lambda ids: torch.zeros(*ids.shape, 50), [[1, 2, 3], [4, 5]])
    assert reading.perplexity == pytest.approx(50)
    assert len(reading.likeliest) == 3


def test_only_stories_that_trained_nothing_are_scored(data: Path) -> None:
    training, held = quality.hold_out(quality.read_stories(data), 0)
    assert len(held) == 4
    found = quality.measure_all([quality.DEMO], data, TOKENS, "float32")
    assert found["models"] == [quality.measure(quality.DEMO, held, TOKENS, "float32")]
    assert found["models"] != [quality.measure(quality.DEMO, training, TOKENS, "float32")]


def test_the_same_command_prints_the_same_figures(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for _ in range(2):
        quality.main(["--data", str(data), "--tokens", "20", "--json"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert json.loads(printed[0])["models"][0]["tokens"] == 20


def test_a_model_that_is_not_there_is_skipped_with_the_reason_and_the_others_are_measured(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    absent = [str(tmp_path / name) for name in ("absent", "empty")]
    models = [word for one in absent for word in ("--model", one)]
    quality.main(["--data", str(data), "--tokens", "20", *models])
    told = capsys.readouterr().out
    assert f"absent: skipped, there is no folder {absent[0]}" in told
    assert f"empty: skipped, {absent[1]} has no tokenizer.json" in told
    assert "demo: 20 tokens of 1 story, 3 stacks computing in float32" in told
    assert told.count("| nf4 |") == 2


def test_without_text_every_model_is_skipped_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality.main(["--data", str(tmp_path)])
    assert capsys.readouterr().out == (
        f"demo: skipped, {tmp_path} has no tinystories-*.txt: name it with --data\n"
    )
