import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadInput, PeerFault
from swarm.model_card import GenerationDefaults, ModelCard
from swarm.text import StopScanner

CARD = {
    "format": 1,
    "name": "tiny",
    "model_type": "llama",
    "blocks": 4,
    "hidden_size": 64,
    "vocabulary_size": 512,
    "context_length": 512,
    "end_of_sequence_ids": [2],
    "begin_of_sequence_id": 1,
    "generation": {},
}


# stops


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab<|>", max_size=30),
    stops=st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_a_stop_is_found_and_never_shown_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(text[a:b]) for a, b in itertools.pairwise(places))
    shown += scanner.finish()
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if ends:
        expected = max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        assert scanner.matched == expected
        assert shown == text[: ends[0] - len(expected)]
    else:
        assert scanner.matched is None
        assert shown == text


def test_only_what_could_begin_a_stop_is_held_back() -> None:
    scanner = StopScanner(["</end>"])
    assert scanner.feed("a<b") == "a<b"
    assert scanner.feed("c</e") == "c"
    assert scanner.feed("x</end>more") == "</ex"
    assert scanner.matched == "</end>"
    assert scanner.feed("even more") == ""


def test_an_empty_stop_is_bad_input() -> None:
    with pytest.raises(BadInput):
        StopScanner(["a", ""])


# the card


def test_a_card_survives_its_bytes_and_unknown_fields() -> None:
    card = ModelCard.read(json.dumps({**CARD, "later": [1]}).encode())
    assert card.end_of_sequence_ids == (2,)
    assert ModelCard.read(card.written()) == card


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": 2},
        {"blocks": 0},
        {"vocabulary_size": "512"},
        {"end_of_sequence_ids": [-1]},
        {"name": "x" * 1000},
        {"generation": {"top_p": 7}},
        {"context_length": None},
    ],
    ids=str,
)
def test_an_impossible_card_is_the_peers_fault(wrong: dict[str, object]) -> None:
    with pytest.raises(PeerFault):
        ModelCard.read(json.dumps({**CARD, **wrong}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_card_that_is_no_json_object_is_the_peers_fault(data: bytes) -> None:
    with pytest.raises(PeerFault):
        ModelCard.read(data)


def test_a_models_defaults_sample_only_if_it_says_so() -> None:
    greedy = GenerationDefaults(temperature=0.6, repetition_penalty=1.1).settings()
    assert greedy.is_greedy
    assert greedy.repetition_penalty == 1.1
    sampled = GenerationDefaults(do_sample=True, top_p=0.9).settings(seed=3)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (1.0, 50, 0.9)
    assert sampled.seed == 3
