"""Families are cut, compared and told apart; what is proven is known, what is not is tried."""

import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_fakes
import pytest
import torch
from tiny_models import TinyModel
from transformers import AutoConfig, AutoModelForCausalLM

from blocks import families, proven, reference
from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.hf.release import model_types
from blocks.matrix import Request, examine_all, examine_here
from blocks.proven import Verdict, verdict_of
from blocks.report import CHECKS, EXACT, ROUNDING, SERVING, Check, Family, Takes, counts, outcome_of
from blocks.shrink import BLOCKS, ORIGINAL, kept_layers, shrunk, tiny_config
from blocks.stack import Stack

# One of each kind: positions, norms, caches, experts, routing, wrapping.
REPRESENTATIVE = (
    "llama",  # rotary, grouped heads
    "mistral",  # a sliding window everywhere
    "qwen3",  # normed heads
    "qwen3_moe",
    "mixtral",  # experts that are fused as they are loaded
    "gemma2",  # softcaps, sliding and full in turn
    "gemma3",  # a composite: its text part
    "gemma3n_text",  # an input of its own for every layer
    "gpt2",  # learned positions, Conv1D
    "gpt_neox",  # parallel residuals
    "bloom",  # alibi, layers return tuples
    "falcon",  # one key-value head
    "opt",  # learned positions with an offset
    "phi3",  # fused projections
    "cohere2",  # scaled logits
    "granite",  # multipliers at both ends
    "deepseek_v3",  # latent attention, grouped routing
    "gpt_oss",  # sinks
    "llama4_text",  # chunked attention
    "qwen3_next",  # recurrent layers among full ones
    "blenderbot",  # a loop that takes tuples and bare tensors
    "modernbert-decoder",  # an embedding that is told of ids that are not there
    "mamba",  # transformers forgets its state when several positions follow a past
    "electra",  # an encoder as a decoder, narrower before its layers
    "rembert",  # one that makes masks in the dtype of what was embedded
    "roberta",  # one whose own positions begin elsewhere than those of `generate`
    "roformer",  # one whose layers are handed a table of positions
)

LISTED = {
    "5.23": {
        "llama": {"serving": True, "holds": [*CHECKS], "reason": ""},
        "rwkv": {"serving": False, "holds": ["forward"], "reason": "decode: differs by 1.0e+00"},
    }
}


def trial(model_type: str) -> Family:
    """The trial of a family, in this process."""
    told: list[Check | Takes] = []
    examine_here(Request(model_type), told.append)
    takes = next((one.text for one in told if isinstance(one, Takes)), "")
    checks = tuple(one for one in told if isinstance(one, Check))
    return Family(model_type, checks, takes=takes)


# Making configs tiny


def test_a_scaling_by_length_changes_within_the_texts_of_the_trial() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = shrunk(AutoConfig.for_model("llama", rope_parameters=dynamic))
    assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (ORIGINAL, 4.0)
    for name in ("phi3", "phimoe", "minicpm3"):
        told = tiny_config(name).rope_parameters
        assert told["rope_type"] == "longrope"
        assert told["original_max_position_embeddings"] == ORIGINAL
        assert told["short_factor"] != told["long_factor"]


def test_every_kind_of_layer_is_kept() -> None:
    kinds = ["full"] * 20 + ["sliding"] * 10 + ["linear"]
    assert kept_layers(kinds, 6) == (0, 1, 2, 3, 20, 30)
    assert kept_layers(["a", "b"], 6) == (0, 1, 0, 1, 0, 1)


