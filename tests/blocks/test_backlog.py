"""What waits is counted, and no more is let in than may wait."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_models import some_ids

from blocks.backlog import STEP_BYTES, Backlog, bytes_of
from blocks.codec import to_raw


def test_a_step_takes_its_payload_and_what_carries_it() -> None:
    payload = {"ids": to_raw(some_ids(3)), "mask": to_raw(some_ids(2))}
    assert bytes_of(payload) == STEP_BYTES + 8 * 3 + 8 * 2


def test_who_lets_too_much_wait_is_at_fault_and_who_comes_when_others_do_is_not() -> None:
    backlog = Backlog(most=10, most_of_leg=6)
    backlog.add("a", 5)
    reason, is_fault = backlog.refusal("a", 2) or ("", None)
    assert (reason, is_fault) == ("5 bytes of this session wait already, and 2 more came", True)
    reason, is_fault = backlog.refusal("b", 6) or ("", None)
    assert (reason, is_fault) == ("5 bytes of steps wait already, and 6 more came", False)
    assert backlog.refusal("b", 5) is None


def test_a_step_waits_however_large_it_is_where_it_is_the_only_one() -> None:
    assert Backlog(most=10, most_of_leg=6).refusal("a", 1000) is None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 8), st.booleans())))
def test_no_leg_and_not_all_together_wait_with_more_than_they_may(
    events: list[tuple[str, int, bool]],
) -> None:
    backlog, waiting = Backlog(most=20, most_of_leg=9), list[tuple[str, int]]()
    for leg, size, is_arrival in events:
        if is_arrival and backlog.refusal(leg, size) is None:
            backlog.add(leg, size)
            waiting.append((leg, size))
        elif not is_arrival and waiting:
            backlog.remove(*waiting.pop(0))
        sizes = [size for _, size in waiting]
        assert (backlog.bytes, backlog.steps) == (sum(sizes), len(sizes))
        assert backlog.bytes <= 20
        for one in "abc":
            assert sum(size for leg, size in waiting if leg == one) <= 9
