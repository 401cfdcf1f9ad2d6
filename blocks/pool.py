"""Keys and values in pages at fixed addresses, held by the sessions of a stack.

Buffers that grow move as they do; a recorded step (`blocks.recorder`) reads and writes where things
lay when it was recorded. So where steps are recorded keys lie in pools, and a session has a list of
pages for each of its blocks. Pages are counted in positions: `page_tokens` of one session.

1. A page keeps its address as long as its pool does not grow; `moves` tells how often that was.
2. Page 0 belongs to nobody: rows that pad a batch write there, and what lies before a window is
   read there. A session's list has it for what it has dropped.
3. A page that several sessions hold is never written: who wants to write gets a copy of it.
4. Whoever drops a ledger gives its pages back, from any thread; they are taken up in the next call.
5. A pool that cannot grow raises BlocksError, and whoever asked has what it had before.
6. What is parked in this process's memory comes back to the bit, into other pages.
"""

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from blocks.errors import BlocksError
from blocks.transfer import sent, wait_for

logger = logging.getLogger(__name__)

NOBODYS = 0  # the page of nobody

_FIRST_PAGES = 16

_stamps = itertools.count(1)  # of no two ledgers, nor of one before and after a change, the same


@dataclass(frozen=True, slots=True)
class Form:
    """What the positions of a block look like: heads and width of its keys and of its values."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> "Form":
        """The form of keys [..., heads, positions, width] and their values."""
        return cls(
            keys.shape[-3], keys.shape[-1], values.shape[-1], keys.dtype, torch.device(keys.device)
        )

    @property
    def token_bytes(self) -> int:
        """What a position takes in one block."""
        itemsize: int = self.dtype.itemsize
        return self.heads * (self.key_width + self.value_width) * itemsize


class Pool:
    """Pages of one form: `keys` and `values` are [pages, page_tokens, heads, width].

    Not safe between threads, but for `give`.
    """

    def __init__(self, form: Form, page_tokens: int, most_pages: int | None = None) -> None:
        """`most_pages`: it does not grow beyond so many, the page of nobody not counted."""
        self.form, self.page_tokens = form, page_tokens
        self.moves = 0
        self._most = most_pages
        self._holders = [1]  # of each page how many
        self._free: list[int] = []
        self._given: deque[int] = deque()
        self.keys, self.values = self._rooms(1)

    @property
    def page_bytes(self) -> int:
        """What a page takes."""
        return self.page_tokens * self.form.token_bytes

    @property
    def pages(self) -> int:
        """How many pages there are, held or not, the one of nobody not counted."""
        return len(self._holders) - 1

    @property
    def held(self) -> int:
        """How many of them somebody holds."""
        self._sort()
        return self.pages - len(self._free)

    def reserve(self, pages: int) -> None:
        """Have so many pages in all, so that it need not grow. BlocksError if it cannot."""
        if pages > self.pages:
            self._grow(pages)

    def take(self) -> int:
        """A page that nobody else holds; what is in it is finite numbers, or a session's leavings.

        BlocksError if there is none.
        """
        self._sort()
        if not self._free:
            self._grow(max(_FIRST_PAGES, 2 * self.pages))
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, held once more."""
        self._holders[page] += 1
        return page

    def give(self, page: int) -> None:
        """Hold a page no longer. From any thread."""
        if page != NOBODYS:
            self._given.append(page)

    def is_shared(self, page: int) -> bool:
        """Does somebody else hold it, too?"""
        self._sort()
        return self._holders[page] > 1

    def copied(self, page: int) -> int:
        """A page of one's own with what is in this one, which is held no longer."""
        copy = self.take()
        self.keys[copy] = self.keys[page]
        self.values[copy] = self.values[page]
        self.give(page)
        return copy

    def copied_out(self, pages: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these pages in this process's memory, once the device is done."""
        keys, values = (_out(room, pages) for room in (self.keys, self.values))
        return keys, values

    def copy_in(self, pages: Sequence[int], rooms: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write what was copied out into these pages."""
        if pages:
            index = sent(torch.tensor(pages), self.form.device)
            for room, kept in zip((self.keys, self.values), rooms, strict=True):
                room.index_copy_(0, index, kept.to(self.form.device, non_blocking=True))

    def _sort(self) -> None:
        """Take up the pages that were given back."""
        while self._given:
            page = self._given.popleft()
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _grow(self, pages: int) -> None:
        if self._most is not None:
            pages = min(pages, self._most)
        if pages <= self.pages:
            raise BlocksError(f"all {self.pages} pages for keys are held; try again later")
        try:
            keys, values = self._rooms(pages + 1)
        except RuntimeError as error:  # what torch raises for memory, on every device
            raise BlocksError("there is no memory for more keys; try again later") from error
        had = len(self._holders)
        keys[:had], values[:had] = self.keys, self.values
        self.keys, self.values = keys, values
        self.moves += 1
        self._free += range(pages, had - 1, -1)  # the first is taken first
        self._holders += [0] * (pages + 1 - had)
        logger.info("%s pages of %s bytes for keys", pages, self.page_bytes)

    def _rooms(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros: attention multiplies what it does not look at by 0, and NaN would stay NaN."""
        form = self.form
        with torch.inference_mode(False):
            keys, values = (
                torch.zeros(
                    (pages, self.page_tokens, form.heads, width),
                    dtype=form.dtype,
                    device=form.device,
                )
                for width in (form.key_width, form.value_width)
            )
        return keys, values


class Pools:
    """The pools of a stack, one for each form that keys of its blocks have."""

    def __init__(self, page_tokens: int, most_pages: int | None = None) -> None:
        self.page_tokens = page_tokens
        self._most = most_pages
        self._pools: dict[Form, Pool] = {}

    def of(self, form: Form) -> Pool:
        """The pool for keys of that form."""
        if form not in self._pools:
            self._pools[form] = Pool(form, self.page_tokens, self._most)
        return self._pools[form]

    def reserve(self, byte_count: int, like: "Ledger") -> None:
        """Have so many bytes of pages in all, for sessions of the blocks of this ledger.

        BlocksError if there is not as much memory.
        """
        pools = [pool for pool, _ in like.held.values()]
        each = byte_count // sum(pool.page_bytes for pool in pools)
        for pool in self:
            pool.reserve(each * pools.count(pool))

    @property
    def moves(self) -> int:
        """How often one of them has moved, or come to be."""
        return sum(pool.moves + 1 for pool in self._pools.values())

    def __iter__(self) -> Iterator[Pool]:
        return iter(self._pools.values())

    def __len__(self) -> int:
        return len(self._pools)


def _out(room: torch.Tensor, pages: Sequence[int]) -> torch.Tensor:
    """Some pages of a room, on their way to memory that the system cannot move."""
    shape = (len(pages), *room.shape[1:])
    out = torch.empty(shape, dtype=room.dtype, pin_memory=room.device.type == "cuda")
    for place, page in enumerate(pages):
        out[place].copy_(room[page], non_blocking=True)
    return out


_Held = dict[int, tuple[Pool, list[int]]]


def _give_all(held: _Held) -> None:
    for pool, pages in held.values():
        for page in pages:
            pool.give(page)


class Ledger:
    """The pages of one session: for each of its blocks, by number, a list in order of positions.

    What a session has dropped before its window is page 0 in the list. `stamp` changes whenever a
    page does. Dropped, it gives all back. Parked, it has no pages, and must come back (`unpark`)
    before anything else.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.stamp = next(_stamps)
        self.held: _Held = {}
        self._windows: dict[int, int] = {}  # of blocks that keep so many positions only
        self._gone: dict[int, int] = {}  # how many pages such a block has dropped at its start
        self._parked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[range, tuple[int, torch.Tensor]] = {}  # with the stamp then
        self._ready = 0  # before this position all pages are there, and its own
        weakref.finalize(self, _give_all, self.held).atexit = False

    def __len__(self) -> int:
        return len(self.held)

    def open(self, block: int, form: Form, keep: int | None) -> None:
        """Begin to hold a block's keys; with `keep`, of that many last positions only."""
        self.held[block] = self.pools.of(form), []
        if keep is not None:
            self._windows[block] = keep
        self._changed()

    def make_ready(self, length: int, tokens: int = 1) -> None:
        """Have pages for `tokens` positions from `length` on in every block, which may be written.

        Costs next to nothing but once for each page of positions. BlocksError, and no more pages
        held than before, if there are none.
        """
        end = length + tokens
        if end > self._ready:
            try:
                for block in self.held:
                    self.make_room(block, length, tokens)
            except BlocksError:
                for block in self.held:
                    self.cut(block, length)
                raise
            self._ready = -(-end // self.pools.page_tokens) * self.pools.page_tokens

    def make_room(self, block: int, length: int, tokens: int) -> None:
        """Have pages for `tokens` positions from `length` on in one block, which may be written.

        Drops what its window has left behind. BlocksError if there are none.
        """
        pool, pages = self.held[block]
        size = self.pools.page_tokens
        first, last = length // size, (length + tokens - 1) // size
        if block in self._windows:
            for index in range(self.gone(block), max(0, length - self._windows[block]) // size):
                pool.give(pages[index])
                pages[index] = NOBODYS
                self._gone[block] = index + 1
                self._changed()
        for index in range(first, last + 1):
            if index == len(pages):
                pages.append(pool.take())
                self._changed()
            elif pool.is_shared(pages[index]):
                pages[index] = pool.copied(pages[index])
                self._changed()

    def gone(self, block: int) -> int:
        """How many pages, from the first on, the block has dropped."""
        return self._gone.get(block, 0)

    def cut(self, block: int, length: int) -> None:
        """Drop what a block holds beyond so many positions."""
        pool, pages = self.held[block]
        kept = -(-length // self.pools.page_tokens)
        for page in pages[kept:]:
            pool.give(page)
        del pages[kept:]
        self._changed()

    def fork(self, length: int) -> "Ledger":
        """A ledger of the first positions, whose pages both hold from now on."""
        made = Ledger(self.pools)
        kept = -(-length // self.pools.page_tokens)
        for block, (pool, pages) in self.held.items():
            shared = [page if page == NOBODYS else pool.share(page) for page in pages[:kept]]
            made.held[block] = pool, shared
        made._windows, made._gone = dict(self._windows), dict(self._gone)
        self._changed()  # what was its own is not, any more
        return made

    @property
    def is_parked(self) -> bool:
        """Does all it holds lie in this process's memory?"""
        return bool(self._parked)

    def park(self) -> None:
        """Copy all of it into this process's memory, and give the pages back."""
        for block, (pool, pages) in self.held.items():
            kept = pages[self.gone(block) :]
            self._parked[block] = pool.copied_out(kept)
        for pool, pages in self.held.values():  # what is on its way is copied by now
            wait_for(pool.form.device)
            for page in pages:
                pool.give(page)
            pages.clear()
        self._changed()

    def unpark(self) -> None:
        """Bring it back into pages of its own; BlocksError, and it stays parked, if none are."""
        taken: list[tuple[Pool, int]] = []
        made: dict[int, list[int]] = {}
        try:
            for block, (keys, _) in self._parked.items():
                pool = self.held[block][0]
                made[block] = []
                for _ in range(len(keys)):
                    made[block].append(pool.take())
                    taken.append((pool, made[block][-1]))
        except BlocksError:
            for pool, page in taken:
                pool.give(page)
            raise
        for block, rooms in self._parked.items():
            pool, pages = self.held[block]
            pool.copy_in(made[block], rooms)
            pages[:] = [NOBODYS] * self.gone(block) + made[block]
        self._parked.clear()
        self._changed()

    def table(self, blocks: range) -> torch.Tensor:
        """The pages of some blocks, all as many: int32 [blocks, pages], on the CPU."""
        found = self._tables.get(blocks)
        if found is None or found[0] != self.stamp:
            pages = [self.held[block][1] for block in blocks]
            found = self.stamp, torch.tensor(pages, dtype=torch.int32)
            self._tables[blocks] = found
        return found[1]

    @property
    def byte_count(self) -> int:
        """What its pages take, those that others hold too included."""
        return sum(
            pool.page_bytes * (len(pages) - self.gone(block))
            for block, (pool, pages) in self.held.items()
            if not self.is_parked
        )

    def used_byte_count(self, length: int) -> int:
        """What so many positions take, but for those that are dropped."""
        size = self.pools.page_tokens
        return sum(
            pool.form.token_bytes * max(0, length - size * self.gone(block))
            for block, (pool, _) in self.held.items()
        )

    def _changed(self) -> None:
        self.stamp, self._ready = next(_stamps), 0
