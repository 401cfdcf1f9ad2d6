"""Of a hub model only what a span needs is fetched, once, after saying so, or refused in words."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import torch
import trio
from hub_double import COMMIT, NAME, Hub, Told, built, open_hub
from huggingface_hub import constants

import swarm.hub
import swarm.loading
from blocks.needed import needed_shards
from blocks.thread import ComputeThread
from routing.span import Span
from swarm.console import Console
from swarm.entering import describe_asked
from swarm.errors import BadInput
from swarm.hub import Fetching, commit_in, find_model, in_words, refuse_too_much
from swarm.loading import Loader
from swarm.model import Description, describe, fetch, load
from swarm.settings import DEMO_FOLDER, ServeSettings
from tests.blocks import tiny_models

HEAD_BYTES = 2048  # these shards are smaller than what a head is guessed to take
CHUNK_BYTES = 1024


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A llama and a mixtral in many shards, with a tokenizer."""
    return {name: built(name, tmp_path_factory.mktemp(name)) for name in ("llama", "mixtral")}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a copy of the llama that a test may damage; the library waits for nothing."""
    monkeypatch.setattr(swarm.hub, "HEAD_GUESS_BYTES", HEAD_BYTES)
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0)
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", impatient)
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "on-the-hub"))
    with open_hub(folder, monkeypatch, tmp_path / "home") as hub:
        yield hub


def described() -> Description:
    model = find_model(NAME)
    return describe(model.folder, model)


def bring(hub: Hub, description: Description, span: str, disk_bytes: int | None = None) -> Told:
    """Fetch a span's shards, counted from nothing."""
    hub.forget()
    told = Told(hub)
    fetch(
        description,
        Span.parse(span),
        disk_bytes=disk_bytes,
        note=told.note,
        progress=told.progress,
    )
    return told


def needed(hub: Hub, description: Description, span: str) -> dict[str, int]:
    """The shards of a span and their bytes."""
    held = Span.parse(span)
    shards = needed_shards(description.checkpoint, held.start, held.stop)
    return {shard: hub.sizes()[shard] for shard in shards}


