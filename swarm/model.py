"""The model a server holds a part of: where its weights lie, and what it is to others.

Imports transformers: only servers come here.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from blocks.checkpoint import Checkpoint, generation_of, model_card, open_checkpoint, small_files
from blocks.checkpoint import fingerprint as checkpoint_digest
from blocks.digest import block_digests
from blocks.errors import BlocksError
from blocks.forecast import cache_bytes_per_block_token, sketch
from blocks.hf import release
from blocks.load import Dtype, load_stack, resolve_dtype
from blocks.measure import Sizes, plan_bytes
from blocks.needed import needed_shards
from blocks.quantize import Quant
from blocks.stack import Stack
from routing.offer import Offer
from routing.placement import BlockSizes, DoesNotFit, auto_span, newcomer_span
from routing.span import Span
from swarm.errors import BadInput, PeerFault
from swarm.files import SmallFiles, fingerprint_of
from swarm.hub import HubModel, Progress, fetch_shards, plan_fetching
from swarm.model_card import ModelCard
from swarm.planning import Wanted
from swarm.record import DIGEST_BYTES, MOST_DIGESTS_BYTES

# Room for a few conversations; what is left of the memory is found after loading.
PLANNED_SESSIONS = 4
# Where a model takes more: a million tokens would leave its weights no room on most machines.
PLANNED_CONTEXT = 32_768
VALUE_BYTES = 4  # of keys, values and history at the widest


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint, and what peers need to know of it.

    The card bears the name that people know: of the folder, or of the hub. model.json among the
    files bears none, so that a fingerprint does not depend on what somebody called a folder.
    """

    checkpoint: Checkpoint
    card: ModelCard
    files: SmallFiles
    checkpoint_digest: str
    fingerprint: str
    notes: tuple[str, ...] = ()  # what its owner should know before it is served
    hub: HubModel | None = None  # where shards come from that are not here

    @property
    def hub_name(self) -> str:
        """The model's name on the hub, if it came from there."""
        return self.hub.name if self.hub else ""

    @property
    def revision(self) -> str:
        """The commit there."""
        return self.hub.commit if self.hub else ""


