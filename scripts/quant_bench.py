#!/usr/bin/env python3
"""Measure what quantization saves and costs, as ratios within one run, on this machine.

    python scripts/quant_bench.py [--json] [--rounds 7]

Random weights in a temporary folder, 1 GB of them: a llama of 12 blocks of 2048 and a mixtral of 4
blocks of 1024 with 8 experts, both bfloat16. One thread; every round takes each format once, in
turn; figures are medians over the rounds. Times are CPU time of the thread, so that neighbours
matter little; starts are wall time of `load_stack` without imports, their ratio also in CPU time.

bytes_ratio            loaded bytes of a span in the format / in bfloat16
decode_ms, speedup     one token through 4 blocks with 64 in the cache; bfloat16's time / this one's
prefill_ms             a chunk of 512 tokens through them
error                  relative difference of the blocks' change from bfloat16's (random weights!)
first_start, second    seconds: quantizing, and from the saved copy, of which
check_start            seconds to check the copy's bytes
anonymous_over_span    highest anonymous memory while loading less before, / the span in bfloat16
beyond_result          the same less the loaded bytes, / a block in bfloat16; fresh processes
check_seconds_per_gb   finding NaN in a GB of bfloat16; checking a GB of a saved copy
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from blocks.checkpoint import Checkpoint, open_checkpoint
from blocks.formats import is_nf4_fast
from blocks.hf.models import causal_class
from blocks.load import has_nan, load_stack
from blocks.packed import PackedLinear
from blocks.quantize import Quant, held_parts
from blocks.saved import checksum
from blocks.stack import Stack

FORMATS: tuple[Quant, ...] = ("none", "int8", "nf4")
SPAN = (4, 8)
WHOLE = (0, 12)
MIXTURE_SPAN = (1, 3)
GIGABYTE = 2**30

_COMMON = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        "num_hidden_layers": 12,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "mixtral": {
        **_COMMON,
        "num_hidden_layers": 4,
        "hidden_size": 1024,
        "intermediate_size": 1792,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
    },
}


def build(family: str, folder: Path) -> Checkpoint:
    """Write a random checkpoint of the family in shards, as its authors would have."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")
    return open_checkpoint(folder)


def loaded_bytes(stack: Stack) -> int:
    """Bytes of everything that the stack's model holds, each storage once."""
    model = stack._carved.model
    tensors = [*model.parameters(), *held_parts(model).values()]
    packed = sum(one.byte_count for one in model.modules() if isinstance(one, PackedLinear))
    return packed + sum({one.data_ptr(): one.nbytes for one in tensors}.values())


