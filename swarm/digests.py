"""Whose weights are damaged: digests of blocks, compared between those who hold them.

Every server says in its record a digest of each block it holds, made of the checkpoint's own bytes
(`blocks.digest`), so that servers in different formats can compare.

1. One against one proves nothing: only who is outvoted, by at least two and by more than agree
   with it, is taken to be wrong.
2. A newcomer whom somebody contradicts and nobody supports is the stranger.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from routing.span import Span, spans_of
from swarm.record import PeerRecord

LEAST_AGAINST = 2


def outvoted(records: Iterable[PeerRecord]) -> dict[str, tuple[Span, ...]]:
    """Return the peers whose weights most others contradict, each with the blocks concerned."""
    wrong: dict[str, set[int]] = {}
    for block, said in _by_block(records).items():
        votes = Counter(said.values())
        for peer, digest in said.items():
            largest = max((count for other, count in votes.items() if other != digest), default=0)
            if largest >= LEAST_AGAINST and largest > votes[digest]:
                wrong.setdefault(peer, set()).add(block)
    return {peer: spans_of(blocks) for peer, blocks in wrong.items()}


def contradicted(own: Mapping[int, bytes], records: Iterable[PeerRecord]) -> tuple[Span, ...]:
    """Return the blocks of which others hold other weights, and nobody the same as `own`."""
    said = _by_block(records)
    strange = {
        block
        for block, digest in own.items()
        if said.get(block) and digest not in said[block].values()
    }
    return spans_of(strange)


def _by_block(records: Iterable[PeerRecord]) -> dict[int, dict[str, bytes]]:
    """Each block's digest by each peer that tells one."""
    found: dict[int, dict[str, bytes]] = {}
    for record in records:
        if record.state in ("online", "joining"):
            for block, digest in record.block_digests.items():
                found.setdefault(block, {})[record.peer] = digest
    return found