def describe(folder: Path, hub: HubModel | None = None) -> Description:
    """Read everything but the weights. BadInput names the file that is missing or damaged.

    Of a model of the hub the weights need not be here.
    """
    try:
        release.check()
        checkpoint = open_checkpoint(folder, hub.heads if hub else None)
        card = json.dumps(model_card(checkpoint), sort_keys=True).encode()
        digest = checkpoint_digest(checkpoint)
        files = {name: path.read_bytes() for name, path in small_files(checkpoint).items()}
        small = SmallFiles({**files, "model.json": card})
    except (BlocksError, OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    if "tokenizer.json" not in small:
        raise BadInput(
            f"{hub.name if hub else folder} has no tokenizer.json",
            next_step="choose a model with a fast tokenizer"
            if hub
            else "save the model's fast tokenizer there (save_pretrained)",
        )
    try:
        read = ModelCard.read(card)
    except PeerFault as fault:  # here the files are the user's own
        raise BadInput(f"{folder}: {fault.message}") from fault
    return Description(
        checkpoint=checkpoint,
        card=replace(read, name=hub.name if hub else folder.resolve().name),
        files=small,
        checkpoint_digest=digest,
        fingerprint=fingerprint_of(digest, small.digest),
        notes=generation_of(checkpoint).notes,
        hub=hub,
    )


def choose_span(
    wanted: Span | int | None,
    description: Description,
    offers: Sequence[Offer],
    free_bytes: int,
    sizes: Callable[[], BlockSizes],
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
        return auto_span(offers, sizes(), free_bytes, seed=seed)
    except DoesNotFit as error:
        raise BadInput(f"{description.card.name} does not fit: {error}") from error


def sizes_of(
    checkpoint: Checkpoint,
    dtype: Dtype,
    quant: Quant = "none",
    *,
    device: str = "cpu",
    cache_tokens: int | None = None,
    packs: bool = True,
) -> BlockSizes:
    """Return what each part costs, its share of cache and history included, before loading.

    `cache_tokens`: of all sessions together; by default a few conversations of the planned length.
    `packs`: as this machine would, see `plan_bytes`. BadInput for what is no model.
    """
    planned = _planned(checkpoint, dtype, quant, device=device, packs=packs)
    return BlockSizes(
        block_bytes=planned.block_bytes,
        embedding_bytes=planned.embedding_bytes + planned.other_bytes,
        head_bytes=planned.head_bytes + planned.other_bytes,
        cache_bytes_per_token=cache_bytes_per_block_token(
            checkpoint.config, resolve_dtype(checkpoint, dtype)
        ),
        history_bytes_per_token=checkpoint.hidden_size * VALUE_BYTES,
        cache_tokens=cache_tokens or PLANNED_SESSIONS * planned_context(checkpoint),
        is_tied=planned.is_tied,
    )


def planned_context(checkpoint: Checkpoint, wanted: int | None = None) -> int:
    """The tokens of one conversation to plan with: `wanted`, or what most conversations stay below;
    never more than the model takes.
    """
    return min(wanted or PLANNED_CONTEXT, checkpoint.context_length)


def _planned(checkpoint: Checkpoint, dtype: Dtype, quant: Quant, **how: Any) -> Sizes:
    try:
        return plan_bytes(checkpoint, dtype, quant, **how)
    except BlocksError as error:
        raise BadInput(str(error)) from error


def wanted_of(model: str, dtype: str, quant: str, tokens: int | None) -> Wanted:
    """Return a model to plan, from its config alone. BadInput if it has none that can be had."""
    if dtype == "auto":
        raise BadInput("--dtype auto needs the weights", next_step="choose bfloat16 or float32")
    if quant == "auto":
        raise BadInput("--quant auto needs a machine", next_step="choose none, int8 or nf4")
    try:
        drawn = sketch(Path(model).expanduser())
    except BlocksError as error:
        raise BadInput(str(error)) from error
    known = cast(Dtype, dtype)
    return Wanted(
        name=drawn.folder.resolve().name,
        dtype=dtype,
        quant=quant,
        sizes=sizes_of(drawn, known, cast(Quant, quant), cache_tokens=tokens, packs=False),
        bytes_per_token=drawn.hidden_size * resolve_dtype(drawn, known).itemsize,
    )


def weight_bytes(
    description: Description, span: Span, dtype: Dtype, quant: Quant, device: str
) -> int:
    """What the weights of a span take once loaded, ends included."""
    planned = _planned(description.checkpoint, dtype, quant, device=device)
    return planned.span_bytes(span.start, span.stop)


def fetch(
    description: Description,
    span: Span,
    *,
    disk_bytes: int | None,
    note: Callable[[str], None],
    progress: Callable[[str], Progress],
) -> None:
    """Bring here what is missing of the weights of these blocks; nothing to do for a folder.

    `disk_bytes` is the most that the model's shards may take on this disk. BadInput as
    `fetch_shards`.
    """
    checkpoint, hub = description.checkpoint, description.hub
    if hub is None or not checkpoint.absent:
        return
    try:
        wanted = needed_shards(checkpoint, span.start, span.stop)
    except BlocksError as error:
        raise BadInput(str(error)) from error
    plan = plan_fetching(hub, checkpoint.shard_bytes, wanted)
    fetch_shards(hub, plan, budget_bytes=disk_bytes, note=note, progress=progress)


def digests_of(description: Description, span: Span) -> bytes:
    """Return the digests of these blocks as a record tells them; none if they are too many.

    BadInput names a shard that cannot be read.
    """
    if len(span) * DIGEST_BYTES > MOST_DIGESTS_BYTES:
        return b""
    try:
        each = block_digests(description.checkpoint, span.start, span.stop, DIGEST_BYTES)
    except BlocksError as error:
        raise BadInput(str(error)) from error
    return b"".join(each)


def load(
    description: Description,
    span: Span,
    dtype: Dtype,
    device: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    quant: Quant = "none",
    saved: Path | None = None,
) -> Stack:
    """Load the blocks, all of whose shards must be here (see `fetch`).

    Quantized ones are kept as a copy in the folder `saved`. BadInput says what is wrong with the
    checkpoint, or that they do not fit.
    """
    try:
        return load_stack(
            description.checkpoint,
            span.start,
            span.stop,
            dtype=dtype,
            device=device,
            quant=quant,
            saved=saved,
            progress=progress,
        )
    except BlocksError as error:
        raise BadInput(str(error)) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise BadInput(
            f"blocks {span} of {description.card.name} do not fit into the memory of {device}",
            next_step="take fewer with --blocks, or a smaller --dtype or --quant",
        ) from error