def thread_ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of this thread."""
    begun = time.thread_time()
    work()
    return (time.thread_time() - begun) * 1000


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def compare(checkpoint: Checkpoint, span: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Bytes, speeds and errors of a span in every format."""
    stacks = {one: load_stack(checkpoint, *span, dtype="bfloat16", quant=one) for one in FORMATS}
    hidden = torch.randn(1, 512, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    chunk = hidden * torch.randn(checkpoint.hidden_size).bfloat16()
    times: dict[str, dict[Quant, list[float]]] = {
        "decode_ms": defaultdict(list),
        "prefill_ms": defaultdict(list),
    }
    caches = {one: stack.new_cache() for one, stack in stacks.items()}
    for one, stack in stacks.items():
        stack.run(chunk[:, :64], cache=caches[one])
    token = chunk[:, :1]
    for turn in range(rounds + 1):
        for one, stack in stacks.items():
            cache = caches[one]
            steps = [
                thread_ms(lambda: stack.run(token, cache=cache, start=cache.length))  # noqa: B023
                for _ in range(5)
            ]
            prefill = thread_ms(lambda: stack.run(chunk))  # noqa: B023
            if turn:  # the first warms up
                times["decode_ms"][one].append(median(steps))
                times["prefill_ms"][one].append(prefill)
    sizes = {one: loaded_bytes(stack) for one, stack in stacks.items()}
    change = {one: (stack.run(chunk) - chunk).float() for one, stack in stacks.items()}
    decode = {one: median(taken) for one, taken in times["decode_ms"].items()}
    return {
        "bfloat16_bytes": sizes["none"],
        "bytes_ratio": {one: sizes[one] / sizes["none"] for one in FORMATS},
        "decode_ms": decode,
        "speedup": {one: decode["none"] / decode[one] for one in FORMATS},
        "prefill_ms": {one: median(taken) for one, taken in times["prefill_ms"].items()},
        "error": {
            one: float((change[one] - change["none"]).norm() / change["none"].norm())
            for one in FORMATS
        },
    }


def starts(checkpoint: Checkpoint, span: tuple[int, int], rounds: int, folder: Path) -> Any:
    """Seconds to quantize a span and to take it from its copy, in turn."""
    hidden = torch.randn(1, 3, checkpoint.hidden_size, generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {}
    for quant in FORMATS[1:]:
        saved = folder / quant
        wall: dict[bool, list[float]] = {False: [], True: []}
        cpu: dict[bool, list[float]] = {False: [], True: []}
        outputs = [
            load_stack(checkpoint, *span, dtype="bfloat16", quant=quant, saved=saved).run(hidden)
        ]
        for _ in range(rounds):
            for is_second in (False, True):
                begun, used = time.perf_counter(), time.process_time()
                stack = load_stack(
                    checkpoint,
                    *span,
                    dtype="bfloat16",
                    quant=quant,
                    saved=saved if is_second else None,
                )
                wall[is_second].append(time.perf_counter() - begun)
                cpu[is_second].append(time.process_time() - used)
                outputs.append(stack.run(hidden))
        (copy,) = saved.iterdir()
        found[quant] = {
            "first_start": median(wall[False]),
            "second_start": median(wall[True]),
            "check_start": median(timed(lambda: checksum(copy)) for _ in range(rounds)),  # noqa: B023
            "times_faster": median(wall[False]) / median(wall[True]),
            "times_faster_cpu": median(cpu[False]) / median(cpu[True]),
            "outputs_identical": all(torch.equal(outputs[0], one) for one in outputs),
        }
    return found


def load_once(folder: str, start: str, stop: str, quant: Any, saved: str) -> None:
    """In a process of its own: load a span and print the memory that took."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(Path(folder))
    causal_class(checkpoint.config)(tiny(checkpoint))  # imports, and what they leave behind
    is_nf4_fast()
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    span, path = (int(start), int(stop)), Path(saved) if saved else None
    stack = load_stack(
        checkpoint, *span, dtype="bfloat16", quant=quant, saved=path, packs=False
    )  # what the loading itself takes: packing puts matrices in the place of pages of files
    done.set()
    watcher.join()
    print(json.dumps({"highest": highest - before, "bytes": loaded_bytes(stack)}))


def tiny(checkpoint: Checkpoint) -> Any:
    """The checkpoint's config at a size that takes no memory."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 8}
    config = type(checkpoint.config)(**{**checkpoint.config.to_dict(), **small, "head_dim": 4})
    config._attn_implementation = "sdpa"
    return config


def anonymous_bytes() -> int:
    """This process's memory that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory")


def memory(checkpoint: Checkpoint, span: tuple[int, int], folder: Path, rounds: int) -> Any:
    """Anonymous memory at its highest while a span is loaded in a fresh process."""
    found: dict[str, Any] = {}
    ways = [(one, one, "") for one in FORMATS] + [("nf4 from copy", "nf4", str(folder / "copies"))]
    whole = block = 0
    for name, quant, saved in ways:
        arguments = [str(checkpoint.folder), *map(str, span), quant, saved]
        runs = [in_process(arguments) for _ in range(rounds + bool(saved))][bool(saved) :]
        highest, held = median(one["highest"] for one in runs), runs[0]["bytes"]
        whole = whole or held  # the first is the span in bfloat16
        block = block or whole // (span[1] - span[0])
        found[name] = {
            "anonymous_over_span": highest / whole,
            "beyond_result_in_blocks": (highest - held) / block,
        }
    return found


def in_process(arguments: list[str]) -> dict[str, Any]:
    """`load_once` in a fresh process."""
    command = [sys.executable, __file__, "--load", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return dict(json.loads(made.stdout))


def checks(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds per GB of the checks on reading, warm."""
    tensor = torch.zeros(GIGABYTE // 8, dtype=torch.bfloat16)
    path = folder / "gigabyte"
    path.write_bytes(bytes(GIGABYTE // 4))
    nan, copy = [], []
    for _ in range(rounds):
        nan.append(thread_ms(lambda: has_nan(tensor)) * GIGABYTE / tensor.nbytes / 1000)
        copy.append(thread_ms(lambda: checksum(path)) * 4 / 1000)
    return {"nan": median(nan), "copy": median(copy)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=Path, help="only memory, with the model in this folder")
    parser.add_argument("--load", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        load_once(*asked.load)
        return
    torch.set_num_threads(1)
    if asked.memory:
        print(json.dumps(memory(build("llama", asked.memory / "llama"), SPAN, asked.memory, 1)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = build("llama", folder / "llama")
        mixture = build("mixtral", folder / "mixtral")
        figures = {
            "dense": compare(dense, SPAN, asked.rounds),
            "mixture": compare(mixture, MIXTURE_SPAN, asked.rounds),
            "dense_starts": starts(dense, SPAN, asked.rounds, folder / "dense"),
            "whole_dense_starts": starts(dense, WHOLE, asked.rounds, folder / "whole"),
            "mixture_starts": starts(mixture, MIXTURE_SPAN, asked.rounds, folder / "mixture"),
            "dense_memory": memory(dense, SPAN, folder, 3),
            "mixture_memory": memory(mixture, MIXTURE_SPAN, folder, 3),
            "check_seconds_per_gb": checks(folder, asked.rounds),
        }
    if asked.json:
        print(json.dumps(figures, indent=1))
        return
    for part, values in figures.items():
        print(part)
        for what, value in values.items():
            print(f"  {what:24} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
