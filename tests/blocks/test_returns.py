"""Who is waited for before a joint pass, and for how long."""

import pytest

from blocks.returns import MOST_SECONDS, MOST_SHARE, Returns

PASS = 0.1  # seconds: its quarter is longer than MOST_SECONDS


def back_after(*seconds: float) -> Returns:
    """A leg that has come back so many times, so soon, and was answered at 0 once more."""
    returns = Returns()
    now = -100.0
    returns.came("leg", now)
    for each in seconds:
        returns.went("leg", now)
        now += each
        returns.came("leg", now)
    returns.went("leg", 0.0)
    return returns


def test_nobody_is_waited_for_who_has_never_come_back() -> None:
    assert Returns().worth_waiting(0.0, PASS) == 0.0
    assert back_after().worth_waiting(0.0, PASS) == 0.0


def test_who_is_near_is_waited_for_a_little_longer_than_usual_and_then_no_more() -> None:
    returns = back_after(0.002, 0.002)
    assert returns.worth_waiting(0.0, PASS) == pytest.approx(0.005)
    assert returns.worth_waiting(0.003, PASS) == pytest.approx(0.002)
    assert returns.worth_waiting(0.005, PASS) == pytest.approx(0.0)
    assert returns.worth_waiting(9.0, PASS) == 0.0


def test_who_is_far_is_not_waited_for_nor_who_is_far_beside_a_short_pass() -> None:
    assert back_after(0.011).worth_waiting(0.0, PASS) == 0.0
    assert back_after(0.002).worth_waiting(0.0, 0.007) == 0.0
    assert back_after(0.002).worth_waiting(0.0, 0.009) > 0.0


@pytest.mark.parametrize("pass_seconds", [0.0, 0.01, 0.1, 10.0])
def test_no_wait_is_longer_than_its_share_of_a_pass(pass_seconds: float) -> None:
    most = min(MOST_SHARE * pass_seconds, MOST_SECONDS)
    assert back_after(0.99 * most).worth_waiting(0.0, pass_seconds) == pytest.approx(most)


def test_who_has_come_is_not_waited_for_and_who_was_forgotten_never_was() -> None:
    returns = back_after(0.002)
    returns.came("leg", 0.001)
    assert returns.worth_waiting(0.001, PASS) == 0.0
    returns.went("leg", 0.002)
    returns.forget("leg")
    returns.forget("nobody")
    assert returns.worth_waiting(0.002, PASS) == 0.0
    assert len(returns) == 0


def test_a_leg_is_on_its_way_only_when_all_its_steps_are_answered() -> None:
    returns = back_after(0.002)
    for _ in range(3):
        returns.came("leg", 0.001)
    for _ in range(2):
        returns.went("leg", 0.002)
        assert returns.worth_waiting(0.002, PASS) == 0.0
    returns.went("leg", 0.002)
    assert returns.worth_waiting(0.002, PASS) > 0.0


def test_one_late_return_does_not_make_a_leg_a_far_one() -> None:
    assert back_after(0.002, 0.002, 0.02).worth_waiting(0.0, PASS) > 0.0
    assert back_after(0.002, 0.002, 0.2).worth_waiting(0.0, PASS) == 0.0
