"""`swarm generate` over three hosts a tenth of a second apart: the scenario that ships."""

import json
import os
import sys
from pathlib import Path

import netlab
import pytest
from netlab_lab import why_not
from processes import swarm

pytestmark = [pytest.mark.root, pytest.mark.slow]

SCENARIO = Path(netlab.__file__).parent / "scenarios" / "generate.toml"
LEAST_SECONDS_PER_TOKEN = 0.150
"""One and a half round trips of 100 ms: to the first server, on to the second, back."""


def test_a_text_over_three_hosts_is_the_one_that_one_machine_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    alone = json.loads(swarm(tmp_path, "generate", "Once upon a time", "--json").stdout)

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert netlab.main(["--scenario", str(SCENARIO)]) == 0

    [said] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("client|")]
    made = json.loads(said.partition("|")[2])
    assert made["token_ids"] == alone["token_ids"]
    assert made["text"] == alone["text"]
    assert [hop["span"] for hop in made["route"]] == ["0:4", "4:8"]
    assert (made["failovers"], made["replayed_tokens"]) == (0, 0)
    decode_seconds = made["seconds"] - made["ttft_seconds"]
    assert decode_seconds / (made["tokens"] - 1) > LEAST_SECONDS_PER_TOKEN
