"""What sessions leave behind for others that begin alike. Sans-IO, part of `swarm.legs`.

A leg whose session was closed in good order is **kept**: cache and history stay for a while, for
sessions that begin with the same pages. Legs whose sessions go on are shared from as well.

1. A new leg begins with pages only if a leg here holds them that can give them, cache and history:
   what it then sends on, it can send on from the first position.
2. Kept legs are bounded in number and time, and are the first to go when memory is short.
3. What a longer kept leg can give, no shorter one is kept for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from swarm.chain import Entry, History, Spare
from swarm.leg import Leg
from swarm.messages import Open
from swarm.prefix import (
    PAGE_POSITIONS,
    Beginning,
    Digests,
    Index,
    Pages,
    leading_pages,
    paged,
    split,
)

MOST_KEPT = 64
KEEP_SECONDS = 600.0  # a reader's pause between two questions; and no text stays longer


@dataclass(slots=True)
class _Kept:
    """What is left of a leg."""

    span: str
    pages: Pages
    history: History
    vouched: tuple[bytes, ...]


class Sharing:
    """What the legs of one server may begin with. `on_drop` is told of kept legs that go."""

    on_drop: Callable[[int], None]

    def __init__(
        self, fingerprint: str, *, page: int = PAGE_POSITIONS, most_kept: int = MOST_KEPT
    ) -> None:
        """`fingerprint`: of the model served. `page`: positions; with 0 nothing is shared."""
        self.page = page
        self._fingerprint = fingerprint
        self._most_kept = most_kept
        self._index = Index()
        self._legs: dict[int, Leg] = {}  # those that may give something
        self._kept: dict[int, _Kept] = {}  # longest unused first
        self.history_bytes = 0  # that the histories of kept legs take

    def __contains__(self, number: int) -> bool:
        return number in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def spares(self) -> Iterator[Spare]:
        """What dropping each kept leg would free of histories, longest unused first."""
        for number, kept in self._kept.items():
            yield Spare(number, kept.history.byte_count)

    def empty(self) -> Pages | None:
        """The pages of a leg that begins with nothing; None where nothing is shared."""
        return Pages.begun(self._fingerprint, self.page) if self.page else None

    def beginning(self, opened: Open) -> Beginning | None:
        """What the leg that this Open begins can begin with, None for nothing."""
        hop = opened.hops[opened.at]
        if not opened.prefix or not self.page or hop.mode == "anew":
            return None
        offered = list(split(opened.prefix))
        del offered[max(0, opened.max_tokens - 1) // self.page :]
        is_last = opened.at + 1 == len(opened.hops)
        gives = partial(self._gives, is_last=is_last)
        found = self._index.find(hop.span, offered, gives)
        if found is None:
            return None
        number, pages = found
        if number in self._kept:
            self._kept[number] = self._kept.pop(number)
        entries, vouched = ((), ()) if is_last else self._sent_on(number, pages)
        if not is_last and not entries:
            return None
        received = Pages.begun(self._fingerprint, self.page, offered[:pages])
        return Beginning(number, received, entries, vouched)

    def note(self, leg: Leg) -> None:
        """Take over what this leg can give now."""
        if leg.is_spent or leg.pages is None:
            self.leave(leg.number)
            return
        self._legs[leg.number] = leg
        self._index.note(leg.number, leg.span, leg.pages.digests)

    def leave(self, number: int) -> None:
        """A leg with this number is no more, or its cache is not."""
        self._legs.pop(number, None)
        self._index.forget(number)

    def keep(self, leg: Leg) -> bool:
        """Keep what is left of a leg whose session is over, if it is worth it. False if not."""
        pages = leg.pages
        if pages is None or not self._is_worth_keeping(leg, pages):
            self.leave(leg.number)
            return False
        for number, kept in tuple(self._kept.items()):
            count = kept.pages.count
            is_less = kept.span == leg.span and kept.pages.digests == pages.digests[:count]
            if is_less and pages.gives(count, is_idle=True):
                self.drop(number)
        self._legs.pop(leg.number, None)
        self._index.note(leg.number, leg.span, pages.digests)
        self._kept[leg.number] = _Kept(leg.span, pages, leg.history, leg.vouched)
        self.history_bytes += leg.history.byte_count
        while len(self._kept) > self._most_kept:
            self.drop(next(iter(self._kept)))
        return True

    def drop(self, number: int) -> None:
        """Let a kept leg go; unknown ones are none's fault."""
        kept = self._kept.pop(number, None)
        if kept is not None:
            self.history_bytes -= kept.history.byte_count
            self._index.forget(number)
            self.on_drop(number)

    def end(self) -> None:
        """Let all kept legs go, and keep none from now on."""
        self._most_kept = 0
        for number in tuple(self._kept):
            self.drop(number)

    def _is_worth_keeping(self, leg: Leg, pages: Pages) -> bool:
        is_whole = leg.is_last or not leg.history.dropped
        if leg.is_spent or leg.is_busy or not is_whole or not self._most_kept:
            return False
        if not pages.count or not pages.gives(pages.count, is_idle=True):
            return False
        return not any(  # a longer one gives as much
            kept.span == leg.span
            and kept.pages.count > pages.count
            and kept.pages.digests[pages.count - 1] == pages.digests[-1]
            and kept.pages.gives(pages.count, is_idle=True)
            for kept in self._kept.values()
        )

    def _gives(self, number: int, pages: int, *, is_last: bool) -> bool:
        kept, leg = self._kept.get(number), self._legs.get(number)
        giver, is_idle = (kept, True) if leg is None else (leg, not leg.is_busy)
        if giver is None or giver.pages is None or (giver.history.dropped and not is_last):
            return False
        return giver.pages.gives(pages, is_idle=is_idle)

    def _sent_on(self, number: int, pages: int) -> tuple[tuple[Entry, ...], tuple[bytes, ...]]:
        """What the leg sent on of its first pages, in pages, and their digests; nothing if it does
        not have it any more.
        """
        giver = self._kept.get(number) or self._legs[number]
        entries = paged(giver.history, pages, self.page)
        if entries is None:
            return (), ()
        if len(giver.vouched) >= pages:
            return tuple(entries), giver.vouched[:pages]
        sent = Digests(self._fingerprint, self.page)
        for entry in entries:
            sent.add(entry.start, entry.payload, entry.sequence_length)
        vouched = tuple(sent.pages)
        if leading_pages(giver.history, self.page) >= pages:
            giver.vouched = vouched  # others will ask for the same
        return tuple(entries), vouched
