"""The model a server holds a part of: where its weights lie, and what it is to others.

Imports transformers: only servers come here.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from blocks.checkpoint import Checkpoint, model_card, open_checkpoint, small_files
from blocks.checkpoint import fingerprint as checkpoint_digest
from blocks.errors import BlocksError
from blocks.forecast import cache_bytes_per_block_token, sketch
from blocks.load import Dtype, load_stack, resolve_dtype
from blocks.measure import plan_bytes
from blocks.stack import Stack
from routing.offer import Offer
from routing.placement import BlockSizes, DoesNotFit, auto_span, newcomer_span
from routing.span import Span
from swarm.errors import BadInput, PeerFault
from swarm.files import SmallFiles, fingerprint_of
from swarm.planning import Wanted
from swarm.text import ModelCard

# Room for a few conversations of full length; what is left of the memory is found after loading.
PLANNED_SESSIONS = 4
VALUE_BYTES = 4  # of keys, values and history at the widest
WEIGHT_FILES = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint, and what peers need to know of it."""

    checkpoint: Checkpoint
    card: ModelCard
    files: SmallFiles
    checkpoint_digest: str
    fingerprint: str
    hub_name: str = ""


def describe(folder: Path, hub_name: str = "") -> Description:
    """Read everything but the weights. BadInput names the file that is missing or damaged."""
    try:
        checkpoint = open_checkpoint(folder)
        card = json.dumps(model_card(checkpoint), sort_keys=True).encode()
        digest = checkpoint_digest(checkpoint)
        files = {name: path.read_bytes() for name, path in small_files(checkpoint).items()}
        small = SmallFiles({**files, "model.json": card})
    except (BlocksError, OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    if "tokenizer.json" not in small:
        raise BadInput(
            f"{folder} has no tokenizer.json",
            next_step="save the model's fast tokenizer there (save_pretrained)",
        )
    try:
        read = ModelCard.read(card)
    except PeerFault as fault:  # here the files are the user's own
        raise BadInput(f"{folder}: {fault.message}") from fault
    return Description(
        checkpoint=checkpoint,
        card=read,
        files=small,
        checkpoint_digest=digest,
        fingerprint=fingerprint_of(digest, small.digest),
        hub_name=hub_name,
    )


def download(name: str) -> Path:
    """Return the folder of a hub model, fetched if it is not here yet. BadInput if it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=WEIGHT_FILES))
    except HFValidationError as error:
        raise BadInput(f"{name} is neither a folder nor a hub name") from error
    except (HfHubHTTPError, OSError) as error:  # not in the cache counts as the latter
        is_offline = os.environ.get("HF_HUB_OFFLINE")
        raise BadInput(
            f"{name} is neither a folder here nor could it be had from the hub",
            next_step="unset HF_HUB_OFFLINE" if is_offline else "check the name and the network",
        ) from error


def choose_span(
    wanted: Span | int | None,
    description: Description,
    offers: Sequence[Offer],
    free_bytes: int,
    dtype: Dtype,
    seed: int,
) -> Span:
    """Return the blocks to hold. BadInput if they do not exist or, where the choice is ours, none
    fits into `free_bytes`: blocks that the user names, or counts, are the user's own risk.
    """
    blocks = description.card.blocks
    if isinstance(wanted, Span):
        if wanted.stop > blocks:
            raise BadInput(
                f"{description.card.name} has blocks 0:{blocks}, not {wanted}",
                next_step="choose --blocks within them",
            )
        return wanted
    if isinstance(wanted, int):
        return newcomer_span(offers, blocks, wanted, seed=seed)
    try:
        return auto_span(offers, sizes_of(description.checkpoint, dtype), free_bytes, seed=seed)
    except DoesNotFit as error:
        raise BadInput(f"{description.card.name} does not fit: {error}") from error


def sizes_of(
    checkpoint: Checkpoint, dtype: Dtype, *, cache_tokens: int | None = None
) -> BlockSizes:
    """Return what each part costs, its share of cache and history included, before loading.

    `cache_tokens`: of all sessions together; by default a few conversations of full length.
    """
    planned = plan_bytes(checkpoint, dtype)
    return BlockSizes(
        block_bytes=planned.block_bytes,
        embedding_bytes=planned.embedding_bytes + planned.other_bytes,
        head_bytes=planned.head_bytes + planned.other_bytes,
        cache_bytes_per_token=cache_bytes_per_block_token(
            checkpoint.config, resolve_dtype(checkpoint, dtype)
        ),
        history_bytes_per_token=checkpoint.hidden_size * VALUE_BYTES,
        cache_tokens=cache_tokens or PLANNED_SESSIONS * checkpoint.context_length,
        is_tied=planned.is_tied,
    )


def wanted_of(model: str, dtype: str, tokens: int | None) -> Wanted:
    """Return a model to plan, from its config alone. BadInput if it has none that can be had."""
    if dtype == "auto":
        raise BadInput("--dtype auto needs the weights", next_step="choose bfloat16 or float32")
    try:
        drawn = sketch(Path(model).expanduser())
    except BlocksError as error:
        raise BadInput(str(error)) from error
    known = cast(Dtype, dtype)
    return Wanted(
        name=drawn.folder.resolve().name,
        dtype=dtype,
        quant="none",
        sizes=sizes_of(drawn, known, cache_tokens=tokens),
        bytes_per_token=drawn.hidden_size * resolve_dtype(drawn, known).itemsize,
    )


def weight_bytes(description: Description, span: Span, dtype: Dtype) -> int:
    """What the weights of a span take once loaded, ends included."""
    return plan_bytes(description.checkpoint, dtype).span_bytes(span.start, span.stop)


def load(
    description: Description,
    span: Span,
    dtype: Dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> Stack:
    """Load the blocks. BadInput says what is wrong with the checkpoint, or that they do not fit."""
    try:
        return load_stack(
            description.checkpoint,
            span.start,
            span.stop,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    except BlocksError as error:
        raise BadInput(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BadInput(
            f"blocks {span} of {description.card.name} do not fit into the memory of {device}",
            next_step="take fewer with --blocks, or a smaller --dtype",
        ) from error
