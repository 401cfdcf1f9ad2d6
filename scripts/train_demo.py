#!/usr/bin/env python3
"""Train the demo model: a small Llama that tells simple stories, small enough to ship with us.

    python scripts/train_demo.py --data FOLDER --minutes 50

reads FOLDER/tinystories-*.txt and writes a whole Transformers folder with a card (README.md).

1. The same data, `--seed`, `--steps` and `--threads` give the same weights. With `--minutes` alone
   the schedule follows the clock, and no two runs are alike.
2. Held-out stories are whole and train nothing: neither the weights nor the tokenizer.
3. What lies in the folder is the checkpoint of the lowest held-out loss so far; the card comes
   last, and every figure and text in it is measured on the saved bfloat16 weights.
4. The folder holds two shards with an index, so that the demo shows loading by parts, and never
   more than `MOST_BYTES`.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_card import card
from demo_text import END_OF_TEXT, hold_out, read_stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 2048
END = 0  # the id of `<|endoftext|>`: special tokens come first
CONTEXT = 512  # tokens; most stories have 150 to 300
MOST_BYTES = 8_000_000
ADAM_SHARE = 0.15  # of the matrices' rate: Muon's steps have a fixed size, Adam's are per weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. One of `steps` and `minutes` ends the training; `steps` wins."""

    steps: int | None = None
    minutes: float = 50.0
    seed: int = 0
    threads: int = 2
    batch: int = 4  # windows of `context` tokens per step
    context: int = CONTEXT
    peak: float = 0.02  # the highest learning rate of the blocks' matrices
    decay: float = 0.1  # weight decay, of matrices only
    dropout: float = 0.05  # on the embedding and on what each block adds: the corpus is small
    every: int = 100  # steps between two looks at the held-out stories

    def progress(self, report: "Report") -> float:
        """Return the share of the training that is behind us, by steps or by the clock."""
        if self.steps is None:
            return report.seconds / (60.0 * self.minutes)
        return report.steps / self.steps

    def command(self) -> str:
        """Return the command that trains like this; the data's folder is left open."""
        length = f"--minutes {self.minutes:g}" if self.steps is None else f"--steps {self.steps}"
        return (
            f"python scripts/train_demo.py --data FOLDER {length} --seed {self.seed} "
            f"--threads {self.threads} --batch {self.batch} --peak {self.peak:g} "
            f"--decay {self.decay:g} --dropout {self.dropout:g} --every {self.every}"
        )


@dataclass(slots=True)
class Report:
    """What came of a training. Losses are nats per token."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    train_loss: float = math.inf  # mean over the steps before the best look, with dropout
    held_out_loss: float = math.inf  # at the best look

    def noted(self, train_loss: float, held_out_loss: float) -> bool:
        """Print a look at the held-out stories, and say whether it is the best so far."""
        print(
            f"{self.seconds:6.0f} s  step {self.steps:6}  {self.tokens:9} tokens  "
            f"train {train_loss:.4f}  held out {held_out_loss:.4f}",
            flush=True,
        )
        if held_out_loss >= self.held_out_loss:
            return False
        self.best_step = self.steps
        self.train_loss, self.held_out_loss = train_loss, held_out_loss
        return True


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(stories: Sequence[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Return a byte-level BPE that begins each text with `<|endoftext|>`, as in training.

    Any text is encoded, and comes back exactly: there is no normalizer and no unknown token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, END)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, stories: Sequence[str]) -> list[list[int]]:
    """Return each story's ids, `<|endoftext|>` first."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(stories))]


def windows(encoded: Sequence[Sequence[int]], context: int) -> torch.Tensor:
    """Return the stories on one string, cut into int64 [windows, context + 1].

    Neighbours share one token: the last target of one is the first input of the next. The rest
    that fills no window is left out.
    """
    ids = torch.tensor([token for story in encoded for token in story])
    if len(ids) <= context:
        raise ValueError(f"{len(ids)} tokens do not fill one window of {context}")
    return ids.unfold(0, context + 1, context)


def batches(
    encoded: Sequence[Sequence[int]], *, batch: int, context: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, context + 1] for ever; each epoch strings the stories up anew."""
    order = random.Random(seed)
    stories = list(encoded)
    while True:
        order.shuffle(stories)
        cut = windows(stories, context)
        cut = cut[torch.tensor(order.sample(range(len(cut)), len(cut)))]
        yield from (cut[i : i + batch] for i in range(0, max(1, len(cut) - batch + 1), batch))


# --- training --------------------------------------------------------------------------------


def learning_rate(progress: float, peak: float, warm_up: float = 0.03) -> float:
    """Return the rate at `progress` (0 to 1): linear up to `peak`, then a cosine down to 0."""
    if progress < warm_up:
        return peak * progress / warm_up
    turned = math.pi * min(1.0, (progress - warm_up) / (1.0 - warm_up))
    return peak * (1.0 + math.cos(turned)) / 2.0


def new_model(*, vocabulary: int = VOCABULARY, hidden: int = 256) -> LlamaForCausalLM:
    """Return the untrained demo model; 256 divides 1024 and more, which `grow.py` likes."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 9 // 8,  # narrow, so that 8 blocks fit into 8 MB
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
        attn_implementation="eager",  # the fastest way back on CPU at this size
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.model.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)  # each block begins by adding nothing
        elif weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop `share` of the embedding and of what each block adds, while the model trains."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, share, training=module.training)

    places = [model.model.embed_tokens]
    for block in model.model.layers:
        places += [block.self_attn.o_proj, block.mlp.down_proj]
    for place in places:
        place.register_forward_hook(drop)


