"""Clients take turns, and so do the legs of a client."""

from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from blocks.turns import Turns


def turns_of(*legs: str) -> Turns:
    """Legs by name, the first letter of which is their client's."""
    turns = Turns()
    for leg in legs:
        turns.add(leg[0], leg)
    return turns


def served(turns: Turns, count: int) -> list[Hashable]:
    """Who has the next turns, if everybody comes back at once."""
    order = []
    for _ in range(count):
        leg = str(next(iter(turns)))
        turns.had(leg[0], leg)
        turns.add(leg[0], leg)
        order.append(leg)
    return order


def test_a_client_with_many_legs_has_no_more_turns_than_one_with_one() -> None:
    assert served(turns_of("a1", "a2", "a3", "b1"), 8) == [
        *("a1", "b1", "a2", "b1", "a3", "b1", "a1", "b1")
    ]


def test_all_are_told_in_rounds_of_one_leg_of_each_client() -> None:
    assert list(turns_of("a1", "a2", "b1", "a3", "c1", "c2")) == [
        *("a1", "b1", "c1", "a2", "c2", "a3")
    ]


def test_who_leaves_without_a_turn_costs_its_client_none() -> None:
    turns = turns_of("a1", "a2", "b1")
    turns.remove("a", "a1")
    assert list(turns) == ["a2", "b1"]
    turns.remove("a", "a2")
    assert list(turns) == ["b1"]
    turns.remove("b", "b1")
    assert not turns


def test_who_comes_back_is_behind_all_who_wait() -> None:
    turns = turns_of("a1", "b1")
    turns.had("a", "a1")
    turns.add("c", "c1")
    turns.add("a", "a1")
    assert list(turns) == ["b1", "c1", "a1"]


events = st.lists(
    st.tuples(
        st.sampled_from(["come", "turn", "turn", "leave"]),
        st.builds("{}{}".format, st.sampled_from("abc"), st.integers(1, 3)),
    )
)


@given(events)
def test_between_two_turns_of_who_waits_nobody_beside_it_has_two(
    events: list[tuple[str, str]],
) -> None:
    turns, waiting = Turns(), list[str]()
    since: dict[str, list[str]] = {}  # of each client and leg that waits: whose turns it saw
    for event, leg in events:
        client = leg[0]
        if event == "come" and leg not in waiting:
            turns.add(client, leg)
            waiting.append(leg)
            since.setdefault(client, [])
            since[leg] = []
        elif event == "leave" and leg in waiting:
            turns.remove(client, leg)
            waiting.remove(leg)
            del since[leg]
        elif event == "turn" and turns:
            leg = str(next(iter(turns)))
            turns.had(leg[0], leg)
            waiting.remove(leg)
            for name, seen in since.items():
                if len(name) == 1:
                    seen.append(leg[0])
                elif name[0] == leg[0]:
                    seen.append(leg)
            since[leg[0]] = []
            del since[leg]
        for name in set(since) - {one[0] for one in waiting} - set(waiting):
            del since[name]
        for name, seen in since.items():
            others = [one for one in seen if one != name]
            assert len(others) == len(set(others)), name
        assert sorted(map(str, turns)) == sorted(waiting)
