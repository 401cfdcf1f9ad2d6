"""The bench of a GPU runs without one, on small blocks, and says so where it cannot."""

import json
import sys

import gpu_bench
import pytest
import torch


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_bench", *words])
    gpu_bench.main()


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here; --device cpu --tiny shows"):
        run(monkeypatch)


SMALL = (
    *("--device", "cpu", "--tiny", "--blocks", "1", "--past", "9", "--steps", "2"),
    *("--rounds", "1", "--sessions", "1", "3", "--quants", "none"),
)


def test_small_blocks_on_a_cpu_are_measured_every_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *SMALL, "--json")
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["none"].keys() == {"1", "3"}
    for figures in made["none"].values():
        assert all(value > 0 for value in figures.values()), figures
    run(monkeypatch, *SMALL)
    assert "recorded/transformers" in capsys.readouterr().out
