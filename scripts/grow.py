#!/usr/bin/env python3
"""Grow a small Llama checkpoint into another shape that computes the same function.

    python scripts/grow.py swarm/demo /tmp/grown --width 4 --layers 10

makes 10 blocks of 1024 hidden out of the demo's 8 blocks of 256. The grown model writes the same
English, costs what a model of its shape costs, and almost any wrong block, order or position in
it changes the text: what benches and demonstrations need and random weights don't give.

1. In exact arithmetic the grown model has the same logits as its source, at every position. What
   differs is rounding: none is added in the weights when the width factor is a power of two and
   the head factor a power of four; the sums in a forward pass are longer and round otherwise.
2. A tied head stays tied, an untied one stays untied, biases are kept.
3. One block of the result is in memory at a time, and one shard on its way to the disk.

Each transformation says in its docstring why it keeps the function. They commute, and are applied
in this order: blocks are planned (`split`, `deepen`), then each is given wider heads, then a wider
residual stream.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]
Part = Literal["whole", "attention", "mlp", "nothing"]

SHARD_BYTES = 1_000_000_000
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Rotary tables whose frequency at a pair depends on nothing but the plain frequency at that pair.
KNOWN_ROTARY = {"default", "linear", "llama3"}


class Planned(NamedTuple):
    """One block to be: the source block whose weights it takes, and what of it may act."""

    source: int
    part: Part


# --- depth -----------------------------------------------------------------------------------


def evenly(count: int, among: int) -> list[int]:
    """Return how many of `count` things each of `among` places gets, spread evenly."""
    return [(place + 1) * count // among - place * count // among for place in range(among)]


def split(plan: Iterable[Planned], times: Iterable[int]) -> list[Planned]:
    """Return the plan with the blocks whose `times` is 1 made two: attention, then MLP.

    A block adds its attention to the stream, and then its MLP of the sum. With the MLP silenced in
    the first and the attention in the second, the two blocks do the same two additions in turn.
    """
    halves: list[Planned] = []
    for block, time in zip(plan, times, strict=True):
        parts: tuple[Part, ...] = ("attention", "mlp") if time else (block.part,)
        halves += [Planned(block.source, part) for part in parts]
    return halves


def deepen(plan: Iterable[Planned], more: Iterable[int]) -> list[Planned]:
    """Return the plan with as many idle blocks behind each block as `more` says.

    A silenced block adds zero to the stream: whatever reads the stream later sees the same. It has
    the weights of the block before it, so it costs as much and fills its cache with real values.
    """
    longer: list[Planned] = []
    for block, count in zip(plan, more, strict=True):
        longer += [block, *[Planned(block.source, "nothing")] * count]
    return longer


def planned(blocks: int, *, halve: bool, more: int, total: int | None) -> list[Planned]:
    """Return the blocks of the result in order.

    `halve` splits every block; `more` idle blocks follow. `total` instead reaches that many
    blocks, by splitting as far as that goes, so that as many blocks as possible matter.

    Raises ValueError if `total` is below `blocks`: nothing here makes a model smaller.
    """
    plan = [Planned(block, "whole") for block in range(blocks)]
    if total is None:
        halved = blocks if halve else 0
    elif total < blocks:
        raise ValueError(f"{blocks} blocks cannot become {total}: models only grow here")
    else:
        halved = min(blocks, total - blocks)
        more = total - blocks - halved
    plan = split(plan, evenly(halved, blocks))
    return deepen(plan, evenly(more, len(plan)))


def silenced(block: Weights, part: Part) -> Weights:
    """Return the block with the projections back into the stream zeroed, but for `part`'s."""
    mute = {"whole": (), "attention": ("mlp.down_proj.",), "mlp": ("self_attn.o_proj.",)}.get(
        part, ("mlp.down_proj.", "self_attn.o_proj.")
    )
    return {
        name: torch.zeros_like(weight) if name.startswith(mute) else weight
        for name, weight in block.items()
    }


# --- heads -----------------------------------------------------------------------------------


