"""One step of several sessions through the blocks of one model, each through a span of its own.

1. Sessions that cross a block run it together, wherever they come from and go to, unless what they
   bring has another form (ids beside hidden states).
2. Keys that lie in pages are read by tables, all rows together (`blocks.decoding`).
3. Of other sessions attention takes each one's keys where they lie, in blocks where that was seen
   to give what the family's padded batch gives (`blocks.apart`); elsewhere keys are padded.
4. Where positions are computed by the length of a text, only rows of one regime run together.
5. Where layers share keys with later blocks, only sessions of equal spans run together: what one
   has computed itself another would be lent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch

from blocks.attention import Rows
from blocks.cache import StackCache
from blocks.decoding import Decoder
from blocks.forward import Carved
from blocks.join import JoinedCache
from blocks.sides import Sides


@dataclass(frozen=True, slots=True)
class Segment:
    """Some neighbouring blocks, and which rows of a step run through all of them."""

    blocks: range
    rows: tuple[int, ...]


def segments(spans: Sequence[tuple[int, int]], *, is_mixed: bool = True) -> list[Segment]:
    """The passes that carry each row `i` from block `spans[i][0]` to `spans[i][1]`, in order.

    Between two neighbouring ends of spans there is one pass, of all rows that cross it. Unless
    `is_mixed`, one for each span instead, of the rows that have it.
    """
    if not is_mixed:
        return [
            Segment(range(*span), tuple(row for row, one in enumerate(spans) if one == span))
            for span in dict.fromkeys(spans)
        ]
    ends = sorted({end for span in spans for end in span})
    found = (
        Segment(
            range(start, stop),
            tuple(row for row, one in enumerate(spans) if one[0] <= start and stop <= one[1]),
        )
        for start, stop in pairwise(ends)
    )
    return [segment for segment in found if segment.rows]


@dataclass(slots=True)
class Row:
    """One session's position on its way through the blocks.

    `values` [1, 1, ...] and `sides` are what its next block needs, where the weights are unless the
    cache is paged; when its last block has run, what it leaves with. Then, if it `wants_logits`,
    `values` are float32 logits [1, 1, vocabulary]. `regime`: of the length of its text.
    """

    cache: StackCache
    values: torch.Tensor
    sides: Sides
    wants_logits: bool
    regime: int = 0


def run_rows(
    carved: Carved,
    rows: Sequence[Row],
    empty_cache: Callable[[int, int], StackCache],
    by_rows: Callable[[range], Rows | None] = lambda blocks: None,
    decoder: Decoder | None = None,
) -> None:
    """Run each row through the blocks of its cache, and change it and its cache.

    `empty_cache(start, stop)` is one of these blocks, of any length, that nobody else uses at the
    same time; `by_rows` gives the attention by rows for a pass of some blocks, None where keys
    must be padded; `decoder` runs the rows whose caches are paged. BlocksError, having changed
    nothing, if one of these can have no page. The caches are torn until all rows are through,
    whatever happens.
    """
    for row in rows:
        row.cache.make_ready()
    for row in rows:
        row.cache.begin(1)
    spans = [(row.cache.start, row.cache.stop) for row in rows]
    for segment in segments(spans, is_mixed=not carved.sides.shared):
        ghosts = empty_cache(segment.blocks.start, segment.blocks.stop)
        for group in _alike([rows[number] for number in segment.rows]):
            if decoder is not None and group[0].cache.is_paged:
                _run_paged(decoder, segment.blocks, group, ghosts)
            else:
                _run_group(carved, segment.blocks, group, ghosts, by_rows(segment.blocks))
    for row in rows:
        row.cache.advance(1)


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows by the form of what they bring and have, which must be equal in a pass."""
    groups: dict[tuple[bool, bool, int, tuple[int, ...]], list[Row]] = {}
    for row in rows:
        values, is_paged = row.values, row.cache.is_paged
        form = values.is_floating_point(), is_paged, row.regime, tuple(values.shape[2:])
        groups.setdefault(form, []).append(row)
    yield from groups.values()


def _run_paged(decoder: Decoder, blocks: range, rows: Sequence[Row], ghosts: StackCache) -> None:
    ends = blocks.stop == len(decoder.carved.parts.layers)
    hidden, *logits = decoder.run(
        blocks,
        [row.values for row in rows],
        [row.cache for row in rows],
        ghosts,
        has_logits=ends and any(row.wants_logits for row in rows),
        regime=rows[0].regime,
    )
    for number, row in enumerate(rows):
        is_asked = row.wants_logits and row.cache.stop == blocks.stop
        row.values = (logits[0] if is_asked else hidden)[number : number + 1]


def _run_group(
    carved: Carved, blocks: range, rows: Sequence[Row], ghosts: StackCache, apart: Rows | None
) -> None:
    joined = JoinedCache([row.cache for row in rows], ghosts, carved.device, apart)
    shared = {"position_ids": joined.position_ids, "attention_mask": joined.mask}
    sides = {  # none where ids come
        name: torch.cat([row.sides[name] for row in rows]) for name in rows[0].sides
    }
    ends = blocks.stop == len(carved.parts.layers)
    with apart.attached() if apart else nullcontext():
        output = carved.forward(
            blocks,
            torch.cat([row.values for row in rows]),
            shared,
            cache=joined,
            wanted=1 if ends and any(row.wants_logits for row in rows) else None,
            sides=sides,
            regime=rows[0].regime,
        )
    joined.commit()
    for number, row in enumerate(rows):
        own = slice(number, number + 1)
        is_done = row.cache.stop == blocks.stop
        logits = output.logits if is_done and row.wants_logits else None
        row.values = output.hidden[own] if logits is None else logits[own]
        row.sides = {name: side[own] for name, side in sides.items()}
