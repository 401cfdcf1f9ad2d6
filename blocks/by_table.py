"""One step of sessions whose keys lie in pages: attention reads them where they lie, by tables.

How long sessions are and where their pages lie is told by tensors on a board, never by numbers of
Python. So a step can be recorded once and repeated with what is on the board then.

1. Only tables are padded. Rows that pad a batch have length 0 and tables of nobody's page: they
   write there, and what comes of them is thrown away.
2. Attention is a kernel's that reads pages, on a GPU and in half precision; else, and where that
   kernel refuses, a plain one that gathers them. Both take the same.
3. Only keywords are taken that are known to say nothing more of one position's attention: others
   are refused, never ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from blocks.attention import Attached
from blocks.cache import StackCache
from blocks.errors import BlocksError
from blocks.hf.attention import HARMLESS
from blocks.hf.caches import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from blocks.pool import Ledger, Pool
from blocks.transfer import sent

_HALVES = (torch.bfloat16, torch.float16)

# What FlashAttention 2, as torch has it, can read by tables.
KERNEL_PAGE_TOKENS = 256
_KERNEL_MOST_WIDTH = 256
_KERNEL_WIDTHS = 8

# query [N, heads, d], keys and values [pages, tokens, key heads, d], table [N, P] int32, lengths
# [N] int32, scale, window (None: the whole past) -> [N, heads, d]
Reads = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        float | None,
        int | None,
    ],
    torch.Tensor,
]


def read_plainly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attention of one position a row to its first `lengths` positions, all tables gathered."""
    rows, heads, _ = query.shape
    past, contents = (
        room.index_select(0, table.flatten()).view(rows, -1, *room.shape[2:]).transpose(1, 2)
        for room in (keys, values)
    )
    places = torch.arange(past.shape[2], device=query.device)
    seen = places < lengths[:, None]
    if window is not None:
        seen = seen & (places >= lengths[:, None] - window)
    seen = seen[:, None, :, None]
    # what others left in a page may be NaN, and 0 times that is NaN
    attended = functional.scaled_dot_product_attention(
        query.reshape(rows, keys.shape[2], heads // keys.shape[2], -1),
        past.masked_fill(~seen, 0),
        contents.masked_fill(~seen, 0),
        attn_mask=seen.transpose(2, 3),
        scale=scale,
    )
    return attended.reshape(rows, heads, -1)


def read_by_kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same by torch's kernel for pages, which copies nothing."""
    from torch.nn.attention.varlen import varlen_attn  # not in every torch that we take

    rows = query.shape[0]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    attended: torch.Tensor = varlen_attn(
        query,
        keys,
        values,
        starts,
        starts,  # not read: `seqused_k` takes its place
        1,
        table.shape[1] * keys.shape[1],
        scale=scale,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        enable_gqa=True,
        seqused_k=lengths,
        block_table=table,
    )
    return attended


def fits_kernel(pool: Pool) -> bool:
    """Can the kernel read the pages of this pool?"""
    form = pool.form
    return (
        form.device.type == "cuda"
        and form.dtype in _HALVES
        and form.key_width == form.value_width <= _KERNEL_MOST_WIDTH
        and form.key_width % _KERNEL_WIDTHS == 0
        and pool.page_tokens % KERNEL_PAGE_TOKENS == 0
    )


class Board:
    """What a step takes, at addresses that stay: `inputs` [N, 1, ...], `lengths` [N], the positions
    that the rows have, and `tables` [blocks, N, P].
    """

    def __init__(
        self, blocks: range, rows: int, pages: int, inputs: torch.Tensor, device: torch.device
    ) -> None:
        """For `inputs` of a row [1, 1, ...] like these, in dtype and shape."""
        self.blocks = blocks
        with torch.inference_mode(False):
            self.inputs = torch.zeros((rows, *inputs.shape[1:]), dtype=inputs.dtype, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
            self.tables = torch.zeros((len(blocks), rows, pages), dtype=torch.int32, device=device)
        self._stamps: list[int] = []

    def fill(
        self, inputs: Sequence[torch.Tensor], lengths: Sequence[int], ledgers: Sequence[Ledger]
    ) -> None:
        """Write down the next step: each row's input [1, 1, ...], its length and its pages.

        Waits for nothing.
        """
        device, rows = self.lengths.device, len(self.lengths)
        if len({one.device for one in inputs}) > 1:
            inputs = [sent(one, device) for one in inputs]
        self.inputs[: len(inputs)] = sent(torch.cat(list(inputs)), device)
        padded = torch.tensor([*lengths, *[0] * (rows - len(lengths))])
        self.lengths.copy_(sent(padded, device))
        stamps = [ledger.stamp for ledger in ledgers]
        if stamps != self._stamps:
            tables = torch.zeros(self.tables.shape, dtype=torch.int32)
            for row, ledger in enumerate(ledgers):
                table = ledger.table(self.blocks)
                tables[:, row, : table.shape[1]] = table
            self.tables.copy_(sent(tables, device))
            self._stamps = stamps

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it."""
        return self.inputs, self.lengths, self.tables


@dataclass(slots=True)
class ByTable(Attached):
    """The attention of one step by a board's tables; `pools` has the pool of each of its blocks."""

    board: Board
    pools: Sequence[Pool]
    reads: Reads | None = None  # None: the kernel where it fits
    slots: torch.Tensor = field(init=False)  # where the new keys go [blocks, N]
    lengths: torch.Tensor = field(init=False)  # with them, int32
    kept: dict[int, tuple[torch.Tensor, torch.Tensor, int, int | None]] = field(
        default_factory=dict
    )
    used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Look up where the new keys go. Part of the step."""
        lengths, size = self.board.lengths, self.pools[0].page_tokens
        index = (lengths // size)[None, :, None].expand(len(self.pools), -1, 1)
        pages = self.board.tables.gather(2, index)[..., 0]
        self.slots = pages.long() * size + lengths % size
        self.lengths = (lengths + 1).int()

    @property
    def is_whole(self) -> bool:
        """Has attention looked at all keys that were stored?"""
        return self.used == self.kept.keys()

    def store(
        self, place: int, keys: torch.Tensor, values: torch.Tensor, window: int | None
    ) -> None:
        """Store the new keys and values [N, heads, 1, d] of the block at that place."""
        pool = self.pools[place]
        for room, new in ((pool.keys, keys), (pool.values, values)):
            room.flatten(0, 1).index_copy_(0, self.slots[place], new[:, :, 0])
        self.kept[id(keys)] = keys, values, place, window

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **named: Any,
    ) -> torch.Tensor:
        """What each row attends to [N, 1, heads, d]; key and value stand for all that is stored."""
        keys, values, place, window = self.kept.get(id(key), (None, None, 0, None))
        if keys is not key or values is not value:
            raise BlocksError(f"{type(module).__name__} changes what its cache gives it")
        _check_named(module, named, window)
        self.used.add(id(key))
        pool = self.pools[place]
        reads = self.reads or (read_by_kernel if fits_kernel(pool) else read_plainly)
        attended = reads(
            query[:, :, 0],
            pool.keys,
            pool.values,
            self.board.tables[place],
            self.lengths,
            named.get("scaling"),
            window,
        )
        return attended[:, None]


def _check_named(module: nn.Module, named: Mapping[str, Any], window: int | None) -> None:
    """BlocksError for a keyword that may ask for another attention."""
    for name, value in named.items():
        if value is not None and value is not False and name not in HARMLESS:
            raise BlocksError(f"{type(module).__name__} attends with a {name}")
    if named.get("sliding_window") not in (None, window):
        raise BlocksError(f"{type(module).__name__} has a window that its cache does not know")


class StepCache(DynamicCache):  # type: ignore[misc]  # transformers is not followed
    """What the layers of a step by tables are given for a cache. It stores in the pools.

    `ghosts` is a cache of the board's blocks as long as the longest row: families ask for that, and
    must not use it (a trial sees whether they do).
    """

    def __init__(self, table: ByTable, ghosts: StackCache) -> None:
        layers = list(ghosts.layers)
        for place, number in enumerate(table.board.blocks):
            layers[number] = _layer(table, place, ghosts.layers[number], ghosts.length)
        Cache.__init__(self, layers=layers)
        self.length = ghosts.length


class _Stored(DynamicLayer):  # type: ignore[misc]  # as above
    """A full-attention layer of a step by tables."""

    table: ByTable
    place: int
    longest: int

    def get_seq_length(self) -> int:
        """Of the longest row."""
        return self.longest

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values, which stand for all."""
        self.table.store(self.place, key_states, value_states, None)
        return key_states, value_states


class _StoredSliding(DynamicSlidingWindowLayer):  # type: ignore[misc]  # as above
    """A sliding layer of a step by tables."""

    table: ByTable
    place: int

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values, which stand for all."""
        self.table.store(self.place, key_states, value_states, self.sliding_window)
        return key_states, value_states


def _layer(table: ByTable, place: int, ghost: Any, longest: int) -> Any:
    layer: Any
    if isinstance(ghost, DynamicSlidingWindowLayer):
        layer = _StoredSliding(ghost.sliding_window)
        layer.cumulative_length = longest
    else:
        layer = _Stored()
        layer.longest = longest
    layer.table, layer.place, layer.is_initialized = table, place, True
    return layer
