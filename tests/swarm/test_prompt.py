"""`swarm generate` as a process: a private swarm, closed pipes, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "text",
    "tokens",
    "token_ids",
    "finish_reason",
    "seconds",
    "ttft_seconds",
    "tokens_per_second",
    "computed_seconds",
    "route",
    "failovers",
    "replayed_tokens",
    "reused_tokens",
    "draft",
}


def begun(home: Path, *words: str) -> "subprocess.Popen[bytes]":
    changes = {"SWARM_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *words],
        env={**os.environ, **changes},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_prompt_from_stdin_is_answered_by_a_private_swarm_as_one_object(tmp_path: Path) -> None:
    process = begun(tmp_path, "generate", "-", "--json", "-n", "5")
    out, err = process.communicate(b"Once upon a time", 60)
    answer = json.loads(out)
    assert process.returncode == 0
    assert answer.keys() == KEYS
    assert answer["tokens"] == len(answer["token_ids"]) == 5
    assert [hop["name"] for hop in answer["route"]] == ["private-1", "private-2", "private-3"]
    assert b"private" in err


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    process = begun(tmp_path, "generate", "Once upon a time", "-n", "200")
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("no pipes")
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert b"Traceback" not in said
    assert b"bug" not in said


def test_stdin_that_is_no_text_is_bad_input(tmp_path: Path) -> None:
    process = begun(tmp_path, "generate", "-")
    _, err = process.communicate(b"\xff\xfe\x00", 60)
    assert (process.returncode, b"UTF-8" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "when"),
    [
        ("serve --host 127.0.0.1", b"loading blocks"),  # a thread reads weights
        ("serve --host 127.0.0.1", b"measuring"),  # the compute thread computes
        ("generate Hello", b"private"),
    ],
)
def test_ctrl_c_before_the_model_serves_is_no_traceback(
    tmp_path: Path, words: str, when: bytes
) -> None:
    process = begun(tmp_path, *words.split())
    if process.stderr is None:
        raise RuntimeError("no pipe")
    assert any(when in line for line in process.stderr)  # reads as far as that
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err, err.decode()
