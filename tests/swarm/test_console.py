"""What was raised becomes one sentence and an exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from swarm.console import readable_errors
from swarm.errors import BadInput, NoRoute, Refusal, Unreachable


def code_of(error: BaseException, *, is_json: bool = False) -> object:
    with pytest.raises(SystemExit) as ended, readable_errors(is_json=is_json):
        raise error
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("no"), 2),
        (NoRoute("none", uncovered=("1:2",)), 3),
        (NoRoute("none"), 4),
        (Unreachable("gone"), 4),
        (NoRoute("none", is_full=True), 5),
        (Refusal("full"), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("oh"), 1),
        (ExceptionGroup("", [ExceptionGroup("", [Refusal("full")])]), 5),
        (ExceptionGroup("", [Refusal("full"), RuntimeError("oh")]), 1),
        (BaseExceptionGroup("", [Refusal("full"), KeyboardInterrupt()]), 130),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert code_of(error) == code


def test_an_error_is_one_sentence_with_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    code_of(BadInput("there is no x", next_step="make one"))
    assert capsys.readouterr() == ("", "swarm: there is no x: make one\n")


def test_a_bug_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code_of(RuntimeError("one thing:\n  another"))
    told = capsys.readouterr().err
    assert told.startswith("swarm: a bug in swarm, RuntimeError: one thing: another: ")
    assert told.count("\n") == 1


def test_with_json_an_error_is_an_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code_of(BadInput("there is no x", next_step="make one"), is_json=True)
    out, err = capsys.readouterr()
    told = {"kind": "bad_input", "message": "there is no x", "next": "make one"}
    assert json.loads(out) == {"error": told}
    assert err == ""


def command(
    *words: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cli", *words],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("words", [("generate",), ("bogus",), ("generate", "a", "-n", "0")])
def test_a_misspelt_command_is_one_sentence_and_bad_input(words: tuple[str, ...]) -> None:
    made = command(*words)
    assert made.returncode == 2
    assert made.stderr.startswith("swarm: ")
    assert made.stderr.count("\n") == 1
    assert "--help" in made.stderr


def test_a_misspelt_command_with_json_is_an_object_on_stdout() -> None:
    made = command("generate", "a", "--json", "--tokens", "many")
    assert made.returncode == 2
    assert json.loads(made.stdout)["error"]["kind"] == "bad_input"


@pytest.mark.parametrize(
    "words", [("--top-p", "2"), ("--temperature", "nan"), ("--stop", ""), ("--top-k", "-1")]
)
def test_an_impossible_choice_is_told_before_any_swarm_is_asked(words: tuple[str, ...]) -> None:
    made = command("generate", "a", *words)
    assert made.returncode == 2, made.stderr
    assert "private" not in made.stderr


def commands() -> dict[str, Any]:
    """All commands by their words."""
    import typer.main

    from swarm.commands.app import app

    found: dict[str, Any] = {}

    def collect(words: str, one: Any) -> None:
        for name, inner in getattr(one, "commands", {}).items():
            collect(f"{words} {name}".strip(), inner)
        if not hasattr(one, "commands"):
            found[words] = one

    collect("", typer.main.get_command(app))
    return found


def test_every_option_has_help_and_a_variable() -> None:
    assert {"serve", "bench chaos", "doctor plan"} < commands().keys()
    for words, command in commands().items():
        for option in command.params:
            assert option.help, (words, option.name)
            assert option.envvar or option.param_type_name == "argument", (words, option.name)


def test_no_word_of_a_help_is_taken_for_markup() -> None:
    from rich.markup import render

    for words, command in commands().items():
        for text in (command.help, *(option.help for option in command.params)):
            assert render(text).plain == text.replace("\\[", "["), words


def test_json_asked_for_by_variable_is_what_a_misspelt_command_gets_too() -> None:
    made = command("generate", "a", "--bogus", environment={"SWARM_JSON": "true"})
    assert json.loads(made.stdout)["error"]["kind"] == "bad_input"
    assert made.stderr == ""


def test_the_version_is_told_without_a_command() -> None:
    assert command("--version").returncode == 0
