"""What sessions have in common: pages of what a hop received before. Pure.

A **page** is so many positions of a session's payloads. Its digest covers the pages before it too,
so the digest of one page names all of a beginning.

1. A digest is of bytes that were received here. What somebody else says of what he sent, or will
   send, is looked up and never believed: who claims what he does not send gets what he claimed.
2. How positions were cut into steps changes no digest; the model and the payload's form do, and
   the `sequence_length` of their steps: other positions are computed of the same payload then.
3. A page counts once its last position is computed, and until a step that rolls it back comes.
4. The index is bounded: what does not fit is not found, and nothing else happens.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from swarm.chain import Entry, History, Payload
from swarm.wire import Tensor

# No longer than what a sliding layer remembers beyond its window: whatever a session's length, its
# last whole page can be gone back to.
PAGE_POSITIONS = 64
DIGEST_BYTES = 16
# An Open carries so many digests, 8 KiB: 32,768 positions.
MOST_PAGES = 512
_MOST_UNREAD = 16  # steps of one position whose digest waits
# Over all legs of a server; some 200 bytes each.
MOST_INDEXED = 1 << 16


@dataclass(frozen=True, slots=True)
class _Form:
    """A payload as positions: what they have in common, how many, each tensor's bytes by one."""

    kind: tuple[tuple[str, str, tuple[int, ...]], ...]
    count: int
    views: dict[str, tuple[memoryview, int]]


