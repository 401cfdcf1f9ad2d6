"""A command on a transformers that differs from those known here: one sentence, no wrong text."""

import os
import subprocess
from pathlib import Path

import processes
import pytest
import transformers

PLANTS = {
    "a class has moved": (
        "cache_utils.py",
        "Elsewhere = DummyLayer\ndel DummyLayer\n",
        "cannot import name 'DummyLayer' from 'transformers.cache_utils'",
    ),
    "an argument is called otherwise": (
        "masking_utils.py",
        "_theirs = sdpa_mask\n"
        "def sdpa_mask(*args, window=None, **named):\n"
        "    return _theirs(*args, local_size=window, **named)\n",
        "sdpa_mask takes no mask_function, but args, window, named",
    ),
}


def double(folder: Path, file: str, more: str) -> Path:
    """A folder for PYTHONPATH with the installed transformers, to one file of which is added."""
    theirs = Path(transformers.__file__).parent
    (folder / "transformers").mkdir()
    for path in theirs.iterdir():
        if path.name != file:
            (folder / "transformers" / path.name).symlink_to(path)
    text = (theirs / file).read_text("utf-8")
    (folder / "transformers" / file).write_text(f"{text}\n\n{more}", "utf-8")
    return folder


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_differing_release_is_refused_by_name_in_one_sentence(plant: str, tmp_path: Path) -> None:
    file, more, sentence = PLANTS[plant]
    search = os.pathsep.join([str(double(tmp_path, file, more)), os.environ.get("PYTHONPATH", "")])
    made = subprocess.run(
        [*processes.SWARM, "generate", "Once upon a time"],
        env={**processes.environment(tmp_path / "home"), "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    *_, last = made.stderr.splitlines()
    assert (made.returncode, made.stdout) == (2, "")
    assert last.startswith(f"swarm: transformers {transformers.__version__} is not as known here: ")
    assert sentence in last
    assert "install a release that was tried: pip install 'transformers" in last
