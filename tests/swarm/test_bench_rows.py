"""Rows, shares and parts of benches: arithmetic on what was measured."""

import pytest

from swarm.bench.rows import (
    PARTS,
    CodecSeconds,
    Row,
    TokenTimes,
    breakdown,
    hop_means,
    mixed_lengths,
    parse_counts,
    parse_lengths,
    percentile,
    slowest_over_median,
    speed_text,
)
from swarm.errors import BadInput
from swarm.messages import HopTime


def token(began: float, *hops: tuple[float, float]) -> TokenTimes:
    """A token of 100 ms: 10 ms to the write, 80 ms away, 10 ms after the answer came."""
    return TokenTimes(
        began=began,
        written=began + 0.010,
        came=began + 0.090,
        ended=began + 0.100,
        hops=tuple(HopTime(*hop) for hop in hops),
    )


TIMES = [token(0.0, (0.020, 0.002), (0.030, 0.004)), token(0.1, (0.022, 0.004), (0.032, 0.006))]
CODEC = CodecSeconds(client=0.001, hops=0.002)


def test_a_row_tells_the_mean_and_the_standard_deviation_of_its_samples() -> None:
    row = Row(test="tg8", users=1, tokens=8, samples=(1.0, 2.0, 3.0, 4.0))
    facts = row.facts()
    assert facts["tokens_per_second"] == 2.5
    assert facts["deviation_tokens_per_second"] == pytest.approx(1.2910, abs=1e-4)
    assert speed_text(facts) == "2.50 ± 1.29"
    assert Row(test="tg8", users=1, tokens=8, samples=(3.0,)).deviation == 0.0


def test_each_part_of_a_tokens_time_is_who_spent_it() -> None:
    parts = breakdown(TIMES, 0.012, CODEC)
    expected = {
        "compute": 0.052,
        "queue": 0.008,
        "link": 0.012,
        "codec": 0.003,
        "waiting": 0.019,  # 20 ms in the client, less what it spent on frames
        "other": 0.006,  # 80 ms away, less all that the hops and links account for
        "total": 0.1,
    }
    assert parts == pytest.approx(expected)


@pytest.mark.parametrize("link", [0.0, 0.012, 5.0])
def test_the_parts_add_up_to_the_time_per_token(link: float) -> None:
    parts = breakdown(TIMES, link, CODEC)
    assert sum(parts[name] for name in PARTS) == pytest.approx(parts["total"])
    assert parts.keys() == {*PARTS, "total"}


def test_no_token_takes_no_time() -> None:
    assert set(breakdown([], 1.0, CODEC).values()) == {0.0}


def test_each_hop_has_its_own_mean_and_a_token_over_another_route_counts_for_none() -> None:
    means = hop_means([*TIMES, token(0.2, (9.0, 9.0))], 2)
    assert [tuple(round(part, 6) for part in (hop.computed, hop.waited)) for hop in means] == [
        (0.021, 0.003),
        (0.031, 0.005),
    ]
    assert hop_means([], 2) == []


def test_percentiles_lie_between_the_least_and_the_most() -> None:
    values = [float(n) for n in range(1, 102)]
    assert (percentile(values, 50), percentile(values, 95)) == (51.0, 96.0)
    assert (percentile([], 50), percentile([2.0], 95)) == (0.0, 2.0)


def test_the_slowest_is_compared_with_the_median() -> None:
    assert slowest_over_median([4.0, 1.0, 2.0]) == 0.5
    assert slowest_over_median([0.0, 0.0]) == 1.0


def test_lengths_are_spread_over_the_range_ends_included() -> None:
    assert mixed_lengths(5, 200, 4) == [5, 70, 135, 200]
    assert mixed_lengths(5, 201, 1) == [103]


def test_counts_and_lengths_are_read_or_refused_by_name() -> None:
    assert parse_counts("1,4,16,4", "--users") == (1, 4, 16)
    assert (parse_lengths("5-200", "--prompts"), parse_lengths("7", "--prompts")) == (
        (5, 200),
        (7, 7),
    )
    for text in ("", "0", "1,x", "-3"):
        with pytest.raises(BadInput, match="--users"):
            parse_counts(text, "--users")
    for text in ("", "0-5", "9-5", "a-b"):
        with pytest.raises(BadInput, match="--prompts"):
            parse_lengths(text, "--prompts")
