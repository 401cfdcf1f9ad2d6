"""Rules of a model's generation config: greedy ids are those of transformers' `generate`."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from blocks.checkpoint import generation_of, model_card, open_checkpoint
from blocks.ends import CandidateWish, candidates
from blocks.generation import read_generation
from swarm.gateway.ask import ask_of, sampling_of
from swarm.gateway.requests import Request
from swarm.gateway.settings import GatewaySettings
from swarm.generate import GenerateSettings, Generation, generate
from swarm.model import describe
from swarm.model_card import ANY_LENGTH, ModelCard
from swarm.rules import Rules
from swarm.wire import Tensor

torch.set_num_threads(1)
PROMPT = [1, 5, 6, 7, 5, 6]
VOCABULARY = 24  # few, so that an untrained model repeats itself
MOST = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY))
    folder = tmp_path_factory.mktemp("ruled")
    model.save_pretrained(folder)
    ids = {f"w{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(ids, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def told(folder: Path, settings: object, *, in_config: bool = False) -> ModelCard:
    """The card of the model in `folder`, once it says this of generation."""
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    plain = {name: config[name] for name in config.keys() & LlamaConfig().to_dict().keys()}
    plain |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if in_config:
        assert isinstance(settings, dict)
        plain = {name: plain[name] for name in plain.keys() - {"eos_token_id", "bos_token_id"}}
        plain |= settings
    else:
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(plain))
    return ModelCard.read(json.dumps(model_card(open_checkpoint(folder))).encode())


class WholeModel:
    """A session that computes in this process, with what a last hop would answer."""

    pages = reused_tokens = 0
    length_scaling = ANY_LENGTH

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._asked: list[tuple[int, Any]] = []
        self.wishes: list[Any] = []

    def step(
        self, start: int, payload: Any, wanted: str, wish: Any = None, sequence_length: int = 0
    ) -> None:
        del self._ids[start:]
        self._ids += np.frombuffer(payload["ids"].data, "<i4").tolist()
        if wanted != "none":
            first = start if wanted == "all" else len(self._ids) - 1
            self._asked.append((first, wish))
            self.wishes.append(wish)

    async def next_output(self) -> Any:
        first, wish = self._asked.pop(0)
        with torch.inference_mode():
            logits = self._model(torch.tensor([self._ids])).logits[0, first:]
        found = candidates(
            logits, CandidateWish(wish.count, wish.penalised, wish.bias, wish.allowed)
        )
        names = {torch.int32: "int32", torch.float32: "float32"}
        payload = {
            name: Tensor(names[value.dtype], tuple(value.shape), value.numpy().tobytes())
            for name, value in found.items()
        }
        return SimpleNamespace(payload=payload, times=())


@cache
def weights(folder: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


def made(folder: Path, card: ModelCard, prompt: Sequence[int] = PROMPT, **more: Any) -> Generation:
    settings = GenerateSettings(
        most_tokens=MOST,
        end_ids=frozenset(card.end_of_sequence_ids),
        sampling=card.generation.settings(),
        rules=card.generation.rules,
    )

    async def run() -> Generation:
        return await generate(WholeModel(weights(folder)), prompt, settings, **more)  # type: ignore[arg-type]

    return trio.run(run)


def said_by_transformers(folder: Path, prompt: Sequence[int] = PROMPT) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=MOST)
    return out[0].tolist()[len(prompt) :]


RULES: list[dict[str, Any]] = [
    {"suppress_tokens": "all said"},
    {"begin_suppress_tokens": "all said"},
    {"bad_words_ids": "all said, one by one"},
    {"bad_words_ids": "pairs"},
    {"sequence_bias": "pairs"},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 2},
    {"min_new_tokens": 5, "eos_token_id": "all said"},
    {"min_length": len(PROMPT) + 3, "eos_token_id": "all said"},
    {"min_length": MOST, "min_new_tokens": 0, "eos_token_id": "all said"},
    {"forced_eos_token_id": 3, "eos_token_id": 3},
    {"forced_eos_token_id": [9, 3]},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": "all said"},
    {"eos_token_id": "all said", "bad_words_ids": "all said, one by one"},
]


def filled(rules: dict[str, Any], said: list[int]) -> dict[str, Any]:
    """Rules that touch what the model would say without them."""
    pairs = [list(pair) for pair in zip([PROMPT[-1], *said], said, strict=False)]
    values: dict[object, Any] = {
        "all said": sorted(set(said)),
        "all said, one by one": [[token] for token in sorted(set(said))],
    }
    biases = [[pair, -7.5] for pair in pairs] + [[[11], 0.25]]
    pairwise = {"bad_words_ids": pairs, "sequence_bias": biases}
    return {
        name: pairwise[name] if value == "pairs" else values.get(str(value), value)
        for name, value in rules.items()
    }


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_models_rules_give_the_ids_of_transformers(folder: Path, rules: dict[str, Any]) -> None:
    plain = told(folder, {})
    free = made(folder, plain).token_ids
    prompt = PROMPT
    if "encoder_no_repeat_ngram_size" in rules:  # the prompt must hold what would be said
        prompt = [*PROMPT, *free]
        free = made(folder, plain, prompt).token_ids
    card = told(folder, filled(rules, free), in_config="repetition_penalty" in rules)
    wanted = said_by_transformers(folder, prompt)
    assert made(folder, card, prompt).token_ids == wanted
    assert wanted != free or rules.get("min_new_tokens") == 0  # or the rule was not tried


@pytest.mark.parametrize(
    "rules", [{"forced_bos_token_id": 4}, {"forced_bos_token_id": 4, "begin_suppress_tokens": [4]}]
)
def test_a_forced_first_id_follows_a_prompt_of_one_id(folder: Path, rules: dict[str, Any]) -> None:
    card = told(folder, rules)
    for prompt in ([1], PROMPT):
        assert made(folder, card, prompt).token_ids == said_by_transformers(folder, prompt)


@pytest.mark.parametrize("size", [1, 2])
def test_a_draft_under_rules_changes_no_id(folder: Path, size: int) -> None:
    class Echo:
        def guess(self, ids: Sequence[int]) -> list[int]:
            return [*ids[-2:], 3]

    card = told(folder, {"no_repeat_ngram_size": size, "suppress_tokens": [3]})
    assert made(folder, card, draft=Echo()).token_ids == made(folder, card).token_ids


def test_however_many_ids_are_forbidden_others_are_left_to_choose_from(folder: Path) -> None:
    card = told(folder, {"suppress_tokens": list(range(1, VOCABULARY))})
    assert made(folder, card).token_ids == [0] * MOST


def test_what_a_grammar_demands_is_said_though_a_rule_forbids_it(folder: Path) -> None:
    class Only:
        def few(self) -> frozenset[int]:
            return frozenset({8})

        every = few

        def narrowed(self, found: Any) -> Any:
            return found

        def take(self, token: int) -> None:
            assert token == 8

    card = told(folder, {"suppress_tokens": [8]})
    assert made(folder, card, guide=Only()).token_ids == [8] * MOST


@pytest.mark.parametrize("text", ['{"eos_token_id": 3,}', "", "\ufeff{}", "\udcff"])
def test_a_generation_config_that_is_no_json_leaves_the_word_to_config_json(
    folder: Path, text: str
) -> None:
    told(folder, {"suppress_tokens": [4, 5], "eos_token_id": 9}, in_config=True)
    data = text.encode("utf-8", "surrogateescape")
    (folder / "generation_config.json").write_bytes(data)
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    card = model_card(checkpoint)
    assert card["end_of_sequence_ids"] == [model.generation_config.eos_token_id] == [9]
    assert card["generation"]["rules"] == {"suppress_tokens": [4, 5]}
    (note,) = generation_of(checkpoint).notes
    assert "generation_config.json is not JSON" in note


def test_without_a_generation_config_the_defaults_of_a_config_class_end_nothing(
    folder: Path, tmp_path: Path
) -> None:
    card = told(folder, {}, in_config=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id is None
    assert card.end_of_sequence_ids == ()
    text = {"eos_token_id": 7, "top_k": 3, "min_length": 4}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "top_k": 5}))
    nested = read_generation(tmp_path, VOCABULARY)
    theirs = GenerationConfig.from_pretrained(
        tmp_path, config_file_name="config.json", _from_model_config=True
    )
    assert nested.end_ids == [theirs.eos_token_id] == [7]
    assert nested.settings == {"top_k": theirs.top_k, "rules": {"min_length": theirs.min_length}}
    assert (theirs.top_k, theirs.min_length) == (5, 4)


UNUSABLE: list[tuple[str, Any]] = [
    ("eos_token_id", -1),
    ("eos_token_id", "2"),
    ("eos_token_id", {"a": 1}),
    ("bos_token_id", [1, 2]),
    ("top_k", -1),
    ("top_k", 2.5),
    ("top_p", 1.5),
    ("top_p", "0.9"),
    ("temperature", float("nan")),
    ("temperature", "0.7"),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")),
    ("do_sample", "yes"),
    ("min_p", 2),
    ("suppress_tokens", "none"),
    ("bad_words_ids", []),
    ("bad_words_ids", [3]),
    ("no_repeat_ngram_size", -2),
    ("min_new_tokens", -1),
    ("min_length", 1e3),
    ("forced_bos_token_id", 5000),
    ("sequence_bias", {"3": 1.0}),
    ("stop_strings", 7),
]


@pytest.mark.parametrize(("name", "value"), UNUSABLE, ids=str)
def test_an_unusable_value_counts_as_absent_and_is_noted(
    folder: Path, name: str, value: object
) -> None:
    without = told(folder, {"eos_token_id": 3} if name != "eos_token_id" else {})
    given: dict[str, object] = {"eos_token_id": 3, name: value}
    assert told(folder, given) == without
    (note,) = describe(folder).notes
    assert note.startswith("generation_config.json ")
    assert name in note


def test_of_a_list_of_ids_those_of_the_vocabulary_count(folder: Path) -> None:
    card = told(folder, {"eos_token_id": [2, 5000], "suppress_tokens": [-1, 3], "top_k": None})
    assert card.end_of_sequence_ids == (2,)
    assert card.generation.rules == Rules(suppress_tokens=(3,))
    (note,) = describe(folder).notes
    assert "eos_token_id" in note
    assert "suppress_tokens" in note
    assert "top_k" not in note


def test_top_p_0_keeps_the_likeliest_id_alone(folder: Path) -> None:
    card = told(folder, {"do_sample": True, "top_p": 0})
    assert made(folder, card).token_ids == said_by_transformers(folder)


def test_what_is_not_heeded_is_named_and_what_changes_nothing_is_not(folder: Path) -> None:
    told(folder, {"num_beams": 4, "typical_p": 0.9, "max_length": 20, "epsilon_cutoff": 0.0})
    (note,) = describe(folder).notes
    assert "num_beams, typical_p" in note
    assert "max_length" not in note
    assert "epsilon_cutoff" not in note
    told(folder, {"max_length": 20, "min_length": 0, "bad_words_ids": None, "use_cache": True})
    assert describe(folder).notes == ()


def test_min_p_and_stop_strings_of_a_model_reach_whoever_asks_it(folder: Path) -> None:
    card = told(folder, {"do_sample": True, "min_p": 0.2, "stop_strings": "w3", "top_k": 0})
    assert card.generation.stop_strings == ("w3",)
    assert card.generation.settings().min_p == 0.2
    assert sampling_of(Request(model="m"), card).min_p == 0.2
    request = Request(model="m", temperature=0.0)
    ask = ask_of(request, [PROMPT], 9, card, GatewaySettings(), own_stops=("u:",))
    assert ask.own_stops == ("u:", "w3")
    assert ask.choices[0].settings.rules == card.generation.rules


def test_a_card_without_rules_is_the_one_that_older_peers_made(folder: Path) -> None:
    told(folder, {"temperature": 0.6, "min_length": 0, "suppress_tokens": []})
    assert model_card(open_checkpoint(folder))["generation"] == {"temperature": 0.6}
    newer = {**model_card(open_checkpoint(folder)), "unknown": 1, "generation": {"newer": [2]}}
    assert ModelCard.read(json.dumps(newer).encode()).generation.rules == Rules()
