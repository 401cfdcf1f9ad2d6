"""Decode steps of sessions whose keys lie in pages: by tables, and recorded where that pays.

A step of so many rows through some blocks is recorded when it comes again; from then on its board
is filled and the recording repeated. Sessions of different spans run in one recording for each
piece of blocks that they share, as `blocks.joint` cuts them.

1. What a recording gives is what the step gives unrecorded: `blocks.trial` has seen that it does,
   for rows and lengths other than those it was recorded with.
2. Before it runs every row has a page to write to (`Ledger.make_ready`): without, nothing has
   changed.
3. At most `most_recordings` are kept, those that were used last; none outlives a move of a pool.
4. What cannot be recorded runs unrecorded, and is not tried again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from blocks.by_table import Board, ByTable, Reads, StepCache
from blocks.cache import StackCache
from blocks.errors import BlocksError
from blocks.forward import Carved
from blocks.pool import Pool, Pools
from blocks.recorder import Outputs, Recorder

logger = logging.getLogger(__name__)

# Of one stack: five sizes of batch, two of tables, for the whole span and a few pieces of it.
MOST_RECORDINGS = 48

_UNRECORDED_FIRST = 1  # what comes once only is not worth recording


class Kind(NamedTuple):
    """What must be equal in steps that share a recording."""

    start: int
    stop: int
    rows: int
    pages: int  # that the tables have room for
    dtype: torch.dtype  # of what comes in
    tail: tuple[int, ...]
    has_logits: bool
    regime: int


@dataclass(slots=True)
class _Known:
    """What there is to repeat a kind of step; `seen`: how often it has come."""

    board: Board | None = None
    repeat: Callable[[], Outputs] | None = None
    seen: int = 0
    is_refused: bool = False

    @property
    def is_due(self) -> bool:
        """Is it to be recorded now?"""
        return self.repeat is None and not self.is_refused and self.seen > _UNRECORDED_FIRST


@dataclass(slots=True)
class Decoder:
    """Runs joint steps by tables. Not safe between threads; one runs at a time.

    `recorder` None records nothing. `reads` None takes the kernel where it fits.
    """

    carved: Carved
    pools: Pools
    recorder: Recorder | None = None
    reads: Reads | None = None
    most_recordings: int = MOST_RECORDINGS
    repeated: int = 0  # steps, from recordings
    _known: OrderedDict[Kind, _Known] = field(default_factory=OrderedDict)
    _moves: int = 0

    @property
    def recordings(self) -> int:
        """How many there are."""
        return sum(known.repeat is not None for known in self._known.values())

    def run(
        self,
        blocks: range,
        values: Sequence[torch.Tensor],
        caches: Sequence[StackCache],
        ghosts: StackCache,
        *,
        has_logits: bool,
        regime: int = 0,
    ) -> Outputs:
        """Run the next position of each session through some blocks of its paged cache.

        `values` are alike, ids [1, 1] or hidden states [1, 1, ...], wherever they lie; `ghosts` a
        cache of these blocks that nobody else uses; `regime` as in `Carved.forward`.
        Returns hidden states [N, 1, ...] and, if it `has_logits`, float32 logits
        [N, 1, vocabulary]. The caches, which are ready for the position (`Ledger.make_ready`), are
        as long as before.
        """
        longest = max(cache.length for cache in caches)
        ghosts.advance(longest - ghosts.length)
        ledgers = [cache.ledger for cache in caches if cache.ledger is not None]
        if self.pools.moves != self._moves:
            self._known.clear()
            self._moves = self.pools.moves
        first = values[0]
        dtype = self.carved.dtype if first.is_floating_point() else torch.long
        kind = Kind(
            blocks.start,
            blocks.stop,
            _bucket(len(caches)),
            _bucket(longest // self.pools.page_tokens + 1),
            dtype,
            tuple(first.shape[2:]),
            has_logits,
            regime,
        )
        pools = [ledgers[0].held[block][0] for block in blocks]
        known = self._seen(kind)
        if self.recorder is not None and known.is_due:
            self._record(self.recorder, kind, known, pools, ghosts)
        lengths = [cache.length for cache in caches]
        if known.board is None or known.repeat is None:
            board = self._board(kind._replace(rows=len(caches)))
            board.fill(values, lengths, ledgers)
            return self._step(board, kind, pools, ghosts)
        known.board.fill(values, lengths, ledgers)
        self.repeated += 1
        # the next repetition writes over what this one returns
        return tuple(one[: len(caches)].clone() for one in known.repeat())

    def _seen(self, kind: Kind) -> _Known:
        if self.carved.rotary.is_growing(kind.regime):  # a kind of its own, at each length
            return _Known()
        known = self._known.setdefault(kind, _Known())
        known.seen += 1
        self._known.move_to_end(kind)
        if len(self._known) > self.most_recordings:
            self._known.popitem(last=False)
        return known

    def _record(
        self,
        recorder: Recorder,
        kind: Kind,
        known: _Known,
        pools: Sequence[Pool],
        ghosts: StackCache,
    ) -> None:
        board = self._board(kind)  # of empty rows: whatever recording runs hurts nobody
        rooms = [room for pool in self.pools for room in (pool.keys, pool.values)]

        def step() -> Outputs:
            return self._step(board, kind, pools, ghosts)

        try:
            known.repeat = recorder.record(step, [*board.tensors, *rooms])
            known.board = board
        except Exception as refused:  # noqa: BLE001  # a family's own code may raise anything
            known.is_refused = True
            logger.info(
                "steps of blocks %s:%s are not recorded: %s", kind.start, kind.stop, refused
            )

    def _board(self, kind: Kind) -> Board:
        like = torch.empty((1, 1, *kind.tail), dtype=kind.dtype, device="meta")
        blocks = range(kind.start, kind.stop)
        return Board(blocks, kind.rows, kind.pages, like, self.carved.device)

    def _step(self, board: Board, kind: Kind, pools: Sequence[Pool], ghosts: StackCache) -> Outputs:
        """The step itself, on what the board says."""
        table = ByTable(*self.carved.attends, board, pools, self.reads)
        shared: dict[str, Any] = {"position_ids": board.lengths[:, None], "attention_mask": None}
        with table.attached():
            output = self.carved.forward(
                board.blocks,
                board.inputs.clone(),  # some families write into it
                shared,
                cache=StepCache(table, ghosts),
                wanted=1 if kind.has_logits else None,
                regime=kind.regime,
            )
        if not table.is_whole:
            raise BlocksError("this family does not attend to all keys that it stores")
        return (output.hidden,) if output.logits is None else (output.hidden, output.logits)


def _bucket(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()