def test_a_tiny_config_keeps_its_switches_and_relations() -> None:
    real = AutoConfig.for_model(
        "qwen3",
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        num_hidden_layers=40,
        tie_word_embeddings=True,
        attention_bias=True,
        layer_types=["full_attention"] * 30 + ["sliding_attention"] * 10,
        use_sliding_window=True,
        sliding_window=4096,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    )
    tiny = shrunk(real)
    assert type(tiny) is type(real)
    assert tiny.tie_word_embeddings
    assert tiny.attention_bias
    assert tiny.rope_parameters["rope_type"] == "yarn"
    assert 1 < tiny.num_key_value_heads < tiny.num_attention_heads
    assert tiny.head_dim > tiny.hidden_size // tiny.num_attention_heads
    assert set(tiny.layer_types) == {"full_attention", "sliding_attention"}
    assert tiny.num_hidden_layers == len(tiny.layer_types) == BLOCKS
    assert tiny.sliding_window < 9
    assert real.num_hidden_layers == 40


def test_one_key_value_head_stays_one_and_as_many_as_heads_stay_as_many() -> None:
    for given, wanted in ((1, 1), (16, 4), (4, 2)):
        real = AutoConfig.for_model("llama", num_attention_heads=16, num_key_value_heads=given)
        assert shrunk(real).num_key_value_heads == wanted


def test_layers_are_picked_with_what_single_layers_have_of_their_own() -> None:
    tiny = tiny_config("gemma4_text")
    wide = [tiny.per_layer_config[number].head_dim for number in range(BLOCKS)]
    is_full = [kind == "full_attention" for kind in tiny.layer_types]
    assert sorted(set(is_full)) == [False, True]
    assert [width == max(wide) for width in wide] == is_full


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4_unified_text"])
def test_a_family_that_can_share_keys_shares_those_of_each_kind_of_layer(family: str) -> None:
    tiny = tiny_config(family)
    reusing = [
        kind
        for kind, mode in zip(tiny.layer_types, tiny.kv_sharing_modes, strict=True)
        if mode == "reuse"
    ]
    assert sorted(reusing) == ["full_attention", "sliding_attention"]
    alone = AutoConfig.for_model(family, num_kv_shared_layers=0)
    assert shrunk(alone).num_kv_shared_layers == 0


def test_the_parts_of_a_composite_are_made_tiny_and_are_not_taken_for_each_other() -> None:
    tiny = tiny_config("gemma3")
    assert tiny.text_config.num_hidden_layers == BLOCKS
    assert tiny.vision_config.num_hidden_layers not in (BLOCKS, 27)


# A trial must be able to fail


def test_a_family_that_keeps_a_session_in_the_model_mixes_two_sessions() -> None:
    found = trial("recurrent_gemma")
    assert found.holds("decode")
    (mixed,) = [check for check in found.checks if check.name == "interleaved"]
    assert mixed.outcome == "fails"
    assert mixed.difference is not None
    assert mixed.difference > 0.1
    assert not found.is_serving


def _spoiled(change: Callable[[Stack], None]) -> Callable[..., Stack]:
    def load(checkpoint: Checkpoint, start: int, stop: int, *, is_trial: bool) -> Stack:
        stack = load_stack(checkpoint, start, stop, is_trial=is_trial)
        if 0 < start < stop < checkpoint.blocks:
            change(stack)
        return stack

    load_stack = families.load_stack
    return load


def _nudge_a_norm(stack: Stack) -> None:
    norm = stack._carved.parts.layers[stack.start].input_layernorm
    norm.weight.add_(1e-4)


def _forget_chunks(stack: Stack) -> None:
    """Steps of several positions after a past are computed as if there was none."""
    run = stack.run

    def forgetful(inputs: torch.Tensor, *, cache: Any = None, start: int = 0, **named: Any) -> Any:
        if cache is not None and start and inputs.shape[1] > 1:
            cache.rollback(0)
            output = run(inputs, cache=cache, start=0, **named)
            cache.advance(start)
            return output
        return run(inputs, cache=cache, start=start, **named)

    stack.run = forgetful  # type: ignore[method-assign]


def _halve_gradients(stack: Stack) -> None:
    backward = stack.backward
    stack.backward = (  # type: ignore[method-assign]
        lambda *args, **named: backward(*args, **named) / 2
    )


def _swap_rows(stack: Stack) -> None:
    run_joined = stack.run_joined
    stack.run_joined = (  # type: ignore[method-assign]
        lambda *args, **named: run_joined(*args, **named)[::-1]
    )


