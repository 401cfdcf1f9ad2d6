"""The users' rows of scripts/bench.py: ratios are made within a round, figures are medians."""

import pytest
from bench_users import figures, ratio


def test_a_noisy_round_moves_no_ratio() -> None:
    quiet = [1.0, 1.0, 1.0, 1.0, 1.0]
    noisy = [1.0, 0.1, 1.0, 3.0, 1.0]  # all ways suffer alike in a round
    ways = {
        f"{way}_{users}": [speed * noise for noise in noisy]
        for way, one in (("users", 8.0), ("stack", 10.0))
        for users, speed in ((1, one), (4, one * 3), (16, one * 9))
    }
    found = figures(ways, {1: quiet, 4: quiet, 16: [0.9, 0.1, 0.8, 0.8, 0.9]})
    assert found["users_4_over_one"] == pytest.approx(3.0)
    assert found["users_16_over_one"] == pytest.approx(9.0)
    assert found["users_16_over_stack"] == pytest.approx(0.8)
    assert found["users_1_over_stack"] == pytest.approx(0.8)
    assert found["users_16_slowest"] == 0.8
    assert found["stack_16_tokens_per_second"] == pytest.approx(90.0)


def test_ratios_pair_what_was_measured_in_one_round() -> None:
    assert ratio([2.0, 3.0, 40.0], [1.0, 2.0, 10.0]) == 2.0
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])
