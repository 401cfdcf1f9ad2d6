"""scripts/real_model.py: what cannot be is told in one sentence, and leaves no folder behind."""

from pathlib import Path

import pytest
import real_model


def ended(capsys: pytest.CaptureFixture[str], *words: Path | str) -> str:
    """What it says on stderr as it ends."""
    with pytest.raises(SystemExit) as end:
        real_model.main([str(word) for word in words])
    assert end.value.code
    return capsys.readouterr().err


def test_without_the_extras_packages_it_says_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    told = ended(capsys, tmp_path / "made")
    assert told.count("\n") == 1
    assert "pip install -e '.[test,real]'" in told
    assert "gguf and accelerate" in told


def test_a_folder_that_is_there_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda name: name)
    (tmp_path / "mine").write_text("mine")
    assert str(tmp_path) in ended(capsys, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_file_than_the_packages_is_refused_and_no_folder_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda name: name)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    assert str(other) in ended(capsys, tmp_path / "made", "--gguf", other)
    assert list(tmp_path.iterdir()) == [other]


def test_without_a_name_it_goes_where_the_suite_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    monkeypatch.delenv("SWARM_REAL_MODEL", raising=False)
    assert real_model.default_folder() == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("SWARM_REAL_MODEL", "/models/smol")
    assert real_model.default_folder() == Path("/models/smol")