def _drop_masks(stack: Stack) -> None:
    run = stack.run
    stack.run = (  # type: ignore[method-assign]
        lambda *args, **named: run(*args, **{**named, "mask": None})
    )


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (_nudge_a_norm, {"forward"}),
        (_forget_chunks, {"chunked", "rollback"}),
        (_halve_gradients, {"gradient"}),
        (_swap_rows, {"joined"}),
        (_drop_masks, {"batch"}),
    ],
)
def test_what_is_wrong_fails_the_check_that_is_about_it(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Stack], None], failing: set[str]
) -> None:
    monkeypatch.setattr(families, "load_stack", _spoiled(change))
    found = trial("llama")
    assert {check.name for check in found.checks if check.outcome == "fails"} == failing
    assert not found.is_exact
    assert "differs" in found.reason


def test_a_check_whose_reference_says_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_NOISE", 1e30)  # overflows
    assert "blind" in trial("llama").reason


@pytest.mark.parametrize("theirs", [[1.0, float("nan")], [1.0, float("inf")], [2.0, 2.0]])
def test_a_reference_that_is_constant_or_not_finite_is_none(theirs: list[float]) -> None:
    with pytest.raises(families._BlindError):
        families._difference(torch.tensor([1.0, 2.0]), torch.tensor(theirs))


def test_a_chunked_prefill_that_transformers_itself_gets_wrong_is_not_exact() -> None:
    found = trial("recurrent_gemma")
    assert found.holds("decode")
    assert not found.holds("chunked")
    assert "its own single forward" in found.reason


# Reports


def test_exact_is_below_five_in_ten_million_and_rounding_is_for_sums_in_another_order() -> None:
    assert outcome_of("decode", 4.9e-7) == "holds"
    assert outcome_of("decode", EXACT) == "fails"
    assert outcome_of("joined", EXACT) == "holds"
    assert outcome_of("gradient", ROUNDING) == "fails"
    assert outcome_of("forward", float("nan")) == "fails"


def _family(**outcomes: str) -> Family:
    checks = {name: Check(name, "holds", 0.0) for name in CHECKS}
    for name, outcome in outcomes.items():
        checks[name] = replace(checks[name], outcome=outcome, note="why")  # type: ignore[arg-type]
    return Family("llama", tuple(checks.values()))


def test_what_is_not_offered_does_not_count_against_a_family_and_what_is_not_judged_does() -> None:
    assert _family(rollback="not offered").is_exact
    assert not _family(rollback="fails").is_exact
    assert _family(rollback="fails").is_serving
    assert not _family(interleaved="fails").is_serving
    unfinished = Family("llama", _family().checks[:-1], "was not done after 60 s")
    assert (unfinished.is_serving, unfinished.is_exact) == (True, False)
    assert counts([_family(), _family(batch="fails")])["exact"] == 1


def test_checks_that_fail_alike_are_named_together() -> None:
    assert _family(batch="fails", joined="fails").reason == "batch, joined: why"


# Processes


def test_a_crash_a_hang_and_an_error_are_reasons_and_the_others_go_on() -> None:
    types = ["good", "dies", "hangs", "raises", "leaves", "good"]
    heard: list[str] = []
    found = examine_all(
        [Request(name) for name in types],
        limit_seconds=2,
        on_done=lambda family: heard.append(family.model_type),
        examine=family_fakes.behave,
    )
    assert [family.model_type for family in found] == types
    assert sorted(heard) == sorted(types)
    troubles = {family.model_type: family.trouble for family in found}
    assert troubles["good"] == ""
    assert f"-{int(signal.SIGKILL)}" in troubles["dies"]
    assert "not done after 2 s" in troubles["hangs"]
    assert troubles["raises"] == "RuntimeError: it cannot be done"
    assert "3" in troubles["leaves"]
    assert all(family.holds("forward") for family in found)  # what was told before counts
    assert [family.is_serving for family in found] == [name == "good" for name in types]


