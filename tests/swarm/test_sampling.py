import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from swarm.errors import BadInput, PeerFault
from swarm.messages import Wish
from swarm.sampling import (
    Candidates,
    SamplingSettings,
    candidates_from,
    choose,
    counts_of,
    wish_for,
)
from swarm.wire import Tensor

torch.set_num_threads(1)


def raw(values: NDArray[np.generic]) -> Tensor:
    return Tensor(str(values.dtype), values.shape, values.tobytes())


def last_hop(logits: NDArray[np.float32], wish: Wish) -> dict[str, Tensor]:
    """What a server answers for logits [S, V]: the contract, in the plainest form."""
    logits = logits.copy()
    for token, bias in wish.bias:
        logits[:, token] += np.float32(bias)
    asked = [*wish.penalised, *(token for token, _ in wish.bias)]
    named = logits[:, asked].astype(np.float32)
    allowed = range(logits.shape[1]) if wish.allowed is None else wish.allowed
    others = np.array(sorted(set(allowed) - set(wish.penalised)), np.int32)
    order = np.argsort(-logits[:, others], axis=1, kind="stable")
    count = wish.count or len(others)
    tokens = others[order[:, :count]]
    rest = np.take_along_axis(logits, others[order[:, count:]], 1).astype(np.float64)
    with np.errstate(divide="ignore"):
        left = np.log(np.exp(rest).sum(axis=1)).astype(np.float32)
    return {
        "tokens": raw(tokens),
        "logits": raw(np.take_along_axis(logits, tokens, 1)),
        "named": raw(named),
        "left": raw(left),
    }


def asked(
    logits: NDArray[np.float32], settings: SamplingSettings, counts: Mapping[int, int] = {}
) -> Candidates:
    wish = wish_for(settings, counts)
    return candidates_from(last_hop(logits[None], wish), wish)[0]


def draws(
    logits: NDArray[np.float32],
    settings: SamplingSettings,
    counts: Mapping[int, int] = {},
    *,
    times: int = 4000,
) -> NDArray[np.float64]:
    """Frequency [V] of each id over many positions."""
    candidates = asked(logits, settings, counts)
    chosen = [choose(candidates, settings, position, counts) for position in range(times)]
    return np.bincount(chosen, minlength=len(logits)) / times


def some_logits(size: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def test_greedy_is_the_first_maximum_of_torch() -> None:
    for seed in range(50):
        logits = np.round(some_logits(600, seed, spread=1.0)).astype(np.float32)  # many ties
        chosen = choose(asked(logits, SamplingSettings()), SamplingSettings(), 7, {})
        assert chosen == int(torch.argmax(torch.from_numpy(logits)))


def test_greedy_with_repetition_penalty_is_that_of_transformers() -> None:
    settings = SamplingSettings(repetition_penalty=1.3)
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    changed = 0
    for seed in range(100):
        logits = some_logits(300, seed) - np.float32(
            20 * (seed % 2)
        )  # negative ones are multiplied
        seen = [*np.argsort(-logits)[:5].tolist(), 3, 17]
        scores = penalty(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])
        counts = counts_of(seen, [])
        chosen = choose(asked(logits, settings, counts), settings, 0, counts)
        assert chosen == int(scores.argmax())
        changed += chosen != int(logits.argmax())
    assert changed > 10


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6), (0.8, 12, 0.7), (2.0, 3, 0.01)],
)
def test_samples_are_spread_as_transformers_would_spread_them(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = some_logits(40, seed=3, spread=1.5)
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=1)
    frequency = draws(logits, settings)
    assert not frequency[expected == 0].any()
    assert frequency[expected > 0.005].all()
    assert np.abs(frequency - expected).max() < 0.03


def test_ids_that_tie_with_the_last_of_top_k_stay() -> None:
    logits = np.array([2, 1, 1, 1, 0], np.float32)
    frequency = draws(logits, SamplingSettings(temperature=1.0, top_k=2), times=500)
    assert frequency[:4].all()
    assert frequency[4] == 0


