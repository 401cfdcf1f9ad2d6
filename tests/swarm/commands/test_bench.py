"""`swarm bench` as its users type it: blocks by themselves, a real swarm, and wrong words."""

import io
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from preloaded import serving, swarm
from processes import SWARM, ServerProcess, environment

import cli
from swarm.bench.rows import PARTS
from swarm.settings import DEMO_FOLDER

SHORT = ("--tokens", "4", "--repetitions", "2")


def run(*words: str) -> tuple[int, str]:
    """The exit code and stdout of `swarm bench` with these words, in this process."""
    said = io.StringIO()
    with redirect_stdout(said):
        return cli.run(["bench", *words]), said.getvalue()


def test_the_speed_of_blocks_is_told_as_one_object() -> None:
    code, said = run("speed", "--prompt", "20", "--users", "1,3", "--json", *SHORT)
    report = json.loads(said)
    assert code == 0
    assert (report["span"], report["blocks"], report["quant"]) == ("0:8", 8, "none")
    assert report["params"] * 2 == report["weight_bytes"]  # bfloat16, as the demo is saved
    tests = [(row["test"], row["users"], row["tokens"]) for row in report["rows"]]
    assert tests == [("pp20", 1, 20), ("tg4", 1, 4), ("tg4", 3, 12)]
    assert all(len(row["samples_tokens_per_second"]) == 2 for row in report["rows"])
    assert [row.get("passes_per_step") for row in report["rows"]] == [None, 1.0, 1.0]


def test_the_speed_of_some_blocks_is_a_table_like_that_of_llama_bench() -> None:
    words = ("--blocks", "2:4", "--dtype", "float32", "--prompt", "9", *SHORT)
    code, said = run("speed", str(DEMO_FOLDER), *words)
    head, prefill, decode = said.splitlines()
    assert code == 0
    assert head.split() == [
        *("model", "blocks", "size", "params", "backend", "threads", "test", "t/s")
    ]
    assert prefill.split()[:2] == ["demo", "2:4"]
    assert prefill.split()[6:8] == ["cpu", "float32"]
    assert (prefill.split()[9], decode.split()[9]) == ("pp9", "tg4")
    assert all(line.split()[-2] == "±" for line in (prefill, decode))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed", "--users", "many"), "--users many"),
        (("speed", "--prompt", "600"), "600 tokens is beyond the model's context of 512"),
        (("speed", "--blocks", "4:99"), "4:99"),
        (("speed", "no-such-folder"), "no-such-folder"),
        (("users", "--prompts", "9-3"), "--prompts 9-3"),
        (("route", "--join", "nonsense"), "token"),
    ],
)
def test_what_cannot_be_measured_is_bad_input_in_one_sentence(
    words: tuple[str, ...], message: str
) -> None:
    code, said = run(*words, "--json")
    error = json.loads(said)["error"]
    assert (code, error["kind"]) == (2, "bad_input")
    assert message in error["message"]


def test_ctrl_c_ends_a_measurement_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*SWARM, "bench", "speed", "--repetitions", "100000"],
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    if process.stderr is None:
        raise RuntimeError("no pipe")
    with process, process.stderr as said:
        try:
            assert any("measuring" in line for line in said)  # reads as far as that
            process.send_signal(signal.SIGINT)
            rest = said.read()
            assert (process.wait(30), "Traceback" in rest) == (130, False)
        finally:
            process.kill()


def test_without_a_token_or_a_daemon_there_is_no_route_to_measure(tmp_path: Path) -> None:
    for command in ("route", "users"):
        made = swarm(tmp_path, "bench", command, "--json")
        assert made.returncode == 2
        assert "--join" in json.loads(made.stdout)["error"]["next"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[ServerProcess], Path]]:
    """A swarm of two processes with the demo, and the home of their daemons."""
    home = tmp_path_factory.mktemp("home")
    with serving(home, DEMO_FOLDER, ["0:3", "3:8"]) as servers:
        yield servers, home


def _report(home: Path, *words: str) -> dict[str, Any]:
    made = swarm(home, "bench", *words, "--json", "--repetitions", "2")
    assert made.returncode == 0, made.stdout + made.stderr
    report: dict[str, Any] = json.loads(made.stdout)
    return report


def test_a_route_through_the_swarm_of_the_own_daemon_is_measured_part_by_part(
    served: tuple[list[ServerProcess], Path],
) -> None:
    servers, home = served
    report = _report(home, "route", "--tokens", "12", "--prompt", "40")
    assert report["model"] == "demo"
    assert [hop["peer"] for hop in report["route"]] == [server.peer for server in servers]
    parts = report["per_token_ms"]
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["total"])
    assert 0 < parts["compute"] < parts["total"]
    assert 0 < parts["waiting"] < parts["total"]
    assert sum(hop["computed_ms"] for hop in report["route"]) == pytest.approx(parts["compute"])
    decode = report["rows"][1]
    assert decode["test"] == "tg12"
    assert report["failovers"] == 0


def test_users_of_a_swarm_that_a_token_names_are_measured_together(
    served: tuple[list[ServerProcess], Path], tmp_path: Path
) -> None:
    servers, _ = served
    asked = ("--join", servers[0].join, "--users", "1,3", "--prompts", "5-40", "--tokens", "8")
    report = _report(tmp_path, "users", *asked)
    assert [row["users"] for row in report["rows"]] == [1, 3]
    one, three = report["rows"]
    assert three["over_one_user"] == pytest.approx(
        three["tokens_per_second"] / one["tokens_per_second"]
    )
    assert three["tokens_per_second"] > three["user_median_tokens_per_second"]
    assert 0 < three["slowest_over_median"] <= 1
    assert 0 < three["gap_p50_ms"] <= three["gap_p95_ms"]


def test_the_tables_of_route_and_users_cut_no_figure_short(
    served: tuple[list[ServerProcess], Path],
) -> None:
    _, home = served
    for command, words in (("route", ("--prompt", "9")), ("users", ("--users", "2"))):
        made = swarm(home, "bench", command, *words, *SHORT)
        assert made.returncode == 0, made.stderr
        assert " ± " in made.stdout
        assert not [line for line in made.stdout.splitlines() if line.rstrip().endswith("…")]
