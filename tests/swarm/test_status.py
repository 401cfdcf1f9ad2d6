"""The peer map as data and as a table."""

import io

from gossiping import IDENTITIES, record
from rich.console import Console

from swarm.record import PeerRecord
from swarm.status import rendered, status_of

KEYS = {"model", "fingerprint", "blocks", "healthy", "coverage", "uncovered", "peers"}
PEER_KEYS = {
    "peer",
    "name",
    "span",
    "state",
    "tokens_per_second",
    "rtt_ms",
    "free_tokens",
    "quant",
    "dtype",
    "device",
    "version",
    "differs",
}


def text_of(records: list[PeerRecord]) -> str:
    terminal = Console(file=io.StringIO(), width=120)
    terminal.print(rendered(status_of(records, {})))
    return terminal.file.getvalue()  # type: ignore[attr-defined]


def test_the_map_has_the_contracts_keys_also_when_nobody_serves() -> None:
    full = status_of([record(IDENTITIES[0])], {})
    assert full.keys() == status_of([], {}).keys() == KEYS
    assert full["peers"][0].keys() == PEER_KEYS


def test_holes_are_named_and_shown() -> None:
    one = record(IDENTITIES[0], model_name="tiny")
    status = status_of([one], {one.peer: 0.0125})
    assert (status["healthy"], status["uncovered"]) == (False, ["4:8"])
    assert status["coverage"][4:] == [0.0] * 4
    assert status["peers"][0]["rtt_ms"] == 12.5
    assert "blocks 4:8 uncovered" in text_of([one])
    assert "xxxx" in text_of([one])


def test_the_own_round_trip_is_nothing_and_an_unmeasured_one_unknown() -> None:
    one, other = record(IDENTITIES[0]), record(IDENTITIES[1], span="4:8")
    peers = status_of([one, other], {}, own=one.peer)["peers"]
    assert [peer["rtt_ms"] for peer in peers] == [0.0, None]


def test_what_a_peer_calls_itself_is_no_markup() -> None:
    shown = text_of([record(IDENTITIES[0], name="[/bold] [red]me")])
    assert "[/bold] [red]me" in shown


def test_one_peer_that_announces_another_model_does_not_decide_the_map() -> None:
    liar = record(IDENTITIES[0], fingerprint="ab" * 31 + "ff", blocks=900, span="0:900")
    honest = [record(IDENTITIES[1]), record(IDENTITIES[2], span="4:8")]
    status = status_of([liar, *honest], {})
    assert (status["blocks"], status["healthy"]) == (8, True)
    assert len(status["peers"]) == 2


def test_a_server_whose_weights_most_others_contradict_is_shown() -> None:
    swarm = [record(IDENTITIES[n], span="0:2", digests=b"a" * 12) for n in range(2)]
    damaged = record(IDENTITIES[2], span="0:2", digests=b"a" * 6 + b"X" * 6)
    peers = status_of([*swarm, damaged], {})["peers"]
    assert {tuple(peer["differs"]) for peer in peers if peer["peer"] != damaged.peer} == {()}
    assert next(p["differs"] for p in peers if p["peer"] == damaged.peer) == ["1:2"]
    assert "damaged?" in text_of([*swarm, damaged])


def test_an_empty_swarm_is_told_in_words() -> None:
    assert "No server" in text_of([])
