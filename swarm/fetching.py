"""The swarm's model as its clients know it: a description and a tokenizer, fetched from peers.

1. What a peer gives is checked against the fingerprint before anything of it is used or kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.errors import PeerFault, SwarmError
from swarm.files import FileCache, SmallFiles, fetch_files, fingerprint_of
from swarm.model_card import ModelCard
from swarm.record import PeerRecord
from swarm.text import Tokens
from swarm.transport import Host

log = logging.getLogger(__name__)

FILES_SECONDS = 60.0
MOST_GIVERS = 8  # peers asked in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a client knows of the swarm's model."""

    fingerprint: str
    card: ModelCard
    tokens: Tokens


async def fetch_model(host: Host, records: Sequence[PeerRecord], cache: FileCache) -> Model:
    """Return the model's description and tokenizer, from disk or from the first peer that gives
    the files its fingerprint calls for. The last peer's error if none of the first few does.
    """
    last: SwarmError = PeerFault("no server tells which files its model has")
    proved = [record for record in records if _is_proved(record)]
    proved.sort(key=lambda record: record.peer not in host.links())
    for record in proved[:MOST_GIVERS]:
        try:
            files = await _load_or_fetch(host, record, cache)
            return model_of(record.fingerprint, files)
        except SwarmError as error:
            last = error
    raise last


def _is_proved(record: PeerRecord) -> bool:
    """Tell whether its digests are those that its fingerprint stands for."""
    return fingerprint_of(record.checkpoint_digest, record.files_digest) == record.fingerprint


def model_of(fingerprint: str, files: SmallFiles) -> Model:
    """Return what the small files say. PeerFault if they are malformed."""
    if "model.json" not in files:
        raise PeerFault("the model's files lack model.json")
    card = ModelCard.read(files["model.json"])
    return Model(fingerprint=fingerprint, card=card, tokens=Tokens(files))


async def _load_or_fetch(host: Host, record: PeerRecord, cache: FileCache) -> SmallFiles:
    files = cache.load(record.files_digest)
    if files is None:
        files = await fetch_files(host, record.peer, record.files_digest, within=FILES_SECONDS)
        try:
            cache.store(files)
        except OSError as error:
            log.debug("the model's files are not kept: %s", error)
    return files
