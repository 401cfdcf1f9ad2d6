"""`swarm doctor plan` on models of the papers' sizes, without a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, LlamaConfig

from swarm.errors import BadInput
from swarm.model import wanted_of
from swarm.planning import read_machines, rendered, report_of

SHAPES = {
    "70B": LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "176B": BloomConfig(hidden_size=14336, n_layer=70, n_head=112, vocab_size=250880),
}
PARAMETERS = {"70B": 70.55e9, "176B": 176.25e9}
TOKENS = 4096


def reported(shape: str, folder: Path, peers: str, quant: str = "none") -> dict[str, Any]:
    SHAPES[shape].save_pretrained(folder)
    file = folder / "peers.toml"
    file.write_text(peers)
    return report_of(wanted_of(str(folder), "bfloat16", quant, TOKENS), read_machines(file))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_weights_of_a_large_model_are_counted(shape: str, tmp_path: Path) -> None:
    report = reported(shape, tmp_path, '[[peer]]\nmemory = "24GB"')
    taken = report["weight_bytes"] + report["end_bytes"]
    assert taken / 2 == pytest.approx(PARAMETERS[shape], rel=0.01)


@pytest.mark.parametrize(("shape", "count"), [("70B", 10), ("176B", 27)])
def test_enough_consumer_cards_hold_a_large_model(shape: str, count: int, tmp_path: Path) -> None:
    peer = f'[[peer]]\nmemory = "24GB"\nreads = "900GB"\nrtt_ms = 20\ncount = {count}'
    report = reported(shape, tmp_path, peer)
    assert report["is_complete"]
    blocks = [range(*map(int, hop["span"].split(":"))) for hop in report["route"]]
    assert [n for span in blocks for n in span] == list(range(report["blocks"]))
    reading = report["weight_bytes"] / (900 * 2**30)
    assert reading < report["seconds_per_token"] < reading + 0.02 * (count + 1) / 2 + 0.2
    assert "A token takes" in _text(report)


def test_quantized_the_same_model_needs_a_quarter(tmp_path: Path) -> None:
    peer = '[[peer]]\nmemory = "64GB"'
    plain = reported("70B", tmp_path, peer)
    small = reported("70B", tmp_path, peer, "nf4")
    assert small["is_complete"]
    assert not plain["is_complete"]
    assert small["weight_bytes"] < 0.3 * plain["weight_bytes"]
    assert small["end_bytes"] == plain["end_bytes"]


def test_with_too_few_the_missing_blocks_are_named(tmp_path: Path) -> None:
    report = reported("70B", tmp_path, '[[peer]]\nmemory = "80GB"\n[[peer]]\nmemory = "1GB"')
    assert not report["is_complete"]
    assert report["missing_bytes"] > 70e9
    assert report["unused"] == ["peer-2"]
    assert f"blocks {report['missing'][0]}" in _text(report)
    json.dumps(report)


@pytest.mark.parametrize(
    "text",
    [
        "peer = 1",
        "[[peer]]",
        '[[peer]]\nmemory = "much"',
        '[[peer]]\nmemory = "1GB"\nspeed = 3',
        '[[peer]]\nmemory = "1GB"\ncount = 0',
        '[[peer]]\nmemory = "1GB"\nrtt_ms = -5.0',
        '[[peer]]\nmemory = "1GB"\nname = "a"\n[[peer]]\nmemory = "1GB"\nname = "a"',
        "[[peer",
    ],
)
def test_a_damaged_file_of_peers_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "peers.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"peers\.toml"):
        read_machines(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.toml"):
        read_machines(tmp_path / "none.toml")


def _text(report: dict[str, Any]) -> str:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200).print(rendered(report))
    return out.getvalue()
