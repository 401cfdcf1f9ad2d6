"""A folder is opened only if it is whole, and described without torch."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, TinyModel
from transformers import AutoModelForCausalLM

from blocks.checkpoint import (
    SINGLE_FILE,
    fingerprint,
    head_bytes,
    model_card,
    open_checkpoint,
    open_shard,
    shard_names,
    small_files,
)
from blocks.errors import CheckpointError
from blocks.forecast import sketch
from blocks.measure import plan_bytes

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(llama: TinyModel, tmp_path: Path) -> Path:
    """A copy of a tiny llama that a test may damage."""
    return Path(shutil.copytree(llama.checkpoint.folder, tmp_path / "copy"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def set_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_checkpoint_tells_its_shape_and_where_every_tensor_is(llama: TinyModel) -> None:
    checkpoint = llama.checkpoint
    assert (checkpoint.blocks, checkpoint.hidden_size) == (BLOCKS, 32)
    assert (checkpoint.vocabulary_size, checkpoint.context_length) == (96, 128)
    assert (checkpoint.model_type, len(checkpoint.shards) > 2) == ("llama", True)
    index = json.loads((checkpoint.folder / INDEX).read_text())
    assert checkpoint.weight_map == index["weight_map"]
    assert sum(checkpoint.tensor_bytes.values()) == index["metadata"]["total_size"]


def test_an_unknown_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is an unknown folder.*no config\.json"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is an unknown folder"):
        open_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_shard_is_refused_by_name(folder: Path, kept: int) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{path.name} .*cut off"):
        open_checkpoint(folder)


def test_a_damaged_header_is_refused_by_the_shards_name(folder: Path) -> None:
    path = shard(folder)
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name} has a damaged header"):
        open_checkpoint(folder)


def test_a_missing_shard_is_refused_by_name(folder: Path) -> None:
    shard(folder).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard(folder).parent}.*00002.* is missing"):
        open_checkpoint(folder)


def test_a_tensor_that_its_shard_lacks_is_refused_by_name(folder: Path) -> None:
    weights = json.loads((folder / INDEX).read_text())["weight_map"]
    set_json(folder / INDEX, weight_map={**weights, "model.extra": shard(folder).name})
    with pytest.raises(CheckpointError, match=r"tensor model\.extra .*lacks it"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_lead_out_of_the_folder(folder: Path, name: object) -> None:
    set_json(folder / INDEX, weight_map={"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="is no file name"):
        open_checkpoint(folder)


def test_only_safetensors_are_read(folder: Path) -> None:
    set_json(folder / INDEX, weight_map={"model.norm.weight": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin; only \.safetensors"):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which can run code"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "no-such-family"}, "no model type that transformers knows"),
        ({"hidden_size": "many"}, "config.json .*hidden_size"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
        ({"num_hidden_layers": 0}, "no usable num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    folder: Path, changes: dict[str, object], reason: str
) -> None:
    set_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_a_config_that_brings_its_own_code_is_refused_and_never_run(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    set_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(CheckpointError, match="no model type that transformers knows"):
        open_checkpoint(folder)
    assert not (folder / "ran").exists()


def test_a_fingerprint_does_not_depend_on_where_the_folder_is(
    llama: TinyModel, folder: Path
) -> None:
    assert fingerprint(open_checkpoint(folder)) == fingerprint(llama.checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_fingerprint_changes_with_every_small_file(folder: Path, name: str) -> None:
    before = fingerprint(open_checkpoint(folder))
    if name == "config.json":
        set_json(folder / name, rms_norm_eps=0.5)
    else:
        (folder / name).write_text("{}")
    assert fingerprint(open_checkpoint(folder)) != before


def test_a_fingerprint_changes_with_a_tensors_dtype(folder: Path) -> None:
    before = fingerprint(open_checkpoint(folder))
    path = shard(folder)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    assert fingerprint(open_checkpoint(folder)) != before


def test_small_files_are_those_that_exist(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    found = small_files(open_checkpoint(folder))
    assert found == {name: folder / name for name in ("config.json", "tokenizer.json")}


def test_a_card_takes_its_ends_from_the_generation_config_if_there_is_one(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    plain = model_card(open_checkpoint(folder))
    assert (plain["end_of_sequence_ids"], plain["begin_of_sequence_id"]) == ([2], 1)
    assert plain["generation"] == {}
    settings = {"eos_token_id": [4, 5], "temperature": 0.6, "do_sample": True, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    card = model_card(open_checkpoint(folder))
    assert (card["end_of_sequence_ids"], card["begin_of_sequence_id"]) == ([4, 5], None)
    assert card["generation"] == {"temperature": 0.6, "do_sample": True}
    assert (card["name"], card["blocks"], card["format"]) == ("LlamaForCausalLM", BLOCKS, 1)
    assert json.loads(json.dumps(card)) == card


def moved_away(folder: Path, *, kept_bytes: int | None = None) -> tuple[Path, Path]:
    """Take a shard out of the folder and leave its head, or a part of it, in a folder of heads."""
    path, heads = shard(folder), folder.parent / "heads"
    data = path.read_bytes()
    head = data[: head_bytes(data[:8])]
    heads.mkdir()
    (heads / path.name).write_bytes(head if kept_bytes is None else head[:kept_bytes])
    return path.rename(folder.parent / path.name), heads


def test_a_shard_that_is_not_here_is_known_by_its_head(llama: TinyModel, folder: Path) -> None:
    away, heads = moved_away(folder)
    checkpoint = open_checkpoint(folder, heads)
    assert checkpoint.absent == (away.name,)
    assert checkpoint.tensors == llama.checkpoint.tensors
    assert fingerprint(checkpoint) == fingerprint(llama.checkpoint)
    assert checkpoint.shard_bytes == llama.checkpoint.shard_bytes
    assert checkpoint.shard_bytes[away.name] == away.stat().st_size
    away.rename(folder / away.name)
    assert checkpoint.absent == ()


def test_a_missing_shard_is_refused_only_where_it_is_asked_for(folder: Path) -> None:
    away, heads = moved_away(folder)
    checkpoint = open_checkpoint(folder, heads)
    others = [name for name in checkpoint.shards if name != away.name]
    assert checkpoint.only(others).shards == tuple(others)
    assert checkpoint.only(others).tensors == checkpoint.tensors
    with pytest.raises(CheckpointError, match=rf"shard .*{away.name} is missing"):
        checkpoint.only(checkpoint.shards)


def test_a_shard_that_is_not_what_its_head_announced_is_refused_by_name(folder: Path) -> None:
    away, heads = moved_away(folder)
    checkpoint = open_checkpoint(folder, heads)
    data = away.read_bytes()
    for other in (data.replace(b'"F32"', b'"I32"', 1), data.replace(b"model.", b"nodel.", 1)):
        (folder / away.name).write_bytes(other)
        with pytest.raises(CheckpointError, match=rf"{away.name} holds other tensors"):
            checkpoint.only([away.name])
    (folder / away.name).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"{away.name} has .* cut off or damaged"):
        checkpoint.only([away.name])


@pytest.mark.parametrize("kept", [0, 5, 60])
def test_a_head_that_was_cut_off_is_refused_by_name(folder: Path, kept: int) -> None:
    away, heads = moved_away(folder, kept_bytes=kept)
    with pytest.raises(CheckpointError, match=rf"{away.name} was cut off in its header"):
        open_checkpoint(folder, heads)


@pytest.mark.parametrize("beginning", [b"", b"\1\0\0", b"\xff" * 8, b"PK\3\4\x14\0\x08\x08"])
def test_what_is_no_safetensors_file_has_no_head(beginning: bytes) -> None:
    with pytest.raises(CheckpointError, match="no safetensors file"):
        head_bytes(beginning)


def test_the_shards_of_a_folder_are_known_before_they_are_here(folder: Path) -> None:
    names = tuple(sorted(path.name for path in folder.glob("*.safetensors")))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert shard_names(folder) == names
    (folder / INDEX).unlink()
    assert shard_names(folder) == ("model.safetensors",)


def test_a_card_is_the_same_whatever_the_folder_is_called(llama: TinyModel, folder: Path) -> None:
    assert model_card(open_checkpoint(folder)) == model_card(llama.checkpoint)


def made_whole(folder: Path) -> Path:
    """Put the same weights, one changed, into the folder as one file beside the index."""
    tensors = {
        name: value for path in folder.glob("*-of-*") for name, value in load_file(path).items()
    }
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def test_a_whole_file_comes_before_an_index_of_another_upload(folder: Path) -> None:
    made_whole(folder)
    set_json(folder / INDEX, weight_map={"model.gone.weight": "model-00001-of-00009.safetensors"})
    checkpoint = open_checkpoint(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert (checkpoint.shards, shard_names(folder)) == ((SINGLE_FILE,), (SINGLE_FILE,))
    assert checkpoint.weight_map.keys() >= {"model.norm.weight", "lm_head.weight"}
    ours = open_shard(checkpoint, SINGLE_FILE).get_tensor("model.norm.weight")
    assert ours.tolist() == theirs.tolist()


def test_a_whole_file_is_enough_where_the_shards_of_the_index_are_missing(folder: Path) -> None:
    whole = made_whole(folder)
    for path in whole.glob("*-of-*"):
        path.unlink()
    assert open_checkpoint(folder).shards == (SINGLE_FILE,)
    (folder / SINGLE_FILE).rename(folder / "model.fp16.safetensors")
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"only model\.fp16\.safetensors, a name that"):
        open_checkpoint(folder)


@pytest.mark.parametrize("kind", ["bart", "mbart", "t5", "whisper", "marian", "encoder-decoder"])
def test_an_encoder_with_a_decoder_is_refused_by_its_type(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for look in (open_checkpoint, sketch):
        with pytest.raises(CheckpointError, match=rf"\({kind}\), and only decoders are served"):
            look(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("num_hidden_layers", "hidden_size", "vocab_size")
            for value in (10**9, 10**30, -1, 0, 2.5, "4", True, None, [2])
        ),
        ("num_attention_heads", 10**9),
        ("num_attention_heads", 0),
        ("num_experts", 10**9),
        ("num_labels", 10**9),
        ("text_config", {"n_layer": 10**9}),
        ("vocab_size", 1 << 21),
        ("num_hidden_layers", 1000),
    ],
    ids=str,
)
def test_an_absurd_size_is_refused_by_name_before_anything_of_it_is_made(
    folder: Path, name: str, value: object
) -> None:
    set_json(folder / "config.json", **{name: value})
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"config\.json ") as told:
            open_checkpoint(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert name in str(told.value) or isinstance(value, dict) or value == 0 or value == -1


def test_what_no_model_can_be_made_of_is_told_in_a_sentence(folder: Path) -> None:
    set_json(folder / "config.json", hidden_act="no such")
    with pytest.raises(CheckpointError, match=r"makes no model of .*config\.json .*no such"):
        plan_bytes(open_checkpoint(folder), "auto")
