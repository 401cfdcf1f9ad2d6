"""The demo model's card: what it is, how it came about, and what it says.

1. Every output is made from the weights given, never copied from elsewhere.
2. The same weights give the same card: sampling is seeded.
"""

from collections.abc import Mapping, Sequence

import torch
from demo_text import longest_copied_run
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

NEW_TOKENS = 80
PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a little dog named",
    "One day, a boy named Tom found a",
    "Lily wanted to",
    "The sun was shining and the birds",
    '"Can I play with you?" asked the',
    "Mom said,",
    "There was a big red ball in the",
    "The cat was sad because",
    "They all laughed and",
)
GREEDY: Mapping[str, object] = {"do_sample": False}
SAMPLED: Mapping[str, object] = {"do_sample": True, "temperature": 0.8, "top_k": 40}

CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# The demo model

A Llama of {parameters:,} parameters that tells simple English stories. It is there so that a swarm
can be tried without a download; it knows nothing, and nobody should rely on a word of it.
`scripts/train_demo.py` made this folder, this page included; `docs/demo-model.md` says why.

- **Weights**: Apache-2.0, trained from nothing; no other model's outputs or weights, except that
  the stories themselves were written by one.
- **Text**: {stories:,} stories ({characters:,} characters) of TinyStories (Eldan and Li, 2023),
  licence CDLA-Sharing-1.0, quotes and dashes made plain ASCII; {held:,} of them held out. The text
  itself is not shipped.
- **Architecture**: LlamaForCausalLM, {blocks} blocks of {hidden} hidden, FFN {ffn}, {heads} heads
  of {head_dim}, {key_heads} for keys and values, tied head, context {context} tokens; bfloat16 in
  two shards.
- **Tokenizer**: byte-level BPE of {vocabulary:,} tokens, trained on the training stories;
  `<|endoftext|>` begins a text and ends it.
- **Training**: {steps:,} steps, {tokens:,} tokens ({epochs:.1f} epochs), {seconds:,.0f} seconds,
  {threads} threads on CPU, bfloat16 autocast, Muon and AdamW. {note}
- **Loss**, nats per token: held out {held_out_loss:.3f} (of the weights saved here), training
  {train_loss:.3f} (with dropout, over the steps before). Saved is step {best_step:,}, the best.

```
{command}
```

## Greedy

{greedy}

## Sampled

Temperature 0.8, top 40; torch's seed is the number in front.

{sampled}
"""


def continuation(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, how: Mapping[str, object], seed: int
) -> str:
    """Return what `model` adds to `prompt`, at most `NEW_TOKENS` tokens, special ones skipped."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    torch.manual_seed(seed)
    told = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **how
    )
    return str(tokenizer.decode(told[0, ids.shape[1] :].tolist()))


def outputs(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    how: Mapping[str, object],
) -> str:
    """Return the card's part with one output per prompt, and the longest run they copied."""
    told = [
        continuation(model, tokenizer, prompt, how, seed) for seed, prompt in enumerate(PROMPTS)
    ]
    texts = [prompt + more for prompt, more in zip(PROMPTS, told, strict=True)]
    copied = max(
        (longest_copied_run(text, sources) for text in texts), key=lambda run: len(run.split())
    )
    lines = [
        f"{seed}. **{prompt}**{more}".replace("\n", " / ")
        for seed, (prompt, more) in enumerate(zip(PROMPTS, told, strict=True))
    ]
    length = len(copied.split())
    verdict = f"Longest run copied from the training text: {length} words, *{copied}*"
    return "\n".join([*lines, "", verdict])


def card(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    facts: Mapping[str, object],
) -> str:
    """Return the page. `facts` fills what the model's config does not say; see `CARD`."""
    config = model.config
    return CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()),
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        key_heads=config.num_key_value_heads,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        greedy=outputs(model, tokenizer, sources, GREEDY),
        sampled=outputs(model, tokenizer, sources, SAMPLED),
        **facts,
    )
