#!/usr/bin/env python3
"""Measure what quantized weights and an 8-bit wire cost in quality, beside the whole model.

    python scripts/quality.py --data FOLDER [--model FOLDER ...] [--tokens 4000] [--json]

FOLDER of --data holds tinystories-*.txt. The text is the stories that the demo model's training
held out. Measured are the demo model and each --model; what is not there is skipped, with a reason.

Each story is a text of its own, from the model's beginning token on, up to its context; all its
tokens but the first are counted. A model runs as it is served, in three stacks one after another,
and what goes from one to the next goes through the wire's bytes.

perplexity   e to the mean loss, in nats, of all counted tokens
ratio        this over the whole model's: transformers' own, float32, in one piece
top-1        per cent of counted tokens for which both find the same token likeliest

1. The same data, models and options give the same figures: nothing is drawn, and one thread
   computes.
2. Every row scores the same tokens.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from demo_text import hold_out, read_stories
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.codec import decode_8bit, encode_8bit, from_raw, to_raw
from blocks.errors import BlocksError
from blocks.load import Dtype, load_stack
from blocks.quantize import Quant
from blocks.stack import Stack

Wire = Callable[[torch.Tensor], torch.Tensor]

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "swarm" / "demo"
DATA = ROOT.parent / "shared" / "data" / "text"
DEMO_SEED = 0  # of the training that made swarm/demo: its card says so
TOKENS = 4000
STACKS = 3
FORMATS: tuple[Quant, ...] = ("none", "int8", "nf4")
WIRES: dict[str, Wire] = {
    "raw": lambda hidden: from_raw(to_raw(hidden)),
    "8-bit": lambda hidden: decode_8bit(encode_8bit(hidden)),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of the texts: nats over all counted tokens, and its likeliest tokens."""

    nats: float
    likeliest: torch.Tensor  # int64 [tokens]

    @property
    def perplexity(self) -> float:
        """e to the mean loss."""
        return math.exp(self.nats / len(self.likeliest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to serve a model, beside the whole one."""

    quant: str
    wire: str
    perplexity: float
    ratio: float
    top_1_percent: float


def cut(texts: Sequence[str], tokenizer: Tokenizer, tokens: int, context: int) -> list[list[int]]:
    """The ids of the first texts that have `tokens` tokens to count; the last may be cut short."""
    found: list[list[int]] = []
    left = tokens
    for text in texts:
        ids = tokenizer.encode(text).ids[: min(context, left + 1)]
        if len(ids) > 1:  # the first is given, never counted
            found.append(ids)
            left -= len(ids) - 1
        if left == 0:
            break
    if not found:
        raise SystemExit("The texts have no token to count. Name longer ones.")
    return found


def read(logits_of: Callable[[torch.Tensor], torch.Tensor], texts: Sequence[list[int]]) -> Reading:
    """Score the texts, one at a time; `logits_of` takes ids [1, S] and gives logits [1, S, V]."""
    nats, likeliest = [], []
    for text in texts:
        ids = torch.tensor([text])
        logits = logits_of(ids)[0, :-1].float()
        nats.append(float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
        likeliest.append(logits.argmax(-1))
    return Reading(math.fsum(nats), torch.cat(likeliest))


def whole(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits of transformers' own model in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    return logits_of


def stacks_of(checkpoint: Checkpoint, quant: Quant, dtype: Dtype) -> list[Stack]:
    """The model as neighbouring stacks of about equal length."""
    count = min(STACKS, checkpoint.blocks)
    bounds = [checkpoint.blocks * number // count for number in range(count + 1)]
    return [
        load_stack(checkpoint, start, stop, dtype=dtype, quant=quant)
        for start, stop in pairwise(bounds)
    ]


def served(stacks: Sequence[Stack], wire: Wire) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits of the stacks one after another, with the wire between."""

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        sides: dict[str, torch.Tensor] = {}
        values = ids
        for stack in stacks[:-1]:
            values = wire(stack.run(values, sides=sides))
        return stacks[-1].run(values, logits_for=0, sides=sides)

    return logits_of


def measure(folder: Path, texts: Sequence[str], tokens: int, dtype: Dtype) -> dict[str, Any]:
    """All rows of one model; `tokens` is the most that are counted."""
    checkpoint = open_checkpoint(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cuts = cut(texts, tokenizer, tokens, checkpoint.context_length)
    right = read(whole(folder), cuts)
    rows = []
    for quant in FORMATS:
        stacks = stacks_of(checkpoint, quant, dtype)
        for name, wire in WIRES.items():
            found = read(served(stacks, wire), cuts)
            agreeing = (found.likeliest == right.likeliest).double().mean()
            row = Row(
                quant=quant,
                wire=name,
                perplexity=found.perplexity,
                ratio=math.exp((found.nats - right.nats) / len(right.likeliest)),
                top_1_percent=100 * float(agreeing),
            )
            rows.append(asdict(row))
    return {
        "model": folder.name,
        "dtype": dtype,
        "texts": len(cuts),
        "tokens": len(right.likeliest),
        "stacks": len(stacks),
        "whole_perplexity": right.perplexity,
        "rows": rows,
    }


def why_skipped(folder: Path) -> str | None:
    """None if a model can be measured, else why not, in one sentence."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if not (folder / "tokenizer.json").is_file():
        return f"{folder} has no tokenizer.json"
    try:
        open_checkpoint(folder)
    except BlocksError as error:
        return str(error)
    return None


def measure_all(
    folders: Sequence[Path], data: Path, tokens: int, dtype: Dtype
) -> dict[str, list[dict[str, Any]]]:
    """The figures of all models that are there, and the reasons for those that are not."""
    reasons = {folder: why_skipped(folder) for folder in folders}
    if not any(data.glob("tinystories-*.txt")):
        reasons = dict.fromkeys(folders, f"{data} has no tinystories-*.txt: name it with --data")
    found: dict[str, list[dict[str, Any]]] = {"models": [], "skipped": []}
    for folder, reason in reasons.items():
        if reason is None:
            _, texts = hold_out(read_stories(data), DEMO_SEED)
            found["models"].append(measure(folder, texts, tokens, dtype))
        else:
            found["skipped"].append({"model": folder.name, "why": reason})
    return found


def table(figures: dict[str, Any]) -> str:
    """One model's figures for a person, as a Markdown table."""
    stories = "1 story" if figures["texts"] == 1 else f"{figures['texts']} stories"
    lines = [
        f"{figures['model']}: {figures['tokens']:,} tokens of {stories}, "
        f"{figures['stacks']} stacks computing in {figures['dtype']}",
        "",
        "| weights | wire | perplexity | / whole | top-1, % |",
        "| --- | --- | --- | --- | --- |",
        f"| whole, float32 | | {figures['whole_perplexity']:.4f} | 1 | 100 |",
    ]
    lines += [
        f"| {row['quant']} | {row['wire']} | {row['perplexity']:.4f} | {row['ratio']:.4f} | "
        f"{row['top_1_percent']:.2f} |"
        for row in figures["rows"]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of tinystories-*.txt")
    parser.add_argument("--model", type=Path, action="append", default=[], help="one more folder")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="the most to count per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.tokens < 1:
        parser.error("--tokens is 1 or more")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    figures = measure_all([DEMO, *asked.model], asked.data, asked.tokens, asked.dtype)
    if asked.json:
        print(json.dumps(figures, indent=1))
        return
    for one in figures["models"]:
        print(table(one), end="\n\n")
    for one in figures["skipped"]:
        print(f"{one['model']}: skipped, {one['why']}")


if __name__ == "__main__":
    main()