def test_what_the_server_left_out_is_never_drawn_and_the_rest_is_renormalised() -> None:
    logits = np.zeros(1000, np.float32)
    logits[:256] = 1.0
    frequency = draws(logits, SamplingSettings(temperature=1.0))
    assert not frequency[256:].any()
    assert frequency.max() < 4 / 256


def test_top_k_beyond_the_usual_count_is_exact() -> None:
    assert wish_for(SamplingSettings(top_k=1000), ()).count == 1000
    assert wish_for(SamplingSettings(temperature=1.0), ()).count == 256
    assert wish_for(SamplingSettings(), ()).count == 32, "the highest, and 20 to tell of beside it"


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_not_at_all() -> None:
    settings = SamplingSettings(presence_penalty=0.5, frequency_penalty=0.4, temperature=1.0)
    logits = some_logits(12, seed=5, spread=0.5)
    counts = counts_of(prompt_ids=[0, 1, 1], generated_ids=[1, 2, 2, 2])
    assert counts == {0: 0, 1: 1, 2: 3}
    less = np.zeros(12)
    less[1], less[2] = 0.5 + 0.4, 0.5 + 3 * 0.4
    expected = np.exp(logits - less) / np.exp(logits - less).sum()
    assert np.abs(draws(logits, settings, counts) - expected).max() < 0.03


def test_presence_leaves_an_id_alone_that_only_the_prompt_has() -> None:
    settings = SamplingSettings(presence_penalty=0.5)
    logits = np.array([1.0, 0.9], np.float32)
    for counts, expected in (({0: 0}, 0), ({0: 1}, 1), ({1: 1}, 0)):
        assert choose(asked(logits, settings, counts), settings, 0, counts) == expected


def test_a_penalised_id_is_drawn_even_if_it_is_outside_the_largest() -> None:
    settings = SamplingSettings(repetition_penalty=0.01)  # a reward
    logits = np.linspace(2, 1, 600).astype(np.float32)
    counts = counts_of([599], [])
    assert choose(asked(logits, settings, counts), settings, 0, counts) == 599


def test_an_id_seen_only_in_a_later_draft_is_not_penalised() -> None:
    settings = SamplingSettings(repetition_penalty=5.0)
    logits = np.array([3, 2, 1], np.float32)
    wish = wish_for(settings, [0, 1])
    candidates = candidates_from(last_hop(logits[None], wish), wish)[0]
    assert choose(candidates, settings, 0, {1: 0}) == 0


def test_allowed_ids_bind_even_the_penalised_ones() -> None:
    settings = SamplingSettings(allowed=frozenset({4, 5}), repetition_penalty=1.1)
    logits = np.array([9, 8, 7, 6, 1, 2], np.float32)
    counts = counts_of([0, 5], [])
    assert choose(asked(logits, settings, counts), settings, 0, counts) == 5


def test_bias_lifts_an_id_from_outside_the_largest() -> None:
    settings = SamplingSettings(bias={900: 50.0})
    assert choose(asked(some_logits(1000), settings), settings, 0, {}) == 900


def test_a_temperature_close_to_zero_is_greedy() -> None:
    logits = some_logits(50)
    settings = SamplingSettings(temperature=1e-300)
    assert choose(asked(logits, settings), settings, 0, {}) == int(logits.argmax())


