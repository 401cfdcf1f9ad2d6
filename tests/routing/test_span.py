from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.span import Span, even_spans, spans_of


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 20))
    return Span(start, start + draw(st.integers(1, 10)))


def test_a_span_is_written_as_it_is_read() -> None:
    assert Span.parse("8:16") == Span(8, 16)
    assert str(Span(8, 16)) == "8:16"


@pytest.mark.parametrize(
    "text", ["", "8", "8:", ":8", "8-16", " 8:16", "8:16\n", "-1:4", "٨:٩", "a:b"]
)
def test_what_is_not_written_as_a_span_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="written like 8:16"):
        Span.parse(text)


@pytest.mark.parametrize("ends", [(4, 4), (5, 4), (-1, 4)])
def test_an_empty_or_negative_span_cannot_be_built(ends: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= start < stop"):
        Span(*ends)


@given(spans(), spans())
def test_relations_of_spans_are_those_of_their_sets_of_blocks(one: Span, other: Span) -> None:
    ours, theirs = set(one.blocks), set(other.blocks)
    assert len(one) == len(ours)
    assert one.overlaps(other) == bool(ours & theirs)
    assert one.covers(other) == (theirs <= ours)
    assert all((block in one) == (block in ours) for block in range(40))


@given(st.sets(st.integers(0, 30)))
def test_spans_of_blocks_hold_exactly_these_and_never_touch(blocks: set[int]) -> None:
    found = spans_of(blocks)
    assert [block for span in found for block in span.blocks] == sorted(blocks)
    assert all(left.stop < right.start for left, right in pairwise(found))


def test_spans_are_as_even_as_they_can_be_and_never_empty() -> None:
    assert even_spans(8, 3) == (Span(0, 2), Span(2, 5), Span(5, 8))
    assert even_spans(2, 5) == (Span(0, 1), Span(1, 2))


@pytest.mark.parametrize(("blocks", "parts"), [(0, 1), (1, 0)])
def test_nothing_is_cut_into_nothing(blocks: int, parts: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        even_spans(blocks, parts)
