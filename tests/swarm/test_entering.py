"""What peers and earlier runs left is checked before a server uses it."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from gossiping import IDENTITIES, record

from blocks.proven import Verdict
from blocks.report import CHECKS, Check, Family
from swarm.entering import addresses_of, check_proven, entry_of, port_of
from swarm.errors import BadInput
from swarm.identity import first_free_identity, identity_from
from swarm.invite import PUBLIC_SECRET
from swarm.notebook import Notebook, SwarmNote
from swarm.settings import ServeSettings, parse_blocks, parse_bytes, parse_model, parse_name

PEER = IDENTITIES[0].peer
GOOD = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
SWARM = "ab" * 8


def test_addresses_that_no_token_can_name_are_left_out() -> None:
    bad = ("/ip4/127.0.0.1/tcp/1", "/p2p/nobody", f"/ip4/1.2.3.4/tcp/1/p2p/{IDENTITIES[1].peer}")
    assert addresses_of([record(IDENTITIES[0], addresses=(*bad, GOOD))]) == [GOOD]


def test_a_founder_goes_back_to_the_swarm_it_remembers() -> None:
    described = SimpleNamespace(fingerprint="ab" * 32)
    note = SwarmNote(secret=b"s" * 16, addresses=("/nonsense", GOOD))
    notes = Notebook(swarms={SWARM: note})
    entry = entry_of(ServeSettings(), None, notes, described)  # type: ignore[arg-type]
    assert entry.secret == b"s" * 16
    assert entry.invite is not None
    assert entry.invite.addresses == (GOOD,)
    public = entry_of(ServeSettings(is_public=True), None, notes, described)  # type: ignore[arg-type]
    assert (public.secret, public.invite) == (PUBLIC_SECRET, None)


def test_a_remembered_port_in_use_is_let_go_and_one_just_closed_is_not() -> None:
    settings = ServeSettings(listen="127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_of(settings, Notebook(port=port)) == 0
        with socket.create_connection(("127.0.0.1", port)):
            served, _ = taken.accept()
            served.close()  # this side closes first: its port waits for a minute
    assert port_of(settings, Notebook(port=port)) == port
    assert port_of(ServeSettings(port=1), Notebook(port=port)) == 1


def test_a_second_server_of_the_same_home_takes_another_identity(tmp_path: Path) -> None:
    folder = tmp_path
    one, other = first_free_identity(folder), first_free_identity(folder)
    assert one.peer != other.peer


def test_a_home_that_is_a_file_is_told_and_not_taken_for_identities_in_use(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    file.touch()
    for make in (lambda: first_free_identity(file), lambda: identity_from(file / "key")):
        with pytest.raises(BadInput, match="cannot be opened"):
            make()


@pytest.mark.parametrize("text", ["", "0", "0.1", "9" * 400, "x", "-1", "8 apples"])
def test_what_is_no_amount_of_memory_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput):
        parse_bytes(text)


def test_amounts_blocks_models_and_names_are_read() -> None:
    assert [parse_bytes(t) for t in ("8GB", "1.5k", "10 MiB", "7")] == [8 << 30, 1536, 10 << 20, 7]
    assert parse_blocks("auto") is None
    assert parse_blocks("12") == 12
    assert str(parse_blocks("8:16")) == "8:16"
    assert parse_model("a/b") == "a/b"
    assert parse_name("Zoë's box") == "Zoë's box"
    for wrong in ("8:8", "-1", "x"):
        with pytest.raises(BadInput):
            parse_blocks(wrong)
    for name in ("a\nb", "x" * 65):
        with pytest.raises(BadInput):
            parse_name(name)


def described(model_type: str) -> SimpleNamespace:
    config = SimpleNamespace(model_type=model_type, to_dict=lambda: {"model_type": model_type})
    return SimpleNamespace(checkpoint=SimpleNamespace(config=config))


class Notes:
    """A console that remembers what it said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def checked(model_type: str, **settings: bool) -> list[str]:
    console = Notes()
    trio.run(check_proven, described(model_type), ServeSettings(**settings), console)
    return console.said


def test_a_proven_model_type_is_served_without_a_word() -> None:
    assert checked("llama") == []


def test_a_model_type_that_fails_its_test_is_served_only_to_who_insists() -> None:
    with pytest.raises(BadInput, match="rwkv fails its test") as refused:
        checked("rwkv")
    assert "--unproven" in str(refused.value.next_step)
    assert "rwkv fails its test" in checked("rwkv", is_unproven=True)[0]


@pytest.mark.parametrize("holds", [True, False])
def test_a_model_type_in_no_list_is_tried_and_that_is_said(
    holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Verdict(holds, "it was tried")
    monkeypatch.setattr("swarm.entering.verdict_for", lambda _checkpoint, _folder: told)
    if holds:
        assert checked("unheard_of")[1:] == ["it was tried"]
        assert "unheard_of" in checked("unheard_of")[0]
        return
    with pytest.raises(BadInput, match="it was tried"):
        checked("unheard_of")


def test_a_verdict_that_was_kept_is_said_in_one_line_and_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = Family("new", tuple(Check(name, "holds", 0.0) for name in CHECKS))
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    monkeypatch.setattr("blocks.proven._listed_once", lambda: {"1.0": {}})
    monkeypatch.setattr("blocks.proven.examine_all", lambda _requests, **_named: [held])
    assert len(checked("new")) == 2
    monkeypatch.delattr("blocks.proven.examine_all")
    (told,) = checked("new")
    assert "is not among the releases that this version was tried with (1.0); model type" in told
