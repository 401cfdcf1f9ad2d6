#!/usr/bin/env python3
"""Measure decode steps of a stack on a GPU, beside transformers' own on the same card.

    python scripts/gpu_bench.py [--json] [--rounds 9] [--steps 20] [--blocks 8] [--past 512]
                                [--sessions 1 8 32] [--quants none nf4] [--device cuda] [--tiny]

Blocks of the shape of a 7B model (width 4096, 32 heads, 8 of keys, feed-forward 14336) with random
weights in bfloat16, written to a temporary folder and loaded as a server loads them. Hidden states
go in and come out; all sessions have pasts of `past` positions, so that nobody has to pad. Every
round takes each way once, in turn, `steps` steps; the clock stops when the device is done. Figures
are medians: tokens per second of all sessions, and ratios within a round.

padded       joint steps as without pages: keys padded together anew in each block
by tables    keys in pages, attention by tables, nothing recorded
recorded     the same as CUDA graphs, what a server does
dynamic      transformers' forward of a batch, with its DynamicCache
static       the same with its StaticCache
recorded/..  recorded / the faster of the last two; recorded / padded
share        of the steps of "recorded", those that were: 0 if a trial has refused it

Without a GPU it says so and stops. `--device cpu --tiny` runs all of it on small blocks, recorded
by torch's tracer: to see that it works, not how fast.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_bench import ratio, rounds
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.hf.forwards import cache_argument
from blocks.load import load_stack
from blocks.recorder import GraphRecorder, Recorder, TraceRecorder
from blocks.stack import Stack
from blocks.transfer import wait_for
from blocks.trial import Paging

_SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "heads": 8}
_TINY_PAGE = 16
_WARM_STEPS = 4  # what is recorded is recorded when it comes again

Step = Callable[[], Any]


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--quants", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small blocks, to see that it runs")
    asked = parser.parse_args()
    if torch.device(asked.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_bench: there is no GPU here; --device cpu --tiny shows that the bench runs")
    with tempfile.TemporaryDirectory(prefix="swarm-gpu-") as folder:
        made = measured(made_model(Path(folder), asked), asked)
    if asked.json:
        print(json.dumps(made))
    else:
        show(made)


def made_model(folder: Path, asked: argparse.Namespace) -> Checkpoint:
    """Write the blocks that are measured, made where they will run."""
    shape = _TINY if asked.tiny else _SHAPE
    heads = shape["heads"]
    config = LlamaConfig(
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        num_hidden_layers=asked.blocks,
        vocab_size=512,  # ends are not measured
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(asked.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    return open_checkpoint(folder)


def measured(checkpoint: Checkpoint, asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures."""
    device = torch.device(asked.device)
    is_gpu = device.type == "cuda"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "model": f"{asked.blocks} blocks, {'tiny' if asked.tiny else '7B-shaped'}, bfloat16",
        "past": asked.past,
    }
    for quant in asked.quants:
        stack = load_stack(
            checkpoint, 0, checkpoint.blocks, dtype="bfloat16", device=asked.device, quant=quant
        )
        found[quant] = {
            count: figures(stack._carved.model, checkpoint.blocks, count, asked)
            for count in asked.sessions
        }
    return found


def figures(model: Any, blocks: int, count: int, asked: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of so many sessions each way, and what they come to."""
    device = torch.device(asked.device)
    page = _TINY_PAGE if asked.tiny else Paging().page_tokens
    recorder: Recorder = GraphRecorder(device) if device.type == "cuda" else TraceRecorder()
    stacks = {
        "padded": unpaged(model, blocks),
        "by tables": Stack.of(model, 0, blocks, Paging(page)),
        "recorded": Stack.of(model, 0, blocks, Paging(page, recorder)),
    }
    ways = {name: joint(stack, count, asked.past) for name, stack in stacks.items()}
    steps = (_WARM_STEPS + asked.steps) * (asked.rounds + 1)
    ways["dynamic"] = family(model, DynamicCache(config=model.config), count, asked.past)
    static = StaticCache(config=model.config, max_cache_len=asked.past + steps)
    ways["static"] = family(model, static, count, asked.past)
    times = rounds(
        [several(way, asked.steps, device) for way in ways.values()],
        asked.rounds,
        time.perf_counter,
    )
    speeds = {
        name: count * asked.steps / median(taken) for name, taken in zip(ways, times, strict=True)
    }
    decoder = stacks["recorded"]._decoder
    by_name = dict(zip(ways, times, strict=True))
    theirs = min(by_name["dynamic"], by_name["static"], key=median)
    return {
        **speeds,
        "recorded/transformers": ratio([theirs, by_name["recorded"]], 0, 1),
        "recorded/padded": ratio([by_name["padded"], by_name["recorded"]], 0, 1),
        "share recorded": 0.0 if decoder is None else decoder.repeated / steps,
    }


def unpaged(model: Any, blocks: int) -> Stack:
    """The stack as it is where keys do not lie in pages."""
    stack = Stack.of(model, 0, blocks, Paging())
    return Stack(stack._carved, 0, blocks)


def joint(stack: Stack, count: int, past: int) -> Step:
    """One step of so many sessions, hidden states in and out."""
    hidden, _ = stack.sample(past)
    caches = [stack.new_cache() for _ in range(count)]
    for cache in caches:
        stack.run(hidden, cache=cache)
    inputs = [hidden[:, :1].cpu()] * count  # as they come from the wire
    return lambda: stack.run_joined(inputs, caches)


def family(model: Any, cache: Any, count: int, past: int) -> Step:
    """One step of transformers' own forward of the blocks, for a batch of equal pasts."""
    width, device = model.config.hidden_size, model.device
    prompt = torch.randn(count, past, width, dtype=model.dtype, device=device)
    token = prompt[:, :1].clone()
    name = cache_argument(model.model)

    def step(embedded: torch.Tensor = token) -> Any:
        with torch.inference_mode():
            return model.model(inputs_embeds=embedded, use_cache=True, **{name: cache})

    step(prompt)
    return step


def several(step: Step, steps: int, device: torch.device) -> Step:
    """So many steps, until the device is done; before the first ones some that warm up."""
    for _ in range(_WARM_STEPS):
        step()

    def run() -> None:
        for _ in range(steps):
            step()
        wait_for(device)

    return run


def show(made: dict[str, Any]) -> None:
    """Print a table for each format."""
    print(f"{made['device']}: {made['model']}, pasts of {made['past']}")
    for quant in ("none", "nf4"):
        by_count = made.get(quant)
        if by_count:
            rows: Sequence[str] = list(next(iter(by_count.values())))
            print(f"\n{quant:22}" + "".join(f"{count:>10}" for count in by_count))
            for row in rows:
                values = "".join(f"{by_count[count][row]:>10.4g}" for count in by_count)
                print(f"{row:22}{values}")


if __name__ == "__main__":
    main()
