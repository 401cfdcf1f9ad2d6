#!/usr/bin/env python3
"""Measure decode steps of a stack alone: packed matrices, and joint steps by rows.

    python scripts/step_bench.py [--json] [--rounds 9] [--dtype bfloat16] [--layers 10] [--width 4]
                                 [--ffn 0] [--vocabulary 2048] [--sessions 1 4 16 32]
                                 [--least 40] [--most 400]

The model is the demo's, grown to `layers` blocks of `width` times its hidden size (with `--ffn`, a
random llama with so wide a feed-forward and so many tokens instead). One process, one thread; every
round takes each way once, in turn; times are the thread's CPU time, so that neighbours matter
little. Figures are medians of ratios within a round.

decode        one session: plain matrices and the family's attention / what is served
prefill       128 positions: plain / packed
joint N       ms of one step of N sessions whose pasts are `least` to `most` positions long
gain N        N x the step of one session / the joint step: how many times more tokens
padded N      the joint step with keys padded together / by rows (packed both)
plain N       the joint step with plain matrices, padded, as it was / as it is
head N        the joint step with a plain head / as it is, where the embedding's matrix is packed
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import grow
from transformers import LlamaConfig, LlamaForCausalLM

from blocks.cache import StackCache
from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.load import load_stack
from blocks.packed import PackedLinear
from blocks.stack import Stack

_PREFILL = 128

Step = Callable[[], Any]


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=0, help="a random llama, its feed-forward width")
    parser.add_argument("--vocabulary", type=int, default=2048, help="of a random llama")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--least", type=int, default=40)
    parser.add_argument("--most", type=int, default=400)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="swarm-step-") as folder:
        made = measured(made_model(Path(folder) / "model", asked), asked)
    if asked.json:
        print(json.dumps(made))
    else:
        for name, value in made.items():
            print(f"{name:12} {value:.4g}" if isinstance(value, float) else f"{name:12} {value}")


def made_model(folder: Path, asked: argparse.Namespace) -> Checkpoint:
    """Write the model that is measured."""
    if not asked.ffn:
        grow(folder, asked.layers, asked.width)
        return open_checkpoint(folder)
    torch.manual_seed(0)
    hidden = 256 * asked.width
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=asked.ffn,
        num_hidden_layers=asked.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        vocab_size=asked.vocabulary,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return open_checkpoint(folder)


def plain_stack(checkpoint: Checkpoint, dtype: Any) -> Stack:
    """The stack without what this script measures: transformers' layers as they are."""
    return padding(load_stack(checkpoint, 0, checkpoint.blocks, dtype=dtype, packs=False))


def padding(stack: Stack) -> Stack:
    """The stack, made to pad keys in joint steps and to leave attention to the family."""
    stack._carved._attention = None
    return stack


def plain_headed(stack: Stack) -> Stack | None:
    """The stack with its head as a plain layer; None if it is one."""
    head = stack._carved.model.get_output_embeddings()
    if not isinstance(head, PackedLinear):
        return None
    _ = head.weight  # who looks at it gets it, and a plain layer
    return stack


def measured(checkpoint: Checkpoint, asked: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the figures by name."""
    plain = plain_stack(checkpoint, asked.dtype)
    packed = load_stack(checkpoint, 0, checkpoint.blocks, dtype=asked.dtype)
    padded = padding(load_stack(checkpoint, 0, checkpoint.blocks, dtype=asked.dtype))
    headed = plain_headed(load_stack(checkpoint, 0, checkpoint.blocks, dtype=asked.dtype))
    found: dict[str, Any] = {"model": f"{asked.layers} x {packed.hidden_size}, {asked.dtype}"}
    before, after = (prefill(stack) for stack in (plain, packed))
    found["prefill"] = ratio(rounds([before, after], asked.rounds), 0, 1)
    before, after = (steps(stack, [asked.most // 2]) for stack in (plain, packed))
    times = rounds([before, after], asked.rounds)
    found |= {"decode": ratio(times, 0, 1), "decode ms": median(times[1]) * 1000}
    for count in asked.sessions:
        lengths = torch.linspace(asked.least, asked.most, count).int().tolist()
        one = steps(packed, [sum(lengths) // count])
        others = [packed, padded, plain, *([headed] if headed else [])]
        ways = [one, *(steps(stack, lengths) for stack in others)]
        times = rounds(ways, asked.rounds)
        found[f"joint {count}"] = median(times[1]) * 1000
        found[f"gain {count}"] = count * ratio(times, 0, 1)
        found[f"padded {count}"] = ratio(times, 2, 1)
        found[f"plain {count}"] = ratio(times, 3, 1)
        if headed:
            found[f"head {count}"] = ratio(times, 4, 1)
    return found


def prefill(stack: Stack) -> Step:
    """A chunk of a prompt."""
    hidden, _ = stack.sample(_PREFILL)
    return lambda: stack.run(hidden, cache=stack.new_cache())


def steps(stack: Stack, lengths: Sequence[int]) -> Step:
    """One step of sessions with pasts of these lengths, hidden states in and logits out."""
    hidden, _ = stack.sample(max(lengths))
    caches: list[StackCache] = []
    for length in lengths:
        caches.append(stack.new_cache())
        stack.run(hidden[:, :length], cache=caches[-1])
    inputs, wants = [hidden[:, :1]] * len(lengths), [True] * len(lengths)
    return lambda: stack.run_joined(inputs, caches, wants_logits=wants)


def rounds(
    ways: Sequence[Step], count: int, clock: Callable[[], float] = time.thread_time
) -> list[list[float]]:
    """CPU seconds of each way, or another clock's, one entry a round; the first round warms up and
    does not count.
    """
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(count + 1):
        for way, seconds in zip(ways, taken, strict=True):
            begun = clock()
            way()
            if number:
                seconds.append(clock() - begun)
    return taken


def ratio(times: Sequence[Sequence[float]], over: int, under: int) -> float:
    """The median over the rounds of one way's time / another's."""
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


if __name__ == "__main__":
    main()
