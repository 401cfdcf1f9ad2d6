"""`swarm doctor families` tells every family, and writes its page and its list."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocks import proven
from blocks.matrix import Request
from blocks.report import CHECKS, SERVING, Check, Family
from swarm.commands import family_trials
from swarm.commands.doctor import doctor

VERSION = proven.metadata.version("transformers")


def _examined(model_type: str) -> Family:
    """A family that holds everything, but for bert, which runs only forward."""
    if model_type == "bert":
        return Family("bert", (Check("forward", "fails", 0.5, "differs by 5.0e-01"),))
    checks = [Check(name, "holds", 0.0) for name in CHECKS]
    if model_type == "mamba":
        checks[-1] = Check("rollback", "not offered", note="its states cannot go back")
    return Family(model_type, tuple(checks))


@pytest.fixture(autouse=True)
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float]]:
    """In place of the trials: what was asked for, and families as `_examined` has them."""
    asked: list[tuple[list[str], float]] = []

    def examine_all(
        requests: Sequence[Request], *, limit_seconds: float, on_done: Callable[[Family], None]
    ) -> list[Family]:
        asked.append(([request.model_type for request in requests], limit_seconds))
        found = [_examined(request.model_type) for request in requests]
        for family in found:
            on_done(family)
        return found

    monkeypatch.setattr(family_trials, "examine_all", examine_all)
    monkeypatch.setattr(family_trials, "model_types", lambda: ("bert", "llama", "mamba"))
    monkeypatch.setattr(proven, "listed", dict)
    return asked


def run(*words: str, folder: Path) -> tuple[int, str, str]:
    """The command's exit code, stdout and stderr, run in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(doctor, ["families", *words])
    finally:
        os.chdir(before)
    return result.exit_code, result.stdout, result.stderr


def test_json_is_one_object_per_family_with_what_the_contract_names(tmp_path: Path) -> None:
    code, out, _ = run("--json", folder=tmp_path)
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [one["model_type"] for one in told] == ["bert", "llama", "mamba"]
    assert [one["exact"] for one in told] == [False, True, True]
    assert [one["max_difference"] for one in told] == [0.5, 0.0, 0.0]
    assert [bool(one["reason"]) for one in told] == [True, False, False]


def test_only_the_named_families_are_tried_and_no_page_is_written(
    tmp_path: Path, trials: list[tuple[list[str], float]]
) -> None:
    (tmp_path / "docs").mkdir()
    code, out, _ = run("--only", "mamba", "--only", "llama", "--seconds", "5", folder=tmp_path)
    assert code == 0
    assert trials == [(["mamba", "llama"], 5.0)]
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["mamba", "exact"],
        ["llama", "exact"],
    ]
    assert not list((tmp_path / "docs").iterdir())


def test_a_whole_run_writes_the_page_where_there_is_a_folder_for_it(tmp_path: Path) -> None:
    run(folder=tmp_path)
    assert not (tmp_path / "docs").exists()
    (tmp_path / "docs").mkdir()
    run(folder=tmp_path)
    page = (tmp_path / "docs" / "families.md").read_text()
    assert f"transformers {VERSION}" in page
    good, bad = re.split("## Not proven", page)
    assert "| mamba | 0 | 0 | 0 | 0 | 0 | 0 | 0 | - | rollback: its states cannot go back |" in good
    assert "Of 3 model types, 2 are exact for serving, 2 of them in everything" in good
    assert "| bert |" not in good
    assert "| bert | - | forward: differs by 5.0e-01 |" in bad


def test_the_page_says_what_differs_with_each_other_release_that_is_listed(tmp_path: Path) -> None:
    good, bad = {"serving": True, "holds": [*CHECKS], "reason": ""}, {"serving": False}
    path = tmp_path / "proven.json"
    path.write_text(json.dumps({"4.0": {"bert": good, "llama": bad}, "4.1": {}}))
    run("--proven", str(path), "--table", "here.md", folder=tmp_path)
    page = (tmp_path / "here.md").read_text()
    assert re.findall("## With transformers (.*)", page) == ["4.0", "4.1"]
    section = page.partition("## With transformers 4.0")[2]
    assert "Of 2 model types, 1 are exact for serving." in section
    assert "Exact there and not above: bert." in section
    assert "Exact above and not there: llama." in section
    assert "Not known there: mamba." in section
    run("--table", "alone.md", folder=tmp_path)
    assert "## With transformers" not in (tmp_path / "alone.md").read_text()


def test_the_page_goes_where_it_is_told(tmp_path: Path) -> None:
    run("--only", "llama", "--table", "here.md", folder=tmp_path)
    assert "| llama |" in (tmp_path / "here.md").read_text()


def test_the_list_is_updated_and_keeps_what_was_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "proven.json"
    path.write_text(json.dumps({"4.0": {}, proven.minor(VERSION): {"gpt2": {"serving": True}}}))
    run("--only", "bert", "--only", "llama", "--proven", str(path), folder=tmp_path)
    known = json.loads(path.read_text())
    assert set(known) == {"4.0", proven.minor(VERSION)}
    assert set(known[proven.minor(VERSION)]) == {"bert", "gpt2", "llama"}
    assert proven.verdict_of(known, "llama", VERSION).holds == frozenset(CHECKS)
    assert not proven.verdict_of(known, "bert", VERSION).is_proven


def test_a_type_that_is_listed_as_proven_and_fails_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = {proven.minor(VERSION): {"bert": {"serving": True}, "llama": {"serving": True}}}
    monkeypatch.setattr(proven, "listed", lambda: listed)
    assert run("--only", "llama", folder=tmp_path)[0] == 0
    code, _, told = run("--only", "bert", folder=tmp_path)
    assert code == 1
    assert "bert is listed as proven and failed" in told


def test_a_type_that_transformers_does_not_know_is_bad_input(tmp_path: Path) -> None:
    code, out, told = run("--only", "lama", folder=tmp_path)
    assert (code, out) == (2, "")
    assert "lama" in told
    code, out, _ = run("--only", "lama", "--json", folder=tmp_path)
    assert code == 2
    assert json.loads(out)["error"]["kind"] == "bad_input"


def test_what_cannot_be_written_is_told_before_anything_is_tried(
    tmp_path: Path, trials: list[tuple[list[str], float]]
) -> None:
    (tmp_path / "damaged").write_text("{")
    (tmp_path / "other").write_text("[1]")
    for words in (
        ("--table", "nowhere/page.md"),
        ("--table", "."),
        ("--proven", "nowhere/list.json"),
        ("--proven", "damaged"),
        ("--proven", "other"),
    ):
        code, out, told = run("--only", "llama", *words, folder=tmp_path)
        assert (code, out, told.count("\n")) == (2, "", 1), told
        assert words[1] in told
    assert not trials


def test_the_cause_of_a_failure_is_told_only_where_it_failed() -> None:
    gone = Family("recurrent_gemma", (Check("interleaved", "fails", 1.0, "differs"),))
    assert "sessions mix" in family_trials.reason_of(gone)
    held = Family("recurrent_gemma", tuple(Check(name, "holds", 0.0) for name in SERVING))
    assert "sessions mix" not in family_trials.reason_of(held)


def test_the_command_imports_no_torch_before_it_is_called() -> None:
    code = "import swarm.commands.doctor, sys; print(*sorted(sys.modules))"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {name.split(".")[0] for name in made.stdout.split()} & {"torch", "transformers"}


def test_a_real_family_is_told_by_the_real_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    code, out, told = run("--only", "llama", "--json", folder=tmp_path)
    assert code == 0, told
    assert json.loads(out)["exact"]
