"""Agreeing on a protocol, in any cuts, with any bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.host.negotiation import Answerer, NotSpoken, Proposer, line, proposal


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_both_sides_agree_and_lose_nothing_in_any_cuts(size: int) -> None:
    answerer, proposer = Answerer(lambda p: p == "/x/1"), Proposer("/x/1")
    reply = b"".join(answerer.feed(piece) for piece in cut(proposal("/x/1") + b"first", size))
    assert answerer.chosen == "/x/1"
    assert answerer.rest() == b"first"
    rest = b"".join(proposer.feed(piece) for piece in cut(reply + b"answer", size))
    assert proposer.is_done
    assert rest == b"answer"


def test_a_second_proposal_is_taken_when_the_first_is_not_spoken() -> None:
    answerer = Answerer(lambda p: p == "/noise")
    reply = answerer.feed(proposal("/tls/1.0.0") + line(b"/noise"))
    assert answerer.chosen == "/noise"
    assert reply == line(b"/multistream/1.0.0") + line(b"na") + line(b"/noise")


@pytest.mark.parametrize("answer", [b"na", b"/x/2"])
def test_another_answer_than_the_one_proposed_is_a_no(answer: bytes) -> None:
    with pytest.raises(NotSpoken, match="/x/1"):
        Proposer("/x/1").feed(line(b"/multistream/1.0.0") + line(answer))


def test_endless_proposals_end() -> None:
    answerer = Answerer(lambda _: False)
    answerer.feed(line(b"/multistream/1.0.0"))
    with pytest.raises(NotSpoken, match="too many"):
        answerer.feed(b"".join(line(b"/x/%d" % number) for number in range(100)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=20))
def test_arbitrary_bytes_raise_nothing_but_not_spoken(pieces: list[bytes]) -> None:
    for side in (Answerer(lambda _: False), Proposer("/x/1")):
        try:
            for piece in (line(b"/multistream/1.0.0"), *pieces):
                side.feed(piece)
        except NotSpoken:
            pass


def test_a_protocol_id_too_long_for_a_line_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="too long"):
        proposal("/" + "x" * 200)
