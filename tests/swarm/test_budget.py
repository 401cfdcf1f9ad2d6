"""Whose cache may grow, who waits, who gives way, and when they come back."""

import pytest
from budget_world import Plan, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.budget import (
    IDLE_SECONDS,
    MOST_RETRY_SECONDS,
    OVERCOMMIT,
    PAGE_TOKENS,
    PATIENCE_SECONDS,
    Asked,
    Budget,
    Evict,
    Run,
)

TOKENS = 1024
PAGE = PAGE_TOKENS


def budget(tokens: int = TOKENS, byte_count: int = TOKENS) -> Budget:
    return Budget(tokens, byte_count)


def begin(made: Budget, leg: int, promise: int = TOKENS, positions: int = 0, at: float = 0) -> None:
    asked = Asked(session=leg, promise=promise, positions=positions)
    assert made.refusal(asked, at) is None
    made.begun(leg, asked, at)
    made.settle(at)


def step(made: Budget, leg: int, length: int, at: float = 0.0) -> list[Run | Evict]:
    made.ask(leg, length, at)
    return made.settle(at)


def stepped(made: Budget, leg: int, length: int, at: float = 0.0, taken: int = 0) -> None:
    """A step that finds room, and is done."""
    assert step(made, leg, length, at) == [Run(leg)]
    made.done(leg, length, taken, at)
    assert made.settle(at) == []


def free(made: Budget, at: float = 0.0) -> int:
    return made._room(at)


def test_a_session_is_charged_what_it_has_and_a_page_not_what_it_promised() -> None:
    made = budget()
    begin(made, 1)
    assert free(made) == TOKENS - PAGE
    stepped(made, 1, 50)
    assert free(made) == TOKENS - 2 * PAGE
    stepped(made, 1, PAGE + 1)
    assert free(made) == TOKENS - 3 * PAGE


def test_nobody_is_charged_more_than_was_promised() -> None:
    made = budget()
    begin(made, 1, promise=10)
    assert free(made) == TOKENS - 10


def test_promises_may_exceed_the_memory_so_many_times_and_no_more() -> None:
    made = budget()
    for leg in range(1, OVERCOMMIT + 1):
        begin(made, leg, promise=TOKENS)
    assert free(made) > 0
    assert made.free_tokens(0.0) == 0
    assert made.refusal(Asked(session="more", promise=1), 0.0) is not None
    made.forget(1)
    assert made.free_tokens(0.0) == TOKENS


@pytest.mark.parametrize("used", [0, 300, 700, 900, 960, 1023])
def test_what_is_announced_as_free_is_the_longest_session_that_would_be_admitted(used: int) -> None:
    made = budget()
    begin(made, 1, promise=TOKENS)
    if used:
        step(made, 1, used)
    longest = made.free_tokens(0.0)
    assert made.refusal(Asked(session="more", promise=longest), 0.0) is None
    assert made.refusal(Asked(session="more", promise=longest + 1), 0.0) is not None


def test_a_session_longer_than_all_memory_is_never_admitted() -> None:
    asked = Asked(session="long", promise=TOKENS + 1)
    assert budget().refusal(asked, 0.0) == MOST_RETRY_SECONDS


def test_a_session_that_brings_much_is_admitted_only_if_all_of_it_fits() -> None:
    made = budget()
    begin(made, 1)
    step(made, 1, 640)
    for positions, fits in ((256, True), (257, False)):
        asked = Asked(session="back", promise=TOKENS, positions=positions)
        assert (made.refusal(asked, 0.0) is None) == fits


def test_a_leg_of_half_the_blocks_is_charged_half() -> None:
    made = budget()
    asked = Asked(session=1, promise=TOKENS, share=0.5)
    made.begun(1, asked, 0.0)
    assert free(made) == TOKENS - PAGE // 2


def test_bytes_that_the_executor_tells_count_where_they_are_more_than_planned() -> None:
    made = budget(byte_count=100 * TOKENS)
    begin(made, 1)
    stepped(made, 1, 10, taken=30_000)
    assert free(made) == 100 * TOKENS - 30_000


def test_layers_that_stop_growing_are_charged_what_they_take() -> None:
    """A window of 64 positions takes no more after a thousand."""
    made = budget(byte_count=100 * TOKENS)
    begin(made, 1)
    stepped(made, 1, 900, taken=6_400)
    assert free(made) >= 100 * TOKENS - 2 * 6_400 - 100 * 2 * PAGE


def test_idle_sessions_give_way_the_longest_idle_first() -> None:
    made = budget()
    for leg, at in ((1, 0.0), (2, 0.5), (3, 1.0)):
        begin(made, leg, at=at)
        stepped(made, leg, 250, at=at)
    began = 1.0 + IDLE_SECONDS
    assert step(made, 3, 400, at=began) == [Evict(1, 0.0), Run(3)]
    assert free(made, began) > 0