def loss_of(model: LlamaForCausalLM, cut: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over windows int64 [N, context + 1], computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=cut[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), cut[:, 1:].flatten())


def mean_loss(model: LlamaForCausalLM, cut: torch.Tensor, batch: int) -> float:
    """Return the loss over all windows of `cut`, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        sums = [loss_of(model, part).item() * len(part) for part in cut.split(batch)]
    model.train(was_training)
    return math.fsum(sums) / len(cut)


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embedding and norms.

    On this text AdamW alone needs five times the tokens to the loss that Muon reaches in the
    first 150 steps. Each group's highest rate is under "peak"; norms don't decay.
    """
    blocks = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    words = {"params": [model.model.embed_tokens.weight], "weight_decay": recipe.decay}
    rest = [words, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.Muon([{"params": blocks, "peak": recipe.peak}], weight_decay=recipe.decay),
        torch.optim.AdamW(
            [{**group, "peak": recipe.peak * ADAM_SHARE} for group in rest],
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def train(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    held_out: torch.Tensor,
    recipe: Recipe,
    keep: Callable[[], None],
) -> Report:
    """Train until the recipe's end; `keep` is called whenever the held-out loss is the lowest."""
    optimizers = optimizers_for(model, recipe)
    report, losses, began = Report(), list[float](), time.monotonic()
    model.train()
    while True:
        report.seconds = time.monotonic() - began
        progress = recipe.progress(report)
        if losses and (progress >= 1.0 or len(losses) == recipe.every):
            held_out_loss = mean_loss(model, held_out, recipe.batch)
            if report.noted(sum(losses) / len(losses), held_out_loss):
                keep()
            losses.clear()
        if progress >= 1.0:
            return report
        cut = next(data)
        loss = loss_of(model, cut)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, group["peak"])
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        report.steps, report.tokens = report.steps + 1, report.tokens + cut[:, 1:].numel()


# --- what is written -------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write weights (bfloat16, two shards), configs and tokenizer; `model` stays as it is."""
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**{**model.config.to_dict(), "dtype": "bfloat16"})
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    copy.generation_config = GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=END)
    sizes = [weight.numel() * 2 for weight in copy.parameters()]
    copy.save_pretrained(out, max_shard_size=sum(sizes) // 2 + max(sizes))  # surely two shards
    tokenizer.save(str(out / "tokenizer.json"))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes them for their owner alone
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if size > MOST_BYTES:
        raise SystemExit(f"The weights in {out} take {size} bytes, more than {MOST_BYTES}.")


def facts_for_card(
    report: Report, recipe: Recipe, training: Sequence[str], held: Sequence[str], epoch_tokens: int
) -> dict[str, object]:
    """Return what the card says about text and training."""
    return {
        "stories": len(training) + len(held),
        "held": len(held),
        "characters": sum(map(len, training)) + sum(map(len, held)),
        "steps": report.steps,
        "best_step": report.best_step,
        "tokens": report.tokens,
        "epochs": report.tokens / epoch_tokens,
        "seconds": report.seconds,
        "threads": recipe.threads,
        "train_loss": report.train_loss,
        "command": recipe.command(),
    }


def run(data: Path, out: Path, recipe: Recipe, note: str) -> Report:
    """Train on the stories in `data` and fill `out`."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    training, held = hold_out(read_stories(data), recipe.seed)
    tokenizer = train_tokenizer(training)
    encoded = encode(tokenizer, training)
    stream = batches(encoded, batch=recipe.batch, context=recipe.context, seed=recipe.seed)
    held_out = windows(encode(tokenizer, held), recipe.context)
    model = new_model()
    add_dropout(model, recipe.dropout)
    report = train(model, stream, held_out, recipe, lambda: save(model, tokenizer, out))
    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    facts = facts_for_card(report, recipe, training, held, sum(map(len, encoded)))
    facts |= {"note": note, "held_out_loss": mean_loss(saved, held_out, recipe.batch)}
    page = card(saved, tokenizer, training, facts)
    (out / "README.md").write_text(page, encoding="utf-8")
    return report


def main() -> None:
    """Read the command line and train."""
    usual = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of tinystories-*.txt")
    parser.add_argument("--out", type=Path, default=Path("swarm/demo"))
    parser.add_argument("--steps", type=int, help="steps to train; else --minutes")
    parser.add_argument("--minutes", type=float, default=usual.minutes)
    parser.add_argument("--note", default="", help="a sentence for the card about the machine")
    for name in ("seed", "threads", "batch", "every"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    for name in ("peak", "decay", "dropout"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name))
    asked = vars(parser.parse_args())
    data, out, note = asked.pop("data"), asked.pop("out"), asked.pop("note")
    print(run(data, out, Recipe(**asked), note))


if __name__ == "__main__":
    main()
