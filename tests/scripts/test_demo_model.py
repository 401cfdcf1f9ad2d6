"""The demo model that ships: small, told truly by its card, and the same when grown."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.settings import DEMO_FOLDER

SCRIPTS = Path(__file__).parents[2] / "scripts"
MOST_BYTES = 8_000_000
GREEDY = re.compile(r"^\d+\. \*\*(.+?)\*\*(.*)$", re.MULTILINE)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
    text: str = tokenizer.decode(made, skip_special_tokens=True)
    return text


def card_says() -> list[tuple[str, str]]:
    greedy_part = (DEMO_FOLDER / "README.md").read_text().split("## Sampled")[0]
    return GREEDY.findall(greedy_part.split("## Greedy")[1])


def test_the_demo_is_two_shards_and_at_most_8_megabytes() -> None:
    shards = sorted(DEMO_FOLDER.glob("*.safetensors"))
    assert len(shards) == 2
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= MOST_BYTES


def test_the_card_shows_ten_prompts_and_what_the_model_says_to_them() -> None:
    told = card_says()
    assert len(told) == 10
    prompt, continued = told[0]
    said = " ".join(greedy(DEMO_FOLDER, prompt, 40).split())
    shown = " ".join(continued.replace(" / ", " ").split())
    assert shown.startswith(said)


@pytest.mark.parametrize("number", [0, 1])
def test_grown_to_ten_blocks_of_1024_it_says_the_same(tmp_path: Path, number: int) -> None:
    prompt, _ = card_says()[number]
    script("grow").grow(DEMO_FOLDER, tmp_path / "grown", width=4, total=10, dtype="float32")
    assert greedy(tmp_path / "grown", prompt, 48) == greedy(DEMO_FOLDER, prompt, 48)
