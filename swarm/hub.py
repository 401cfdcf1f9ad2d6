"""A model of the hub: first what it is, then the shards of one span and no others.

1. A model is one commit. Its small files, its index and the heads of its shards are fetched, no
   weights, before anybody chooses blocks.
2. How much a span takes is said, and held against the disk and the budget, before its first byte.
3. What is here is not fetched again: once all is here, nothing needs a network. With one, a start
   asks which commit the name stands for now.
4. Whatever goes wrong is BadInput: one sentence that names the model, and the next step.

A download that breaks off is taken up where it stopped as long as this process runs; after that
whole shards are kept, a part of one is not. All of this blocks: call it from a thread.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    cached_assets_path,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not declared
    build_hf_headers,
    hf_raise_for_status,
    tqdm,
)

from blocks.checkpoint import INDEX_FILE, SINGLE_FILE, SMALL_FILES, head_bytes, shard_names
from blocks.errors import CheckpointError
from swarm.errors import BadInput

# One request has the head of nearly every shard, and little more.
HEAD_GUESS_BYTES = 100_000
# A disk filled to the last byte serves nobody.
SPARE_BYTES = 1 << 30

Progress = Callable[[int, int], None]

# The library has changed its HTTP library once: the root of its errors is that of its own error.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BEFORE_WEIGHTS = (*SMALL_FILES, INDEX_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """One commit of a hub model, and where of it lies what is here."""

    name: str
    commit: str
    folder: Path  # the library's snapshot: files and shards, as they come
    heads: Path  # the head of each shard, under the shard's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """What has yet to come for a span. Sizes are bytes."""

    sizes: Mapping[str, int]  # of the shards that are not here, in the order to fetch them
    here_bytes: int  # of all shards of the model that are here

    @property
    def byte_count(self) -> int:
        """All that has yet to come."""
        return sum(self.sizes.values())


def find_model(name: str, commit: str = "") -> HubModel:
    """Return the model of this name, with all that describes it here, and no weights fetched.

    `commit` is 40 hex digits; without it, what the name stands for now. BadInput if there is no
    such model, if it cannot be reached, or if it is no safetensors model.
    """
    if commit and not _COMMIT.fullmatch(commit):
        raise BadInput(f"{commit} is no commit of {name}", next_step="give its 40 hex digits")
    with _told(name, "config.json"):
        # Asked for by branch, the library notes its commit for a start without network.
        config = hf_hub_download(name, "config.json", revision=commit or None, tqdm_class=_silent())
        folder = Path(config).parent
        heads = cached_assets_path(
            "swarm", namespace=name, subfolder="heads", assets_dir=constants.HF_ASSETS_CACHE
        )
    model = HubModel(name=name, commit=folder.name, folder=folder, heads=heads / folder.name)
    for file in _BEFORE_WEIGHTS:
        _fetch_small(model, file)
    try:
        shards = shard_names(folder)
    except CheckpointError as error:
        raise BadInput(str(error)) from error
    if shards != (SINGLE_FILE,) and _has_whole(model, shards):
        shards = (SINGLE_FILE,)
    for shard in shards:
        if not _is_here(model, shard):
            _fetch_head(model, shard)
    return model


def plan_fetching(
    model: HubModel, shard_bytes: Mapping[str, int], wanted: Sequence[str]
) -> Fetching:
    """What has yet to come before the shards `wanted` are here, of a model of these shards."""
    here = {shard for shard in shard_bytes if (model.folder / shard).is_file()}
    return Fetching(
        sizes={shard: shard_bytes[shard] for shard in wanted if shard not in here},
        here_bytes=sum(shard_bytes[shard] for shard in here),
    )


def refuse_too_much(name: str, plan: Fetching, free_bytes: int, budget_bytes: int | None) -> None:
    """BadInput if the disk or the budget has no room for it.

    The budget is for all shards of the model together, those that are here already among them.
    """
    if plan.byte_count + SPARE_BYTES > free_bytes:
        raise BadInput(
            f"{name} needs {in_words(plan.byte_count)} of disk for these blocks, and "
            f"{in_words(free_bytes)} are free",
            next_step="free some, set HF_HOME to a larger disk, or take fewer with --blocks",
        )
    if budget_bytes is not None and plan.byte_count + plan.here_bytes > budget_bytes:
        raise BadInput(
            f"{name} needs {in_words(plan.byte_count)} of disk for these blocks beside the "
            f"{in_words(plan.here_bytes)} that are here, and the budget is "
            f"{in_words(budget_bytes)}",
            next_step="give more with --disk, or take fewer with --blocks",
        )


def fetch_shards(
    model: HubModel,
    plan: Fetching,
    *,
    budget_bytes: int | None,
    note: Callable[[str], None],
    progress: Callable[[str], Progress],
) -> None:
    """Fetch the shards one after the other, told to `note` before and to `progress` while it runs.

    BadInput before any byte if they do not fit, or when the fetching breaks off: what came is kept.
    """
    if not plan.sizes:
        return
    _refuse_offline(model, plan)
    free_bytes = shutil.disk_usage(model.folder).free
    refuse_too_much(model.name, plan, free_bytes, budget_bytes)
    total = plan.byte_count
    note(
        f"fetching {len(plan.sizes)} shards of {model.name}, {in_words(total)}, "
        f"to {model.folder} ({in_words(free_bytes)} free)"
    )
    tell = progress(f"fetching {model.name}")
    done = 0
    for shard, byte_count in plan.sizes.items():
        bar = _telling(tell, done, min(done + byte_count, total - 1), total)
        with _told(model.name, shard):
            hf_hub_download(model.name, shard, revision=model.commit, tqdm_class=bar)
        done += byte_count
        tell(done, total)


def commit_in(text: str) -> str:
    """The commit that a peer names, or nothing if it is none: the library makes paths of it."""
    return text if _COMMIT.fullmatch(text) else ""


def in_words(byte_count: int) -> str:
    """Bytes as people say them, in the units of --memory and --disk: "1.5 GB"."""
    amount, unit = float(byte_count), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{byte_count} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"


def _fetch_small(model: HubModel, file: str) -> None:
    """Fetch a file, if the model has it and it is not here; the library notes those it has not."""
    if try_to_load_from_cache(model.name, file, revision=model.commit) is not None:
        return
    with _told(model.name, file):
        try:
            hf_hub_download(model.name, file, revision=model.commit, tqdm_class=_silent())
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # nobody could be asked
                raise


def _has_whole(model: HubModel, indexed: Sequence[str]) -> bool:
    """Has the hub one file of all weights, too? It comes before an index, as in transformers.

    Nobody is asked once the heads of those that the index names are here.
    """
    if _is_here(model, SINGLE_FILE):
        return True
    if all(_is_here(model, shard) for shard in indexed):
        return False
    try:
        _fetch_head(model, SINGLE_FILE)
    except BadInput as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return False
        raise
    return True


def _is_here(model: HubModel, shard: str) -> bool:
    """Is the shard here, or its head?"""
    return (model.folder / shard).is_file() or _is_whole(model.heads / shard)


def _is_whole(head: Path) -> bool:
    """Is the head here as it was written? A machine that lost its power may have kept a part."""
    try:
        with head.open("rb") as file:
            return head_bytes(file.read(8)) == head.stat().st_size
    except (OSError, CheckpointError):
        return False


def _fetch_head(model: HubModel, shard: str) -> None:
    """Fetch the first bytes of a shard, up to where its tensors begin."""
    with _told(model.name, shard):
        data = _beginning(model, shard, HEAD_GUESS_BYTES)
        count = head_bytes(data)
        if count > len(data):
            data = _beginning(model, shard, count)
        if count > len(data):
            raise CheckpointError(f"shard {shard} of {model.name} ends within its header")
        model.heads.mkdir(parents=True, exist_ok=True)
        part = model.heads / f"{shard}.{os.getpid()}.part"
        part.write_bytes(data[:count])
        part.replace(model.heads / shard)


def _beginning(model: HubModel, shard: str, byte_count: int) -> bytes:
    """The first bytes of a shard, or all of a shorter one."""
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(shard)
    headers = build_hf_headers() | {
        "Range": f"bytes=0-{byte_count - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(model.name, shard, revision=model.commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= byte_count:  # a server without ranges sends on
                break
    return data[:byte_count]


def _refuse_offline(model: HubModel, plan: Fetching) -> None:
    if constants.HF_HUB_OFFLINE:
        first, *others = plan.sizes
        more = f" and {len(others)} more" if others else ""
        raise BadInput(
            f"HF_HUB_OFFLINE is set, and these blocks of {model.name} need {first}{more} "
            f"({in_words(plan.byte_count)}), not here yet",
            next_step="unset HF_HUB_OFFLINE, or choose --blocks whose shards are here",
        )


def _silent() -> type[Any]:
    """No bar."""
    return _telling(lambda _done, _total: None, 0, 0, 1)


def _telling(tell: Progress, start: int, stop: int, total: int) -> type[Any]:
    """A class for the library's bars that draws nothing, and tells of bytes beyond `start`."""
    done = start

    class Bar(tqdm):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **{**named, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            tell(max(start, min(done, stop)), total)

        def update_transfer(self, _count: float) -> None:
            """The library counts what comes by network apart from what is written."""

        def set_transfer_postfix_str(self, *_args: Any, **_named: Any) -> None:
            pass

    return Bar


@contextmanager
def _told(name: str, file: str) -> Iterator[None]:
    """Turn what the library raises for this file into one sentence."""
    try:
        yield
    except HFValidationError as error:
        raise BadInput(
            f"{name} is neither a folder nor a hub name", next_step="names look like owner/model"
        ) from error
    except CheckpointError as error:
        raise BadInput(str(error)) from error
    except (_HTTP_ERROR, OSError) as error:
        raise _sentence(name, file, error) from error


def _sentence(name: str, file: str, error: Exception) -> BadInput:
    """What went wrong, by the first of its causes that says so."""
    causes = tuple(_causes(error))
    status = next((one.response.status_code for one in causes if _is_answer(one)), None)
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return BadInput(
            f"HF_HUB_OFFLINE is set, and {file} of {name} is not here",
            next_step="unset HF_HUB_OFFLINE, or name a model's folder",
        )
    if status == 403 or any(isinstance(one, GatedRepoError) for one in causes):
        return BadInput(
            f"the hub does not give {name} to you (its owner asks for consent, or you have none)",
            next_step=f"ask at {constants.ENDPOINT}/{name}, then `hf auth login` or set HF_TOKEN",
        )
    if status == 401 or any(isinstance(one, RepositoryNotFoundError) for one in causes):
        return BadInput(
            f"the hub has no {name}, or not for you",
            next_step="check the name; for a private model `hf auth login` or set HF_TOKEN",
        )
    if status == 404:
        return BadInput(f"{name} has no {file} on the hub", next_step="choose another model")
    if status is not None:
        return BadInput(
            f"the hub answers {file} of {name} with error {status}", next_step="try again later"
        )
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in causes):
        return BadInput(
            f"the disk is full, and {file} of {name} is not here yet",
            next_step="free some, or set HF_HOME to a larger disk",
        )
    if any(isinstance(one, _HTTP_ERROR) for one in causes):
        return BadInput(
            f"{file} of {name} could not be had from the hub: no connection, or it broke off",
            next_step="check the network and start again; the shards that are here stay",
        )
    text = next(iter(str(error).splitlines()), type(error).__name__)
    return BadInput(f"{file} of {name} could not be fetched ({text})", next_step="start again")


def _is_answer(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response is not None


def _causes(error: BaseException) -> Iterator[Any]:
    """The error and what it came from, the last first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__
