"""scripts/train_demo.py with demo_text.py and demo_card.py: stories in, a demo model out."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # as python does for the script that it runs
demo_text = import_module("demo_text")
demo_card = import_module("demo_card")
train_demo = import_module("train_demo")
sys.path.remove(str(SCRIPTS))

SENTENCE = "The little dog ran to the park and was very happy. "
STORY = "Once there was a dog. " + SENTENCE * 4 + "They went home."


def story(number: int) -> str:
    """Return one of many stories that a model can learn and that no other equals."""
    names = ("Lily", "Tom", "Sue", "Ben", "Mia")
    return f"{names[number % 5]} had {number} red balls. " + SENTENCE * 5 + "The end."


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- stories


@pytest.mark.parametrize(
    ("odd", "usual"),
    [
        ("\u201cI\u2019m here,\u201d he said", '"I\'m here," he said'),
        ("\u00e2\u20ac\u0153Stop!\u00e2\u20ac she said", '"Stop!" she said'),
        ("the girl\u00e2\u20ac\u2122s mom", "the girl's mom"),
        ("mom \u00e2\u20ac\u201c or dad \u00e2\u20ac\u201d sat", "mom - or dad - sat"),
        ("caf\u00e9\u2026 one \u2013 two", "cafe... one - two"),
    ],
)
def test_curly_quotes_and_their_mojibake_become_ascii(odd: str, usual: str) -> None:
    assert demo_text.plain(odd) == usual


def test_stories_end_where_the_file_says_so() -> None:
    text = f"of a story cut off.\n<|endoftext|>\n{STORY}\n\nIt was fun.\n<|endoftext|>\n{STORY}\n"
    assert demo_text.split_stories(text) == [f"{STORY}\nIt was fun.", STORY]


def test_without_an_end_marker_a_newline_alone_ends_a_story_and_a_blank_line_does_not() -> None:
    text = f'{STORY}\n\nOne day it rained. \n"Oh no!"\n\nIt was wet.\n{story(1)}\n'
    assert demo_text.split_stories(text) == [
        f'{STORY}\nOne day it rained.\n"Oh no!"\nIt was wet.',
        story(1),
    ]


@pytest.mark.parametrize(
    "piece", ["Too short.", STORY[:-1], "and " + STORY, STORY.replace("dog", "d\u00f6g"), "", " "]
)
def test_pieces_and_stories_in_other_letters_are_left_out(piece: str) -> None:
    assert demo_text.split_stories(f"{piece}<|endoftext|>{STORY}") == [STORY]


def test_a_story_in_two_files_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "tinystories-a.txt").write_text(f"{STORY}\n<|endoftext|>\n{story(1)}")
    (tmp_path / "tinystories-b.txt").write_text(f"{story(2)}\n{STORY}\n")
    (tmp_path / "other.txt").write_text(story(3))
    assert demo_text.read_stories(tmp_path) == [STORY, story(1), story(2)]


def test_a_folder_without_stories_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data"):
        demo_text.read_stories(tmp_path)


def test_no_held_out_story_is_trained_on_and_none_is_lost() -> None:
    stories = [story(number) for number in range(100)]
    training, held = demo_text.hold_out(stories, seed=1)
    assert len(held) == 4
    assert sorted(training + held) == sorted(stories)
    assert demo_text.hold_out(stories, seed=1) == (training, held)
    assert demo_text.hold_out(stories, seed=2)[1] != held


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("he saw a big red ball", "a big red"),
        ("was a big re", "was a big"),  # whole words only
        ("ran home The sun", "ran home"),  # never from one source into the next
        ("nothing like it", ""),
        ("The sun was up", "The sun was up"),
    ],
)
def test_the_longest_copied_run_is_of_whole_words_within_one_source(text: str, run: str) -> None:
    sources = ["There was a big red\ndog. It ran home", "The sun was up"]
    assert demo_text.longest_copied_run(text, sources) == run


# --- tokens


def test_the_tokenizer_gives_back_any_text_and_begins_with_the_end_of_another() -> None:
    tokenizer = train_demo.train_tokenizer([story(number) for number in range(20)], vocabulary=300)
    for text in ("Once upon a time", "  two\n\nlines\t", "na\u00efve \u4f60\u597d \U0001f600"):
        ids = tokenizer.encode(text).ids
        assert ids[0] == train_demo.END
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == train_demo.END
    assert tokenizer.get_vocab_size() == 300


def test_windows_predict_every_token_but_the_first_once() -> None:
    cut = train_demo.windows([[0, 1, 2], [3, 4, 5, 6], [7, 8]], context=3)
    assert cut.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_fewer_tokens_than_a_window_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        train_demo.windows([[0, 1]], context=2)


def test_an_epoch_takes_each_window_once_and_the_next_strings_the_stories_up_anew() -> None:
    stories = [[0, 10 * n + 1, 10 * n + 2, 10 * n + 3] for n in range(8)]

    def epochs(seed: int) -> list[set[tuple[int, ...]]]:
        stream = train_demo.batches(stories, batch=1, context=6, seed=seed)
        cut = [tuple(window[0].tolist()) for window in itertools.islice(stream, 10)]
        return [set(cut[:5]), set(cut[5:])]

    first, second = epochs(0)
    inputs = [token for window in first for token in window[:-1] if token]
    assert len(inputs) == len(set(inputs)) == 22, "30 tokens, 8 of them beginnings"
    assert first != second, "other neighbours, so other windows"
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


# --- training


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rates = [train_demo.learning_rate(step / 100, 2.0, warm_up=0.1) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(2.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)
    assert train_demo.learning_rate(1.2, 2.0) == pytest.approx(0.0)


def test_dropout_acts_while_training_only() -> None:
    torch.manual_seed(0)
    model = train_demo.new_model(vocabulary=32, hidden=32)
    train_demo.add_dropout(model, 0.5)
    cut = torch.arange(18).reshape(2, 9)
    model.eval()
    assert train_demo.loss_of(model, cut) == train_demo.loss_of(model, cut)
    model.train()
    assert train_demo.loss_of(model, cut) != train_demo.loss_of(model, cut)
    assert train_demo.mean_loss(model, cut, 1) == train_demo.mean_loss(model, cut, 1)
    assert model.training, "a look at the held-out stories leaves the model as it was"


def trained(recipe: Any) -> tuple[torch.nn.Module, Any, int]:
    """Train a tiny model to count up; return it, the report, and how often it was kept."""
    torch.manual_seed(0)
    model = train_demo.new_model(vocabulary=32, hidden=32)
    stories = [[0, *range(first, first + 12)] for first in range(1, 20)]
    held = train_demo.windows([[0, *range(5, 17)]] * 3, context=8)
    data = train_demo.batches(stories, batch=4, context=8, seed=0)
    kept: list[int] = []
    report = train_demo.train(model, data, held, recipe, lambda: kept.append(1))
    return model, report, len(kept)


def test_training_learns_and_the_same_seed_and_steps_give_the_same_weights() -> None:
    recipe = train_demo.Recipe(steps=40, threads=1, peak=0.1, every=10)
    (one, report, kept), (two, _, _) = trained(recipe), trained(recipe)
    assert report.held_out_loss < 2.5, "it began at log(32) = 3.5"
    assert (report.steps, report.tokens) == (40, 40 * 4 * 8)
    assert kept > 2, "the falling held-out loss was worth keeping more than once"
    for left, right in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_best_look_is_remembered_not_the_last() -> None:
    report = train_demo.Report()
    looks = [(10, 3.0, 2.0), (20, 2.5, 1.5), (30, 2.0, 1.8)]
    best = []
    for report.steps, train_loss, held_out_loss in looks:
        best.append(report.noted(train_loss, held_out_loss))
    assert best == [True, True, False]
    assert (report.best_step, report.train_loss, report.held_out_loss) == (20, 2.5, 1.5)


def test_a_recipe_s_progress_follows_its_steps_else_the_clock() -> None:
    report = train_demo.Report(steps=30, seconds=15.0)
    recipe = train_demo.Recipe(steps=60, minutes=1.0)
    assert recipe.progress(report) == 0.5
    assert dataclasses.replace(recipe, steps=None).progress(report) == 0.25


# --- the folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real, if very short, run."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("demo")
    (data / "tinystories-a.txt").write_text(
        "<|endoftext|>".join(story(number) for number in range(200))
    )
    recipe = train_demo.Recipe(steps=2, threads=1, batch=1, context=32, every=1)
    train_demo.run(data, out, recipe, note="The machine was a test.")
    return out


def test_the_folder_has_two_shards_with_an_index_and_is_small(demo: Path) -> None:
    shards = {file.name for file in demo.glob("*.safetensors")}
    index = json.loads((demo / "model.safetensors.index.json").read_text())
    assert shards == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert set(index["weight_map"].values()) == shards
    assert sum(file.stat().st_size for file in demo.iterdir()) <= train_demo.MOST_BYTES


def test_transformers_reads_the_folder_as_it_is(demo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 8
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == train_demo.END
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == train_demo.END
    ids = tokenizer("The little dog").input_ids
    assert ids[0] == train_demo.END
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The little dog"


def test_the_card_says_how_the_weights_came_about(demo: Path) -> None:
    card = (demo / "README.md").read_text()
    for said in ("2 steps", "CDLA-Sharing-1.0", "Apache-2.0", "--steps 2 --seed 0", "a test."):
        assert said in card
    assert all(card.count(f"**{prompt}**") == 2 for prompt in demo_card.PROMPTS)
    assert card.count("Longest run copied") == 2