def test_a_session_that_is_not_idle_for_long_enough_keeps_its_cache() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 400)
    assert step(made, 2, 700, at=IDLE_SECONDS - 0.1) == []
    assert made.settle(IDLE_SECONDS) == [Evict(1, 0.0), Run(2)]


def test_idle_sessions_give_way_to_a_newcomer() -> None:
    made = budget()
    begin(made, 1)
    stepped(made, 1, TOKENS)
    asked = Asked(session="new", promise=TOKENS)
    assert made.refusal(asked, 0.0) is not None
    assert made.refusal(asked, IDLE_SECONDS) is None
    made.begun(2, asked, IDLE_SECONDS)
    assert made.settle(IDLE_SECONDS) == [Evict(1, 0.0)]


def test_an_older_session_takes_what_the_newest_has() -> None:
    made = budget()
    for leg in (1, 2, 3):
        begin(made, leg)
        stepped(made, leg, 256)
    (evicted, run) = step(made, 1, 512)
    assert isinstance(evicted, Evict)
    assert (evicted.leg, run) == (3, Run(1))
    assert evicted.retry_seconds > 0, "there is no room for it now"


def test_the_newest_waits_and_nobody_newer_overtakes_it() -> None:
    made = budget()
    for leg, length in ((1, 320), (2, 256), (3, 100)):
        begin(made, leg)
        stepped(made, leg, length)
    assert step(made, 3, 300) == [], "older ones hold what it lacks"
    begin(made, 4, promise=2 * PAGE)
    assert step(made, 4, PAGE // 2, at=0.1) == [], "there is room for it, but it is newer"
    begin(made, 5, promise=PAGE // 2, at=0.1)
    assert step(made, 5, PAGE // 2, at=0.1) == [Run(5)], "it needs no more than it has"
    made.done(5, PAGE // 2, 0, 0.1)
    made.forget(1)
    assert made.settle(0.2) == [Run(3), Run(4)]


def test_a_leg_with_a_step_in_the_executor_is_waited_for() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 320)
    assert step(made, 2, 321) == [Run(2)]
    assert step(made, 1, 640) == [], "the newest computes"
    assert made.settle(10 * PATIENCE_SECONDS) == [], "and the oldest never gives way"
    made.done(2, 321, 0, 1.0)
    decided = made.settle(1.0)
    assert [type(each) for each in decided] == [Evict, Run]
    assert [each.leg for each in decided] == [2, 1]


def test_steps_of_a_leg_that_is_to_give_way_are_not_begun() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 320)
    step(made, 2, 321)
    step(made, 1, 640)
    assert step(made, 2, 322) == []
    made.done(2, 321, 0, 1.0)
    assert [each.leg for each in made.settle(1.0)] == [2, 1]


def test_who_waits_too_long_gives_way() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 384)
    step(made, 1, 385)  # and computes for long
    assert step(made, 2, 600) == []
    assert made.next_look(0.0) == PATIENCE_SECONDS
    (evicted,) = made.settle(PATIENCE_SECONDS)
    assert isinstance(evicted, Evict)
    assert evicted.leg == 2
    assert evicted.retry_seconds > 0


def test_one_alone_goes_on_whatever_it_takes() -> None:
    made = budget(byte_count=100 * TOKENS)
    begin(made, 1)
    stepped(made, 1, 10, taken=10**9)
    assert step(made, 1, 11) == [Run(1)]


def test_a_reservation_that_nobody_uses_is_lost_without_a_word() -> None:
    made = budget()
    begin(made, 1)
    begin(made, 2)
    stepped(made, 1, TOKENS - PAGE, at=IDLE_SECONDS)
    assert step(made, 2, 10, at=IDLE_SECONDS + 0.1) == [], "it asks like any other"
    assert made.settle(2 * IDLE_SECONDS) == [Evict(1, 0.0), Run(2)]


def test_who_gave_way_comes_back_before_newcomers() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 448)
    (evicted, _) = step(made, 1, 512)
    assert evicted.leg == 2
    made.done(1, 512, 0, 0.1)
    newcomer = Asked(session="new", promise=600)
    assert made.refusal(newcomer, 0.1) is not None, "what is free is kept for the other"
    back = Asked(session=2, promise=TOKENS, positions=448)
    assert made.refusal(back, 0.1) is not None, "it does not fit yet"
    made.forget(1)
    assert made.refusal(back, 0.2) is None
    made.begun(3, back, 0.2)
    assert made.refusal(newcomer, 0.2) is None