@pytest.mark.parametrize("span", ["0:2", "2:5", "5:6"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_of_the_shards_only_those_of_the_span_are_fetched_and_they_compute_the_same(
    hub: Hub, folders: dict[str, Path], family: str, span: str
) -> None:
    hub.folder = folders[family]
    description = described()
    bring(hub, description, span)
    wanted = needed(hub, description, span)
    assert 0 < len(wanted) < len(hub.sizes()) / 1.5
    assert hub.sent == wanted
    held = Span.parse(span)
    ours = load(description, held, "float32", "cpu")
    theirs = load(describe(hub.folder), held, "float32", "cpu")
    values = torch.randn(1, 3, 32) if held.start else torch.tensor([[5, 6, 7]])
    assert torch.equal(ours.run(values), theirs.run(values))


def test_before_a_span_is_chosen_no_more_is_fetched_of_a_shard_than_its_head(hub: Hub) -> None:
    description = described()
    assert description.checkpoint.absent == tuple(sorted(hub.sizes()))
    assert description.checkpoint.shard_bytes == hub.sizes()
    assert all(0 < hub.sent[shard] <= HEAD_BYTES for shard in hub.sizes())


def test_a_head_longer_than_guessed_and_a_hub_without_ranges_give_the_same_model(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = describe(hub.folder).fingerprint
    monkeypatch.setattr(swarm.hub, "HEAD_GUESS_BYTES", 16)
    hub.has_ranges = False
    assert described().fingerprint == expected


def test_a_head_of_which_a_part_was_lost_is_fetched_again(hub: Hub) -> None:
    first = described()
    assert first.hub is not None
    for lost, kept in zip(sorted(hub.sizes()), (0, 7, 50), strict=False):
        head = first.hub.heads / lost
        head.write_bytes(head.read_bytes()[:kept])
    assert described().fingerprint == first.fingerprint


def test_a_folder_and_the_hub_name_of_the_same_model_have_one_fingerprint(
    hub: Hub, tmp_path: Path
) -> None:
    copy = describe(Path(shutil.copytree(hub.folder, tmp_path / "called-otherwise")))
    ours = described()
    assert (ours.fingerprint, ours.files.digest) == (copy.fingerprint, copy.files.digest)
    assert (ours.card.name, copy.card.name) == (NAME, "called-otherwise")
    assert (ours.hub_name, copy.hub_name) == (NAME, "")


def test_a_model_in_one_file_without_an_index_is_fetched_too(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "single"
    tiny_models.AutoModelForCausalLM.from_pretrained(tmp_path / "on-the-hub").save_pretrained(
        hub.folder
    )
    shutil.copy(DEMO_FOLDER / "tokenizer.json", hub.folder)
    description = described()
    assert description.fingerprint == describe(hub.folder).fingerprint
    bring(hub, description, "2:4")
    assert hub.sent == hub.sizes()


def test_a_model_in_one_file_beside_an_index_of_another_upload_is_the_one_that_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    model = tiny_models.AutoModelForCausalLM.from_pretrained(hub.folder)
    model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", hub.folder)
    description = described()
    assert description.checkpoint.shards == ("model.safetensors",)
    assert description.fingerprint == describe(hub.folder).fingerprint
    bring(hub, description, "2:4")
    assert set(hub.sent) == {"model.safetensors"}
    hub.forget()
    assert described().checkpoint.shards == ("model.safetensors",)


def test_whether_there_is_one_file_is_asked_once_a_commit(hub: Hub) -> None:
    described()
    assert ("GET", "model.safetensors") in hub.asked
    hub.forget()
    assert len(described().checkpoint.shards) > 1
    assert not [file for _, file in hub.asked if file == "model.safetensors"]


def test_another_span_later_fetches_what_is_missing_and_nothing_twice(hub: Hub) -> None:
    description = described()
    bring(hub, description, "0:2")
    missing = needed(hub, description, "1:4").keys() - needed(hub, description, "0:2").keys()
    bring(hub, description, "1:4")
    assert hub.sent == {shard: hub.sizes()[shard] for shard in missing}
    told = bring(hub, description, "0:4")
    assert (hub.asked, told.notes) == ([], [])
    load(description, Span(0, 4), "float32", "cpu")


def test_the_size_is_said_before_the_first_byte_and_progress_rises_to_it(hub: Hub) -> None:
    description = described()
    told = bring(hub, description, "2:5")
    wanted = needed(hub, description, "2:5")
    total = sum(wanted.values())
    [(text, sent)] = told.notes
    assert sent == 0
    assert text.startswith(f"fetching {len(wanted)} shards of {NAME}, {in_words(total)}, to ")
    assert told.steps == sorted(told.steps)
    assert told.steps[-1] == (total, total)
    assert [done for done, _ in told.steps].count(total) == 1  # a bar ends when all is done
    assert len(told.steps) > len(wanted)


def test_what_the_budget_has_no_room_for_is_refused_before_any_shard_is_fetched(hub: Hub) -> None:
    description = described()
    first = sum(needed(hub, description, "0:2").values())
    bring(hub, description, "0:2", disk_bytes=first)
    with pytest.raises(BadInput, match=r"of disk for these blocks.* the budget is"):
        bring(hub, description, "2:4", disk_bytes=first + 1)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("free", "budget", "reason"),
    [
        (5 << 30, None, ""),
        (5 << 30, 4 << 30, ""),
        (4 << 30, None, r"needs 3\.0 GB of disk for these blocks, and 4\.0 GB are free"),
        (9 << 30, (4 << 30) - 1, r"beside the 1\.0 GB that are here"),
    ],
)
def test_room_on_disk_is_what_is_free_but_a_spare_and_what_the_budget_leaves(
    free: int, budget: int | None, reason: str
) -> None:
    plan = Fetching(sizes={"a": 2 << 30, "b": 1 << 30}, here_bytes=1 << 30)
    if not reason:
        refuse_too_much(NAME, plan, free - 1 + (free < 5 << 30), budget)
        return
    with pytest.raises(BadInput, match=reason):
        refuse_too_much(NAME, plan, free - 1, budget)


def test_a_second_start_asks_for_one_commit_and_without_network_for_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = described()
    bring(hub, first, "2:5")
    hub.forget()
    assert described().fingerprint == first.fingerprint
    assert hub.asked == [("HEAD", "config.json")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget()
    again = described()
    told = bring(hub, again, "2:5")
    load(again, Span(2, 5), "float32", "cpu")
    assert (hub.asked, told.notes, again.fingerprint) == ([], [], first.fingerprint)


def test_a_second_start_needs_no_hub_that_answers(hub: Hub) -> None:
    first = described()
    bring(hub, first, "2:5")
    hub.refused = (503, "")
    assert described().fingerprint == first.fingerprint


def test_offline_says_which_shards_are_missing_and_serves_what_is_here(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(hub, described(), "2:3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    description = described()
    missing = [
        shard for shard in needed(hub, description, "2:5") if shard in description.checkpoint.absent
    ]
    with pytest.raises(BadInput, match=rf"OFFLINE is set.* need {missing[0]} and \d+ more"):
        bring(hub, description, "2:5")
    with pytest.raises(BadInput, match=rf"shard .*{missing[0]} is missing"):
        load(description, Span(2, 5), "float32", "cpu")
    load(description, Span(2, 3), "float32", "cpu")
    assert hub.asked == []


def test_offline_with_nothing_here_is_told_in_one_sentence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=f"OFFLINE is set, and config.json of {NAME} is not here"):
        described()
    assert hub.asked == []


def test_a_fetching_that_is_cut_off_goes_on_where_it_was(hub: Hub) -> None:
    description = described()
    wanted = needed(hub, description, "2:5")
    cut, size = max(wanted.items(), key=lambda item: item[1])
    hub.cut_after[cut] = [size // 3, size // 3]
    told = bring(hub, description, "2:5")
    assert hub.asked.count(("GET", cut)) == 3
    assert size <= hub.sent.pop(cut) < size + 2 * CHUNK_BYTES
    assert hub.sent == {shard: size for shard, size in wanted.items() if shard != cut}
    assert told.steps[-1] == (sum(wanted.values()),) * 2
    load(description, Span(2, 5), "float32", "cpu")


def test_a_connection_that_keeps_breaking_is_bad_input_and_what_came_is_kept(hub: Hub) -> None:
    description = described()
    wanted = needed(hub, description, "2:5")
    *whole, broken = wanted
    hub.cut_after[broken] = [0] * 99
    with pytest.raises(BadInput, match=f"{broken} of {NAME} .* it broke off") as raised:
        bring(hub, description, "2:5")
    assert "start again" in raised.value.next_step
    assert {shard: hub.sent[shard] for shard in whole} == {name: wanted[name] for name in whole}
    hub.cut_after.clear()
    bring(hub, described(), "2:5")
    assert hub.sent == {broken: wanted[broken]}


@pytest.mark.parametrize(
    ("refused", "reason", "step"),
    [
        ((401, "RepoNotFound"), f"the hub has no {NAME}", "check the name.*hf auth login"),
        ((404, "RepoNotFound"), f"the hub has no {NAME}", "check the name"),
        ((401, ""), f"the hub has no {NAME}", "hf auth login"),
        ((401, "GatedRepo"), f"does not give {NAME} to you", f"/{NAME}, then .hf auth login"),
        ((403, "GatedRepo"), f"does not give {NAME} to you", "HF_TOKEN"),
        ((403, ""), f"does not give {NAME} to you", "HF_TOKEN"),
        ((404, "EntryNotFound"), f"{NAME} has no config.json on the hub", "another model"),
        ((500, ""), f"answers config.json of {NAME} with error 500", "try again later"),
        ((429, ""), f"answers config.json of {NAME} with error 429", "try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_with_the_next_step(
    hub: Hub, refused: tuple[int, str], reason: str, step: str
) -> None:
    hub.refused = refused
    with pytest.raises(BadInput, match=reason) as raised:
        described()
    assert "\n" not in raised.value.sentence()
    assert re.search(step, raised.value.next_step)


def test_a_shard_refused_after_the_model_was_described_is_told_too(hub: Hub) -> None:
    description = described()
    hub.refused = (403, "GatedRepo")
    with pytest.raises(BadInput, match=f"does not give {NAME} to you"):
        bring(hub, description, "0:2")


def test_a_hub_that_cannot_be_reached_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(BadInput, match=f"config.json of {NAME} could not be had") as raised:
        described()
    assert "check the network" in raised.value.next_step


def test_a_file_that_is_not_here_without_network_is_not_taken_for_one_that_is_nowhere(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_model(NAME)
    (model.folder / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=f"tokenizer.json of {NAME} is not here"):
        described()


def test_a_commit_that_the_swarm_names_is_found_whatever_the_name_stands_for(hub: Hub) -> None:
    model = find_model(NAME, COMMIT)
    assert model.commit == COMMIT
    hub.forget()
    assert find_model(NAME, COMMIT) == model
    assert hub.asked == []
    with pytest.raises(BadInput, match=r"has no config\.json on the hub"):
        find_model(NAME, "f" * 40)


@pytest.mark.parametrize("named", ["../../outside", "main", "C" * 40, "", COMMIT + "\n"])
def test_what_a_peer_names_is_no_commit_unless_it_looks_like_one(named: str) -> None:
    assert commit_in(named) == ""
    assert commit_in(COMMIT) == COMMIT
    if named:
        with pytest.raises(BadInput, match="is no commit"):
            find_model(NAME, named)


def test_a_name_that_no_hub_can_have_is_told() -> None:
    with pytest.raises(BadInput, match=r"x/a\.\.b is neither a folder nor a hub name"):
        find_model("x/a..b")


def test_a_model_without_safetensors_or_with_a_broken_head_is_refused(hub: Hub) -> None:
    shard = min(hub.sizes())
    (hub.folder / shard).write_bytes(b"\xff" * 100)
    with pytest.raises(BadInput, match="no safetensors file"):
        described()
    (hub.folder / shard).write_bytes(b"\x40" + b"\0" * 7 + b"{")
    with pytest.raises(BadInput, match=f"{shard} of {NAME} ends within its header"):
        described()
    (hub.folder / "model.safetensors.index.json").unlink()
    shutil.rmtree(Path(constants.HF_HUB_CACHE))
    with pytest.raises(BadInput, match=f"{NAME} has no model.safetensors on the hub"):
        described()


def test_an_index_that_leads_elsewhere_is_refused_before_anything_it_names_is_asked_for(
    hub: Hub,
) -> None:
    index = {"weight_map": {"a": "../../../secrets.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="is no file name"):
        described()
    assert not [file for _, file in hub.asked if "secrets" in file]


def test_a_server_fetches_its_blocks_before_it_loads_them(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(swarm.loading, "MEASURE_SECONDS", 0.05)
    settings = ServeSettings(model=NAME, dtype="float32", memory_bytes=1 << 30)

    async def body() -> None:
        description = await describe_asked(settings)
        hub.forget()
        with ComputeThread(1) as thread, Console() as console:
            loader = Loader(settings, description, thread, console)
            holding = await loader.load(Span(2, 4))
            assert hub.sent == needed(hub, description, "2:4")
            assert holding.span == Span(2, 4)
            holding.close()

    trio.run(body)
    assert f"shards of {NAME}, " in capsys.readouterr().err