def test_no_process_is_left_when_the_caller_is_interrupted() -> None:
    def interrupt(family: Family) -> None:
        raise KeyboardInterrupt

    import multiprocessing

    with pytest.raises(KeyboardInterrupt):
        examine_all(
            [Request("good"), Request("hangs"), Request("hangs")],
            limit_seconds=60,
            on_done=interrupt,
            examine=family_fakes.behave,
        )
    assert not multiprocessing.active_children()


# What is proven


def test_the_list_knows_good_and_bad_types_and_says_what_it_does_not_know() -> None:
    good = verdict_of(LISTED, "llama", "5.23.4")
    assert (good.is_proven, good.is_tested, good.holds) == (True, True, frozenset(CHECKS))
    bad = verdict_of(LISTED, "rwkv", "5.23.0")
    assert (bad.is_proven, bad.is_tested) == (False, True)
    assert "decode: differs" in bad.sentence
    for model_type, version in (("new", "5.23.0"), ("llama", "5.24.0")):
        unknown = verdict_of(LISTED, model_type, version)
        assert (unknown.is_proven, unknown.is_tested) == (False, False)
        assert "untested" in unknown.sentence


def test_facts_of_a_new_minor_version_stand_beside_those_of_older_ones() -> None:
    merged = proven.with_families(LISTED, "5.24.0", [_family(batch="fails")])
    assert merged["5.23"] == LISTED["5.23"]
    assert verdict_of(merged, "llama", "5.24.1").is_proven
    assert "batch" not in verdict_of(merged, "llama", "5.24.1").holds
    again = proven.with_families(merged, "5.23.0", [_family(decode="fails")])
    assert not verdict_of(again, "llama", "5.23.0").is_proven
    assert not verdict_of(again, "rwkv", "5.23.0").is_proven
    assert LISTED["5.23"]["llama"]["serving"]


def test_a_type_that_is_not_listed_is_tried_with_its_own_config(
    monkeypatch: pytest.MonkeyPatch, llama: TinyModel
) -> None:
    monkeypatch.setattr(proven, "_listed_once", lambda: {"1.0": {}})
    verdict = proven.verdict_for(llama.checkpoint)
    assert verdict.is_proven
    assert verdict.is_tested
    assert frozenset(SERVING) <= verdict.holds
    assert "untested" in verdict.sentence


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """What trials come to from now on, each in turn; in no list is anything known."""
    coming: list[Family] = []

    def examine(requests: Any, **_named: Any) -> list[Family]:
        return [coming.pop(0)]

    monkeypatch.setattr(proven, "examine_all", examine)
    monkeypatch.setattr(proven, "_listed_once", lambda: {"1.0": {}})
    return coming


def test_what_is_in_no_list_is_tried_once_per_machine_config_release_and_code(
    llama: TinyModel, trials: list[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(checkpoint: Checkpoint = llama.checkpoint) -> Verdict:
        return proven.verdict_for(checkpoint, tmp_path)

    trials[:] = [_family(batch="fails")]
    assert proven.kept_verdict(llama.checkpoint, tmp_path) is None
    first = verdict()
    again = verdict()
    assert (again.is_proven, again.is_tested, again.holds) == (True, True, first.holds)
    assert "is not among the releases" in again.sentence
    assert "tried before on this machine" in again.sentence
    elsewhere = replace(llama.checkpoint, folder=tmp_path)
    elsewhere.config._name_or_path = "elsewhere"
    assert verdict(elsewhere) == again

    trials[:] = [_family(decode="fails")] * 3
    other = copy.deepcopy(llama.checkpoint.config)
    other.rms_norm_eps *= 2
    assert not verdict(replace(llama.checkpoint, config=other)).is_proven
    assert verdict().is_proven
    monkeypatch.setattr(proven, "_code", lambda: "other code")
    assert not verdict().is_proven
    monkeypatch.setattr(proven.metadata, "version", lambda _name: "9.9")
    assert not verdict().is_proven
    assert not trials


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"serving": true, "holds": [], "reason": ""}',
        b'{"serving": false, "holds": [[]], "reason": ""}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_verdict_is_none_and_is_made_anew(
    llama: TinyModel, trials: list[Family], tmp_path: Path, damaged: bytes
) -> None:
    trials[:] = [_family(), _family(decode="fails")]
    proven.verdict_for(llama.checkpoint, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged)
    assert not proven.verdict_for(llama.checkpoint, tmp_path).is_proven
    assert not proven.verdict_for(llama.checkpoint, tmp_path).is_proven
    assert not trials