def widen_heads(block: Weights, old: int, factor: int) -> Weights:
    """Return the block with heads `factor` times as wide.

    Rotation turns the pair (i, i + old/2) of a head by the frequency theta ** (-2i / old). In a
    head of old * factor, pair i * factor has that frequency. The old entries go there, zeros
    everywhere else: query times key is the same sum. Attention divides it by the root of the
    head's width, so the queries grow by the root of `factor`.
    """
    if factor == 1:
        return block
    pairs = torch.arange(old // 2) * factor
    places = torch.cat([pairs, pairs + old * factor // 2])

    def spread(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(rows.shape[0] // old, old, *rows.shape[1:])
        wide = rows.new_zeros(heads.shape[0], old * factor, *rows.shape[1:])
        wide[:, places] = heads
        return wide.flatten(0, 1)

    grown = dict(block)
    for name, weight in block.items():
        if name.startswith("self_attn.q_proj."):
            grown[name] = spread(weight) * factor**0.5
        elif name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            grown[name] = spread(weight)
        elif name == "self_attn.o_proj.weight":
            grown[name] = spread(weight.T).T
    return grown


# --- width -----------------------------------------------------------------------------------


def repeat(weight: torch.Tensor, factor: int, *axes: int) -> torch.Tensor:
    """Return `weight` repeated `factor` times along each of `axes`."""
    return weight.repeat([factor if axis in axes else 1 for axis in range(weight.dim())])


def widen_block(block: Weights, factor: int) -> Weights:
    """Return the block for a residual stream that holds `factor` equal copies of the old one.

    Copies have the old mean square, so RMSNorm, its weight repeated, gives copies of its old
    output. What reads the stream sums over `factor` copies: its columns are divided by it. What
    writes to the stream writes every copy: its rows are repeated. The FFN becomes wider in the
    same way: its inner values are copies, and down_proj reads them as such.
    """
    grown: Weights = {}
    for name, weight in block.items():
        if weight.dim() == 1:  # norms; biases of what stays as wide as it was
            inner = name.startswith(("self_attn.q", "self_attn.k", "self_attn.v"))
            grown[name] = weight if inner else repeat(weight, factor, 0)
        elif name.startswith("self_attn.o_proj."):
            grown[name] = repeat(weight, factor, 0)
        elif name.startswith("self_attn."):
            grown[name] = repeat(weight, factor, 1) / factor
        else:
            grown[name] = repeat(weight, factor, 0, 1) / factor
    return grown


def widen_ends(ends: Weights, factor: int) -> Weights:
    """Return embedding, final norm and head for `factor` copies of the stream.

    The head sums over the copies. Instead of its columns the final norm's weight is divided, for
    nothing else reads it: so a head tied to the embedding, which must write plain copies, can stay
    tied.
    """
    grown = {
        name: repeat(weight, factor, weight.dim() - 1)  # the norm's only axis, the others' columns
        for name, weight in ends.items()
    }
    grown["model.norm.weight"] /= factor
    return grown


# --- files -----------------------------------------------------------------------------------


class Source:
    """A checkpoint folder, read tensor by tensor as float32."""

    def __init__(self, folder: Path) -> None:
        """Read config and tensor names; raise ValueError for what is no Llama in safetensors."""
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if self.config.get("model_type") != "llama":
            raise ValueError(f"{folder} holds a {self.config.get('model_type')}, not a llama")
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as shard:
                self._file_of |= dict.fromkeys(shard.keys(), file)
        if not self._file_of:
            raise ValueError(f"{folder} has no .safetensors file")
        self.blocks = int(self.config["num_hidden_layers"])
        self.head_dim = int(
            self.config.get("head_dim")
            or self.config["hidden_size"] // self.config["num_attention_heads"]
        )

    @property
    def dtype(self) -> str:
        """The dtype that the config names; older configs call it otherwise."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], "pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor.float()

    def block(self, number: int) -> Weights:
        """Return the weights of one block, named within it."""
        start = f"model.layers.{number}."
        names = (name for name in self._file_of if name.startswith(start))
        return {
            name.removeprefix(start): self._tensor(name)
            for name in names
            if "rotary_emb" not in name  # a table that old checkpoints carried along
        }

    def ends(self) -> Weights:
        """Return embedding, final norm and, if it is not tied, the head."""
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        if not self.config.get("tie_word_embeddings", False):
            names.append("lm_head.weight")
        return {name: self._tensor(name) for name in names}


def grown_weights(
    source: Source, plan: Iterable[Planned], width: int, heads: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the result in float32, block by block; `heads` is a factor."""
    yield from widen_ends(source.ends(), width).items()
    for number, (origin, part) in enumerate(plan):
        block = widen_heads(silenced(source.block(origin), part), source.head_dim, heads)
        for name, weight in widen_block(block, width).items():
            yield f"model.layers.{number}.{name}", weight


def grown_config(source: Source, blocks: int, width: int, heads: int, dtype: str) -> dict[str, Any]:
    """Return the source's config in the new shape.

    Raises ValueError if wider heads would change the frequencies of this model's rotary table.
    """
    config = dict(source.config)
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type") or rotary.get("type") or "default"
    if heads > 1 and kind not in KNOWN_ROTARY:
        raise ValueError(f"a head of rotary type {kind} cannot be widened: leave --head-dim out")
    config.pop("torch_dtype", None)
    config |= {
        "hidden_size": config["hidden_size"] * width,
        "intermediate_size": config["intermediate_size"] * width,
        "num_hidden_layers": blocks,
        "head_dim": source.head_dim * heads,
        "dtype": dtype,
    }
    return config


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], out: Path, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write model.safetensors, or shards with an index if it takes more; return all bytes.

    A shard holds at most `shard_bytes`, unless one tensor alone is larger.
    """
    shards: list[Path] = []
    names: list[list[str]] = []
    total = held_bytes = 0
    held: Weights = {}

    def flush() -> None:
        shards.append(out / f"model-{len(shards) + 1:05}.part")
        save_file(held, shards[-1], {"format": "pt"})
        shards[-1].chmod(0o644)  # safetensors writes them for their owner alone
        names.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    name_shards(out, shards, names, total)
    return total


def name_shards(out: Path, shards: list[Path], names: list[list[str]], total: int) -> None:
    """Give the shards their last names, which say how many they are, and write the index."""
    if len(shards) == 1:
        shards[0].rename(out / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (shard, inside) in enumerate(zip(shards, names, strict=True), start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.rename(out / name)
        weight_map |= dict.fromkeys(inside, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def grow(
    folder: Path,
    out: Path,
    *,
    width: int = 1,
    head_dim: int | None = None,
    halve: bool = False,
    more: int = 0,
    total: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Mapping[str, Any]:
    """Write the grown checkpoint of `folder` to `out`, which must be new; return its config.

    `width` is a factor, `head_dim` the new width of a head, a multiple of the old one; `halve`,
    `more` and `total` as in `planned`; `dtype` is torch's name of one, the source's by default.
    Raises ValueError for a shape that cannot be reached, FileExistsError if `out` exists.
    """
    source = Source(folder)
    heads, rest = divmod(head_dim or source.head_dim, source.head_dim)
    if rest or heads < 1 or width < 1 or more < 0:
        raise ValueError(
            f"the width factor is 1 or more, and a head is a multiple of {source.head_dim}"
        )
    kind = getattr(torch, dtype or source.dtype)
    plan = planned(source.blocks, halve=halve, more=more, total=total)
    config = grown_config(source, len(plan), width, heads, dtype or source.dtype)
    out.mkdir(parents=True)
    weights = grown_weights(source, plan, width, heads)
    write_shards(((name, weight.to(kind)) for name, weight in weights), out, shard_bytes)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return config


def main() -> None:
    """Read the command line and grow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a folder with a small Llama")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--width", type=int, default=1, metavar="K", help="hidden and FFN times K")
    parser.add_argument("--head-dim", type=int, metavar="D", help="a multiple of the source's")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--layers", type=int, dest="total", metavar="N", help="reach N blocks")
    depth.add_argument("--deepen", type=int, dest="more", default=0, metavar="N",
                       help="add N idle blocks")  # fmt: skip
    depth.add_argument("--split", action="store_true", dest="halve", help="make each block two")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    asked = vars(parser.parse_args())
    try:
        config = grow(asked.pop("source"), asked.pop("out"), **asked)
    except (ValueError, OSError) as problem:
        raise SystemExit(f"grow: {problem}") from problem
    print(f"{config['num_hidden_layers']} blocks of {config['hidden_size']} hidden")


if __name__ == "__main__":
    main()