def test_a_place_is_kept_for_a_while_only() -> None:
    made = budget()
    for leg in (1, 2):
        begin(made, leg)
        stepped(made, leg, 448)
    step(made, 1, 512)
    newcomer = Asked(session="new", promise=100)
    assert made.refusal(newcomer, 0.1) is not None
    assert made.refusal(newcomer, MOST_RETRY_SECONDS + 10) is None


def test_when_to_come_back_is_guessed_from_who_is_about_to_be_idle_or_to_end() -> None:
    made = budget()
    begin(made, 1, promise=TOKENS)
    for n in range(1, 11):
        stepped(made, 1, 101 * n, at=float(n))  # a step a second, and 14 to come
    asked = Asked(session="new", promise=64, positions=200)
    ends = made.refusal(asked, 10.0)
    assert ends == pytest.approx(14)
    pausing = made.refusal(asked, 10.0 + 0.6 * IDLE_SECONDS)
    assert pausing == pytest.approx(0.4 * IDLE_SECONDS), "it will be idle before"


def test_four_sessions_with_half_the_memory_they_need_all_end_with_few_replays() -> None:
    made = serve([Plan(0.01 * n, 200, 1000, 1000) for n in range(4)], tokens=2100)
    assert all(told.ended for told in made.sessions)
    assert sum(told.evictions for told in made.sessions) <= 4
    assert [told.evictions for told in made.sessions[:2]] == [0, 0], "the oldest never gives way"


def test_a_steady_stream_of_newcomers_starves_nobody() -> None:
    old = [Plan(0.0, 500, 1000, 1000), Plan(0.1, 500, 1000, 1000)]
    made = serve([*old, *(Plan(0.2 * n, 60, 120, 120) for n in range(1, 200))], tokens=1400)
    last = max(told.ended or 0.0 for told in made.sessions)
    assert all(told.ended for told in made.sessions)
    assert all((told.ended or 0.0) < last / 2 for told in made.sessions[:2])


plans = st.builds(
    lambda at, prompt, more, spare, pause: Plan(
        at=at / 10,
        prompt=prompt,
        length=prompt + more,
        promise=min(prompt + more + spare, TOKENS),
        pause_at=prompt + more // 2 if pause else 0,
        pause_seconds=pause,
    ),
    st.integers(0, 100),
    st.integers(1, 500),
    st.integers(1, 400),
    st.integers(0, 2000),
    st.sampled_from([0.0, 0.0, 1.0, 3.0, 20.0]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(plans, min_size=1, max_size=10), st.booleans())
def test_whatever_comes_all_end_within_the_memory_and_with_bounded_replays(
    asked: list[Plan], tells_bytes: bool
) -> None:
    made = serve(asked, tokens=TOKENS, tells_bytes=tells_bytes)
    assert all(told.ended is not None for told in made.sessions)
    assert not made.evicted_running
    assert made.most_charged <= TOKENS
    assert not made.budget._legs
    assert made.budget._charged == 0
    for told in made.sessions:
        # Each eviction, but those while it paused, lets another go on by a page at least.
        assert told.evictions <= 1 + 2 * sum(each.length for each in asked) // PAGE


# --- what is kept of sessions that are over -----------------------------------------------------


def test_a_kept_cache_counts_as_free_and_promises_nothing() -> None:
    made = budget()
    begin(made, 1)
    stepped(made, 1, TOKENS // 2)
    made.keep(1)
    assert free(made) == made.free_tokens(0) == TOKENS
    for leg in range(2, 2 + OVERCOMMIT):  # all that may be promised
        begin(made, leg)


def test_a_kept_cache_is_the_first_to_go_and_keeps_no_place_in_the_line() -> None:
    made = budget()
    begin(made, 1)
    stepped(made, 1, 6 * PAGE)
    begin(made, 2)
    stepped(made, 2, 4 * PAGE)
    made.keep(2)
    late = IDLE_SECONDS + 1  # by now the first is idle, and has been for longer
    begin(made, 3, at=late)
    assert step(made, 3, 6 * PAGE, late) == [Evict(2, 0.0), Run(3)]
    assert not made._line


def test_a_leg_that_began_with_pages_is_charged_for_them_and_gives_way_when_idle() -> None:
    made = budget()
    begin(made, 1)
    stepped(made, 1, 8 * PAGE)
    made.keep(1)
    begin(made, 2)
    made.forked(2, 7 * PAGE)
    assert made.settle(0.0) == [Evict(1, 0.0)]  # both do not fit
    assert free(made) == TOKENS - 8 * PAGE
    late = IDLE_SECONDS + 1
    begin(made, 3, at=late)
    assert step(made, 3, 12 * PAGE, late) == [Evict(2, 0.0), Run(3)]