class Digests:
    """The digests of the pages of one stream of payloads, as it goes on and is rolled back.

    `pages` is what it begins with. At most MOST_PAGES come of it.
    """

    def __init__(
        self, fingerprint: str, page: int = PAGE_POSITIONS, pages: Iterable[bytes] = ()
    ) -> None:
        self.pages = list(pages)
        self._page = page
        self._fingerprint = fingerprint
        self._length = len(self.pages) * page
        # After each of the last positions, the page's form and state: a draft may be rolled back.
        self._states: deque[tuple[Hashable, Any]] = deque(maxlen=page)
        self._is_lost = False  # what follows cannot be told, until it goes back to a page's begin

    def add(self, start: int, payload: Payload, sequence_length: int = 0) -> None:
        """Go on with these positions from `start`; earlier ones from there on are rolled back.

        What cannot be cut into positions (several rows, a mask) adds no pages, nor what follows it.
        """
        self._go_back(start)
        form = _form_of(payload)
        if form is None or self._is_lost or start != self._length:
            self._is_lost = True
            return
        for place in range(form.count):
            if not self._take(form, place, sequence_length):
                self._is_lost = True
                return

    def _take(self, form: _Form, place: int, sequence_length: int) -> bool:
        """Add one position; False if it cannot be told."""
        kind = (form.kind, sequence_length) if sequence_length else form.kind
        if self._length % self._page == 0:
            if len(self.pages) >= MOST_PAGES:
                return False
            before = self.pages[-1] if self.pages else b""
            seed = (self._fingerprint, self._page, before, kind)
            state = hashlib.sha256(repr(seed).encode())
        elif self._states[-1][0] == kind:
            state = self._states[-1][1].copy()
        else:
            return False
        for view, size in form.views.values():
            state.update(view[place * size : (place + 1) * size])
        self._length += 1
        self._states.append((kind, state))
        if self._length % self._page == 0:
            self.pages.append(state.digest()[:DIGEST_BYTES])
        return True

    def _go_back(self, start: int) -> None:
        if start > self._length:
            return
        is_begin = start % self._page == 0
        for _ in range(min(self._length - start, len(self._states))):
            self._states.pop()
        if start < self._length or is_begin:
            self._is_lost = not (is_begin or self._states)
        self._length = start
        del self.pages[start // self._page :]


def digests_of(payloads: Sequence[Payload], fingerprint: str, page: int = PAGE_POSITIONS) -> bytes:
    """The digests of the pages of payloads that follow each other, one after the other."""
    digests, start = Digests(fingerprint, page), 0
    for payload in payloads:
        digests.add(start, payload)
        start += length_of(payload)
    return b"".join(digests.pages)


def ids_payload(ids: Sequence[int]) -> Payload:
    """Token ids as a client sends them."""
    return {"ids": Tensor("int32", (1, len(ids)), np.asarray(ids, "<i4").tobytes())}


def prefix_of(
    prompt: Sequence[int],
    fingerprint: str,
    page: int = PAGE_POSITIONS,
    sequence_length: int = 0,
) -> tuple[bytes, ...]:
    """The digests of the pages that a session with this prompt can begin with.

    Not of its last position: what comes after it is to be computed in any case.
    """
    pages = min((len(prompt) - 1) // page, MOST_PAGES)
    digests = Digests(fingerprint, page)
    if pages > 0:
        digests.add(0, ids_payload(prompt[: pages * page]), sequence_length)
    return tuple(digests.pages)


def length_of(payload: Payload) -> int:
    """How many positions a payload holds, 0 if that cannot be told."""
    form = _form_of(payload)
    return form.count if form is not None else 0


def _is_one_position(payload: Payload) -> bool:
    """Is it a position of one row, whatever it holds of it?"""
    return "mask" not in payload and all(tensor.shape[:2] == (1, 1) for tensor in payload.values())


def _form_of(payload: Payload) -> _Form | None:
    """The payload as positions, None for what is not one row of them."""
    shapes = [tensor.shape for tensor in payload.values()]
    if not shapes or "mask" in payload or any(len(shape) < 2 for shape in shapes):
        return None
    count = shapes[0][1]
    if not count or {shape[:2] for shape in shapes} != {(1, count)}:
        return None
    names = sorted(payload)
    views = {name: memoryview(payload[name].data).cast("B") for name in names}
    kind = tuple((name, payload[name].dtype, payload[name].shape[2:]) for name in names)
    return _Form(kind, count, {name: (view, len(view) // count) for name, view in views.items()})


# --- histories in pages -----------------------------------------------------------------------


def leading_pages(history: History, page: int = PAGE_POSITIONS) -> int:
    """How many of the first entries are a page each, under its number as serial."""
    count = 0
    for entry in history.entries:
        if (entry.serial, entry.start) != (count + 1, count * page):
            break
        if length_of(entry.payload) != page:
            break
        count += 1
    return count


def paged(history: History, pages: int, page: int = PAGE_POSITIONS) -> list[Entry] | None:
    """The first `pages` pages of what was sent on, an entry each under its number as serial.

    Payloads that are pages already are shared. None if the history lacks any of it, or holds what
    cannot be cut into positions.
    """
    shared = history.entries[: min(pages, leading_pages(history, page))]
    entries = [replace(entry, wanted="none", wish=None, times=()) for entry in shared]
    runs = _runs(history.entries[len(entries) :], len(entries) * page)
    for number in range(len(entries), pages):
        joined = _joined(runs, number * page, (number + 1) * page)
        if joined is None:
            return None
        payload, length = joined
        entry = Entry(number + 1, number * page, payload, "none", sequence_length=length)
        entries.append(entry)
    return entries


_Run = tuple[int, int, _Form, int]  # from this position to that, what was sent on, and for which
# sequence length


def _runs(entries: Sequence[Entry], start: int) -> list[_Run]:
    """What was sent on from position `start`, as far as nothing is missing."""
    runs: list[_Run] = []
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        form = _form_of(entry.payload)
        if form is None or entry.start != start:
            break
        end = start + form.count
        if following is not None:  # what it rolled back of this one is not counted
            end = min(end, following.start)
        runs.append((start, end, form, entry.sequence_length))
        start = end
    return runs


def _joined(runs: Sequence[_Run], start: int, stop: int) -> tuple[Payload, int] | None:
    """The positions from `start` to `stop` as one payload, and for which sequence length; None if
    they do not fit or lack any.
    """
    first = bisect_right(runs, start, key=lambda run: run[0]) - 1
    within = list(takewhile(lambda run: run[0] < stop, runs[max(first, 0) :]))
    parts = [
        (form, max(start, begin) - begin, min(stop, end) - begin) for begin, end, form, _ in within
    ]
    kinds = {(form.kind, length) for _, _, form, length in within}
    if len(kinds) != 1 or sum(end - begin for _, begin, end in parts) != stop - start:
        return None
    ((kind, length),) = kinds
    payload = {
        name: Tensor(
            dtype,
            (1, stop - start, *tail),
            b"".join(_cut(form.views[name], begin, end) for form, begin, end in parts),
        )
        for name, dtype, tail in kind
    }
    return payload, length


def _cut(tensor: tuple[memoryview, int], begin: int, end: int) -> memoryview:
    view, size = tensor
    return view[begin * size : end * size]


# --- who holds what ---------------------------------------------------------------------------


@dataclass(slots=True)
class Pages:
    """What of a leg another may begin with: the pages it received and has computed."""

    received: Digests
    page: int = PAGE_POSITIONS
    length: int = 0  # computed positions that no admitted step rolls back
    shortest: int | None = None  # the least length at which its cache can be shared, as last told
    _end: int = 0  # of what was admitted
    _cuts: deque[tuple[int, int]] = field(default_factory=deque)  # serial, start of rollbacks
    _unread: list[tuple[int, Payload, int]] = field(default_factory=list)  # they complete no page

    @classmethod
    def begun(cls, fingerprint: str, page: int, digests: Sequence[bytes] = ()) -> "Pages":
        """Those of a leg that begins with these pages of another."""
        length = len(digests) * page
        return cls(Digests(fingerprint, page, digests), page, length, None, length)

    @property
    def digests(self) -> list[bytes]:
        """The digests of the pages that count."""
        return self.received.pages[: self.length // self.page]

    @property
    def count(self) -> int:
        """How many pages count."""
        return min(len(self.received.pages), self.length // self.page)

    def admitted(self, serial: int, start: int, payload: Payload, sequence_length: int = 0) -> None:
        """A step was admitted, and is not computed yet."""
        if start < self._end:
            self._cuts.append((serial, start))
            self.length = min(self.length, start)
        is_next = start == self._end and _is_one_position(payload)
        self._end = start + (1 if is_next else length_of(payload))
        self._unread.append((start, payload, sequence_length))
        # single ones can wait until a page is full: somebody waits for what comes of each
        if not is_next or self._end % self.page == 0 or len(self._unread) >= _MOST_UNREAD:
            for each in self._unread:
                self.received.add(*each)
            self._unread.clear()

    def computed(self, serial: int, end: int, shortest: int | None) -> None:
        """The step of this serial was computed, the cache is `end` positions long."""
        while self._cuts and self._cuts[0][0] <= serial:
            self._cuts.popleft()
        self.length = min([end, *(start for _, start in self._cuts)])
        self.shortest = shortest

    def gives(self, pages: int, *, is_idle: bool) -> bool:
        """May another leg begin with the first `pages`?

        A cache that cannot be cut back to any length is shared as it was last seen, or not: only
        while nothing waits to be computed in it.
        """
        if self.shortest is None or pages > self.count:
            return False
        return self.shortest <= 1 or (is_idle and self.shortest <= pages * self.page)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a new leg begins with: `pages` of the leg `of`, and what it would have sent on of them.

    `vouched`: the digests of what it would have sent on. Both are empty on a last hop.
    """

    of: int
    pages: Pages
    entries: tuple[Entry, ...]
    vouched: tuple[bytes, ...]


class Index:
    """Which legs hold which pages of which blocks; newest leg last."""

    def __init__(self, most: int = MOST_INDEXED) -> None:
        self._most = most
        self._size = 0
        self._holders: dict[tuple[str, bytes], dict[int, None]] = {}
        self._held: dict[int, list[bytes]] = {}
        self._spans: dict[int, str] = {}

    def __len__(self) -> int:
        return self._size

    def note(self, leg: int, span: str, digests: Sequence[bytes]) -> None:
        """Take over what this leg holds now."""
        self._spans[leg] = span
        held = self._held.setdefault(leg, [])
        while held and (len(held) > len(digests) or held[-1] != digests[len(held) - 1]):
            self._remove(leg, held.pop())
        for digest in digests[len(held) :]:
            if self._size >= self._most:
                return
            self._holders.setdefault((span, digest), {})[leg] = None
            self._size += 1
            held.append(digest)

    def forget(self, leg: int) -> None:
        """This leg holds nothing any more; unknown ones never did."""
        for digest in self._held.pop(leg, ()):
            self._remove(leg, digest)
        self._spans.pop(leg, None)

    def find(
        self, span: str, offered: Sequence[bytes], fits: Callable[[int, int], bool]
    ) -> tuple[int, int] | None:
        """Return the leg, and its pages, that holds most of those offered and fits; None if none.

        `fits(leg, pages)` says whether that leg can give so many.
        """
        for pages, digest in zip(range(len(offered), 0, -1), reversed(offered), strict=True):
            for leg in reversed(self._holders.get((span, digest), {})):
                if fits(leg, pages):
                    return leg, pages
        return None

    def _remove(self, leg: int, digest: bytes) -> None:
        span = self._spans[leg]
        holders = self._holders[span, digest]
        del holders[leg]
        self._size -= 1
        if not holders:
            del self._holders[span, digest]


def split(prefix: bytes) -> Iterator[bytes]:
    """The digests that an Open carries."""
    for place in range(0, len(prefix) - DIGEST_BYTES + 1, DIGEST_BYTES):
        yield prefix[place : place + DIGEST_BYTES]