def test_the_same_seed_and_position_give_the_same_token_in_any_order() -> None:
    settings = SamplingSettings(temperature=1.0, seed=9)
    candidates = asked(some_logits(100, spread=0.5), settings)
    forward = [choose(candidates, settings, position, {}) for position in range(30)]
    backward = [choose(candidates, settings, position, {}) for position in reversed(range(30))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 10
    other = dataclasses.replace(settings, seed=10)
    assert [choose(candidates, other, position, {}) for position in range(30)] != forward


def test_draws_are_the_same_on_every_machine_and_release() -> None:
    settings = SamplingSettings(temperature=1.0, seed=-42)
    candidates = asked(np.zeros(100, np.float32), settings)
    drawn = [choose(candidates, settings, position, {}) for position in range(8)]
    assert drawn == [76, 64, 97, 80, 1, 68, 9, 67]


def test_log_probabilities_count_what_was_left_out() -> None:
    settings = SamplingSettings(repetition_penalty=1.2, bias={5: 1.0})
    logits = some_logits(2000)
    counts = counts_of([5, 8], [])
    biased = logits.astype(np.float64)
    biased[5] += 1.0
    expected = biased - np.log(np.exp(biased).sum())
    candidates = asked(logits, settings, counts)
    for token in (8, 5, int(logits.argmax())):
        assert candidates.log_probability(token) == pytest.approx(expected[token], abs=1e-4)
    assert candidates.log_probability(int(logits.argmin())) == -math.inf


def test_each_position_of_an_answer_has_its_own_candidates() -> None:
    logits = np.stack([some_logits(50, seed) for seed in range(4)])
    wish = wish_for(SamplingSettings(), ())
    rows = candidates_from(last_hop(logits, wish), wish)
    chosen = [choose(row, SamplingSettings(), 0, {}) for row in rows]
    assert chosen == logits.argmax(axis=1).tolist()


Spoil = Callable[[dict[str, Tensor]], None]


def put(name: str, values: NDArray[np.generic]) -> Spoil:
    return lambda payload: payload.update({name: raw(values)})


SPOILS: dict[str, Spoil] = {
    "missing": lambda payload: payload.pop("left") and None,
    "dtype": put("tokens", np.zeros((1, 3), np.int64)),
    "axes": put("logits", np.zeros(3, np.float32)),
    "width": put("logits", np.zeros((1, 2), np.float32)),
    "too many": put("named", np.zeros((1, 5), np.float32)),
    "positions": put("left", np.zeros(2, np.float32)),
    "NaN": put("logits", np.array([[1, np.nan, 0]], np.float32)),
    "infinite": put("named", np.array([[np.inf]], np.float32)),
    "negative id": put("tokens", np.array([[1, -2, 3]], np.int32)),
    "short": lambda payload: payload.update(left=Tensor("float32", (1,), b"12")),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_a_payload_that_is_no_answer_is_the_peers_fault(spoil: Spoil) -> None:
    wish = Wish(count=3, penalised=(0,))
    payload = last_hop(some_logits(10)[None], wish)
    assert candidates_from(payload, wish)
    spoil(payload)
    with pytest.raises(PeerFault):
        candidates_from(payload, wish)


def test_more_candidates_than_were_asked_for_are_the_peers_fault() -> None:
    payload = last_hop(some_logits(10)[None], Wish(count=4))
    with pytest.raises(PeerFault):
        candidates_from(payload, Wish(count=3))


def test_nothing_to_choose_is_the_peers_fault() -> None:
    nothing = np.full((1, 4), -np.inf, np.float32)
    rows = candidates_from(last_hop(nothing, Wish(count=2)), Wish(count=2))
    with pytest.raises(PeerFault):
        choose(rows[0], SamplingSettings(), 0, {})
    empty = candidates_from(last_hop(np.zeros((1, 0), np.float32), Wish()), Wish())
    with pytest.raises(PeerFault):
        choose(empty[0], SamplingSettings(), 0, {})


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"allowed": frozenset()},
        {"bias": {3: math.inf}},
        {"bias": {-1: 1.0}},
    ],
    ids=str,
)
def test_impossible_settings_are_bad_input(wrong: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


def test_the_thin_client_loads_neither_torch_nor_transformers_nor_libp2p() -> None:
    program = (
        "import sys, swarm.text, swarm.template, swarm.files, swarm.sampling\n"
        "print(sorted({'torch', 'transformers', 'libp2p'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
