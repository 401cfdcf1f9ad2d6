"""Pages: what sessions have in common, told by what was received."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.chain import Entry, History, Payload
from swarm.prefix import MOST_PAGES, Digests, Index, Pages, digests_of, leading_pages, paged, split
from swarm.wire import Tensor

PAGE = 4


def ids(values: Sequence[int]) -> Payload:
    return {"ids": Tensor("int32", (1, len(values)), np.asarray(values, "<i4").tobytes())}


def hidden(values: Sequence[int], side: str = "side") -> Payload:
    """Two numbers a position, and something beside them."""
    return {
        "hidden": Tensor("float32", (1, len(values), 2), np.repeat(values, 2).astype("<f4").data),
        side: Tensor("int32", (1, len(values)), np.asarray(values, "<i4").tobytes()),
    }


def pages_of(values: Sequence[int], fingerprint: str = "f") -> list[bytes]:
    return list(split(digests_of([hidden(values)], fingerprint, PAGE)))


@dataclass
class Stream:
    """What one who receives has, kept in full."""

    values: list[int] = field(default_factory=list)

    def take(self, start: int, values: Sequence[int]) -> None:
        self.values[start:] = values


STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 11), st.integers(0, 2)), max_size=14)


@settings(derandomize=True)
@given(steps=STEPS)
def test_digests_are_those_of_what_is_left_however_it_was_cut_and_rolled_back(
    steps: list[tuple[int, int, int]],
) -> None:
    digests, stream = Digests("f", PAGE), Stream()
    for back, count, seed in steps:
        start = max(0, len(stream.values) - (back if seed else 0))
        values = [Random(seed).randrange(9) for _ in range(count)]
        stream.take(start, values)
        digests.add(start, hidden(values))
        whole = pages_of(stream.values)
        assert digests.pages == whole[: len(digests.pages)]
    shallow = all(back < PAGE for back, _, seed in steps if seed)
    if shallow:
        assert digests.pages == pages_of(stream.values)


def test_going_back_further_than_is_remembered_leaves_only_what_is_certain() -> None:
    digests = Digests("f", PAGE)
    digests.add(0, hidden(range(40)))
    digests.add(6, hidden([1, 2, 3]))
    assert digests.pages == pages_of(range(4))
    digests.add(9, hidden(range(10)))
    assert digests.pages == pages_of(range(4))
    digests.add(4, hidden(range(50, 58)))  # a page's begin is known for ever
    assert digests.pages == pages_of([*range(4), *range(50, 58)])


def test_a_digest_covers_all_before_it_the_model_and_the_form() -> None:
    base = pages_of(range(12))
    assert len(set(base)) == 3
    other = pages_of([9, *range(1, 12)])
    assert not set(base) & set(other)
    assert not set(base) & set(pages_of(range(12), "g"))
    assert not set(base) & set(split(digests_of([ids(range(12))], "f", PAGE)))
    renamed = split(digests_of([hidden(range(12), "edis")], "f", PAGE))
    assert not set(base) & set(renamed)


def test_digests_go_on_from_pages_that_another_received() -> None:
    values = range(20)
    digests = Digests("f", PAGE, pages_of(values)[:2])
    digests.add(8, hidden(values[8:11]))
    digests.add(11, hidden(values[11:]))
    assert digests.pages == pages_of(values)


def test_what_cannot_be_cut_into_positions_ends_the_pages() -> None:
    two_rows = {"ids": Tensor("int32", (2, 4), bytes(32))}
    masked = {**ids(range(4)), "mask": Tensor("int32", (1, 4), bytes(16))}
    for odd in (two_rows, masked, {}, {"ids": Tensor("int32", (4,), bytes(16))}):
        digests = Digests("f", PAGE)
        digests.add(0, ids(range(4)))
        digests.add(4, odd)
        digests.add(8, ids(range(4)))
        assert len(digests.pages) == 1


def test_a_payload_of_another_form_is_no_part_of_a_page() -> None:
    digests = Digests("f", PAGE)
    digests.add(0, ids(range(6)))
    digests.add(6, hidden(range(6)))
    assert len(digests.pages) == 1


def test_no_more_pages_are_told_than_an_open_carries() -> None:
    digests = Digests("f", 1)
    digests.add(0, ids(range(MOST_PAGES + 9)))
    assert len(digests.pages) == MOST_PAGES


def test_the_same_ids_in_a_text_of_another_regime_are_other_pages() -> None:
    short, long = Digests("f", PAGE), Digests("f", PAGE)
    short.add(0, hidden(range(2 * PAGE)))
    long.add(0, hidden(range(2 * PAGE)), 301)
    assert not set(short.pages) & set(long.pages)
    mixed = Digests("f", PAGE)
    mixed.add(0, hidden(range(PAGE + 1)))
    mixed.add(PAGE + 1, hidden(range(PAGE + 1, 2 * PAGE)), 301)
    assert mixed.pages == short.pages[:1]  # no page is of two


# --- histories in pages -------------------------------------------------------------------------


def history_of(*entries: tuple[int, Sequence[int]]) -> History:
    history = History()
    for serial, (start, values) in enumerate(entries, 1):
        history.append(Entry(serial, start, hidden(values), "last"))
    return history


def test_a_history_in_pages_holds_the_same_positions_under_the_pages_numbers() -> None:
    history = history_of((0, range(6)), (6, [6]), (7, [0, 0, 0]), (8, [8, 9]), (10, range(10, 14)))
    values = [*range(7), 0, *range(8, 14)]
    entries = paged(history, 3, PAGE)
    assert entries is not None
    assert [(entry.serial, entry.start, entry.wanted) for entry in entries] == [
        (1, 0, "none"),
        (2, 4, "none"),
        (3, 8, "none"),
    ]
    assert [entry.payload for entry in entries] == [
        {k: Tensor(t.dtype, t.shape, bytes(t.data)) for k, t in hidden(values[n : n + 4]).items()}
        for n in (0, 4, 8)
    ]
    assert paged(history, 4, PAGE) is None  # it has 14 positions


def test_pages_that_are_entries_already_are_shared() -> None:
    history = history_of((0, range(4)), (4, range(4, 8)), (8, range(9)))
    assert leading_pages(history, PAGE) == 2
    entries = paged(history, 3, PAGE)
    assert entries is not None
    shared = [old.payload is new.payload for old, new in zip(history.entries, entries, strict=True)]
    assert shared == [True, True, False]


def test_pages_of_a_history_say_of_how_long_a_text_they_are() -> None:
    history = History()
    for serial, (start, length) in enumerate([(0, 0), (3, 0), (6, 9), (9, 9), (12, 10)], 1):
        values = range(start, start + 3)
        history.append(Entry(serial, start, hidden(values), "last", sequence_length=length))
    assert paged(history, 2, PAGE) is None  # its second page is of two kinds
    whole = History()
    for serial, start in ((1, 0), (2, PAGE), (3, PAGE + 3)):
        count = PAGE if serial == 1 else 3
        part = hidden(range(start, start + count))
        whole.append(Entry(serial, start, part, "last", sequence_length=9))
    entries = paged(whole, 2, PAGE)
    assert entries is not None
    assert [entry.sequence_length for entry in entries] == [9, 9]


def test_a_history_that_lacks_something_has_no_pages() -> None:
    history = history_of((0, range(6)), (6, range(6)))
    history.drop(1)
    assert paged(history, 1, PAGE) is None
    gap = history_of((0, range(3)), (4, range(6)))
    assert paged(gap, 1, PAGE) is None
    outputs = History()
    outputs.append(Entry(1, 0, {}, "none"))
    outputs.append(Entry(2, 8, hidden(range(4)), "last"))
    assert paged(outputs, 1, PAGE) is None


# --- what a leg can give ------------------------------------------------------------------------


def begun() -> Pages:
    return Pages.begun("f", PAGE)


def test_pages_count_once_they_are_computed() -> None:
    pages = begun()
    pages.admitted(1, 0, hidden(range(10)))
    assert pages.digests == []
    pages.computed(1, 10, 1)
    assert pages.digests == pages_of(range(10))


def test_pages_that_a_waiting_step_rolls_back_count_no_more() -> None:
    pages = begun()
    pages.admitted(1, 0, hidden(range(8)))
    pages.admitted(2, 8, hidden(range(8, 12)))
    pages.admitted(3, 9, hidden([0] * 3))  # it ends as far as the one before
    pages.computed(1, 8, 1)
    pages.computed(2, 12, 1)
    assert pages.digests == pages_of(range(8))  # the cache still holds what is rolled back
    pages.computed(3, 12, 1)
    assert pages.digests == pages_of([*range(9), *[0] * 3])


def test_pages_of_a_step_that_takes_the_place_of_others_count_when_it_is_computed() -> None:
    pages = begun()
    pages.admitted(1, 0, hidden(range(12)))
    pages.computed(1, 12, 1)
    pages.admitted(2, 4, hidden([0] * 8))
    assert pages.digests == pages_of(range(4))
    pages.computed(2, 12, 1)
    assert pages.digests == pages_of([*range(4), *[0] * 8])


def test_a_cache_that_cannot_be_shared_gives_nothing() -> None:
    pages = begun()
    pages.admitted(1, 0, hidden(range(12)))
    pages.computed(1, 12, None)
    assert not pages.gives(1, is_idle=True)


def test_a_cache_that_forgets_gives_what_it_remembers_while_it_rests() -> None:
    pages = begun()
    pages.admitted(1, 0, hidden(range(12)))
    pages.computed(1, 12, 6)
    assert [pages.gives(count, is_idle=True) for count in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        False,
    ]
    assert not pages.gives(3, is_idle=False)


def test_a_leg_that_began_with_pages_counts_them() -> None:
    pages = Pages.begun("f", PAGE, pages_of(range(8)))
    assert pages.digests == pages_of(range(8))
    pages.admitted(3, 8, hidden(range(8, 12)))
    pages.computed(3, 12, 1)
    assert pages.digests == pages_of(range(12))


# --- the index ----------------------------------------------------------------------------------


def anyone(leg: int, pages: int) -> bool:
    return True


def test_the_longest_beginning_that_is_held_is_found_and_the_newest_who_holds_it() -> None:
    index = Index()
    index.note(1, "0:2", [b"a", b"b", b"c"])
    index.note(2, "0:2", [b"a", b"b"])
    index.note(3, "2:4", [b"a", b"b", b"c", b"d"])
    assert index.find("0:2", [b"a", b"b", b"c", b"d"], anyone) == (1, 3)
    assert index.find("0:2", [b"a", b"b"], anyone) == (2, 2)
    assert index.find("0:2", [b"x"], anyone) is None
    assert index.find("0:2", [b"a", b"b", b"c"], lambda leg, _: leg != 1) == (2, 2)
    index.forget(1)
    index.forget(2)
    index.forget(9)
    assert index.find("0:2", [b"a"], anyone) is None


@settings(derandomize=True)
@given(notes=st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 2), max_size=4))))
def test_the_index_knows_what_it_was_told_last(notes: list[tuple[int, list[int]]]) -> None:
    index, told = Index(), dict[int, list[bytes]]()
    for leg, values in notes:
        told[leg] = [bytes(values[: count + 1]) for count in range(len(values))]  # each covers all
        index.note(leg, "0:1", told[leg])
        assert len(index) == sum(map(len, told.values()))
    for digests in told.values():
        found = index.find("0:1", digests, anyone)
        assert found is None if not digests else found is not None and found[1] == len(digests)
    for leg in told:
        index.forget(leg)
    assert len(index) == 0


def test_the_index_is_bounded() -> None:
    index = Index(most=3)
    index.note(1, "0:1", [b"a", b"b"])
    index.note(2, "0:1", [b"c", b"d"])
    assert len(index) == 3
    assert index.find("0:1", [b"c", b"d"], anyone) == (2, 1)
    index.forget(1)
    index.note(2, "0:1", [b"c", b"d"])
    assert index.find("0:1", [b"c", b"d"], anyone) == (2, 2)