def test_a_trial_that_did_not_end_or_cannot_be_kept_is_made_again(
    llama: TinyModel, trials: list[Family], tmp_path: Path
) -> None:
    trials[:] = [Family("llama", (), "was not done after 60 s"), _family(), _family()]
    assert not proven.verdict_for(llama.checkpoint, tmp_path).is_proven
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.touch()
    for _ in range(2):
        assert proven.verdict_for(llama.checkpoint, file).is_proven
    assert not trials


def test_a_type_that_fails_its_own_trial_is_not_proven(tmp_path: Path) -> None:
    config = tiny_config("recurrent_gemma")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    verdict = proven.check_type(open_checkpoint(tmp_path))
    assert not verdict.is_proven
    assert "interleaved" in verdict.sentence


def test_a_listed_type_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, llama: TinyModel
) -> None:
    def never(checkpoint: Checkpoint) -> Verdict:
        raise AssertionError

    monkeypatch.setattr(proven, "check_type", never)
    known = {proven.minor(proven.metadata.version("transformers")): LISTED["5.23"]}
    monkeypatch.setattr(proven, "_listed_once", lambda: known)
    assert proven.verdict_for(llama.checkpoint).is_proven


def test_the_package_has_a_hundred_types_that_are_exact_for_serving() -> None:
    for types in proven.listed().values():
        assert sum(facts["serving"] for facts in types.values()) >= 100
        assert all(facts["serving"] or facts["reason"] for facts in types.values())


def test_the_page_of_families_is_of_the_same_run_as_the_list() -> None:
    page = (Path(proven.__file__).parents[1] / "docs" / "families.md").read_text()
    good, _, bad = page.partition("## Not proven")
    types = list(proven.listed().values())[-1]
    for name, facts in types.items():
        assert (f"\n| {name} |" in good) == facts["serving"], name
        assert (f"\n| {name} |" in bad) != facts["serving"], name


# The families themselves


@pytest.fixture(scope="module")
def representatives() -> dict[str, Family]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = examine_all([Request(name) for name in REPRESENTATIVE], limit_seconds=180)
    return {family.model_type: family for family in found}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_representative_family_is_exact_when_cut(
    representatives: dict[str, Family], name: str
) -> None:
    found = representatives[name]
    assert found.is_exact, json.dumps(found.as_json())


@pytest.mark.slow
def test_every_family_that_is_listed_as_proven_still_is() -> None:
    found = examine_all([Request(name) for name in model_types()], limit_seconds=180)
    version = proven.metadata.version("transformers")
    lost = [
        f"{family.model_type}: {family.reason}"
        for family in found
        if proven.proven(family.model_type, version).is_proven and not family.is_serving
    ]
    assert not lost
    assert counts(found)["serving"] >= 100
    assert all(family.is_exact or family.reason for family in found)


@pytest.mark.parametrize("name", ["phi3", "minicpm3"])
def test_the_trial_of_a_scaling_by_length_fails_where_passes_are_not_told_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {"decode", "chunked", "joined"} & {
        c.name for c in trial(name).checks if c.outcome == "fails"
    }
    monkeypatch.setattr(Stack, "regime", lambda *_: 0)
    outcomes = {check.name: check.outcome for check in trial(name).checks}
    assert (outcomes["chunked"], outcomes["joined"]) == ("fails", "fails")
