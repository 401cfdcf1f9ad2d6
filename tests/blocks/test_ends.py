"""Candidates are the best of a row of logits, in one order, with nothing lost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blocks.ends
from blocks.ends import CandidateWish, candidates, chosen
from blocks.errors import BlocksError, StepError

ROW = torch.tensor([[1.0, 5.0, 3.0, 5.0, 2.0, 4.0]])


def test_candidates_are_the_largest_sorted_and_equal_ones_by_lower_id() -> None:
    found = candidates(ROW, CandidateWish(3))
    assert found["tokens"].tolist() == [[1, 3, 5]]
    assert found["tokens"].dtype == torch.int32
    assert found["logits"].tolist() == [[5, 5, 4]]
    assert found["left"].item() == pytest.approx(ROW[0, [0, 2, 4]].logsumexp(0).item())
    assert found["named"].shape == (1, 0)


def test_of_equal_logits_at_the_edge_the_lowest_ids_are_taken() -> None:
    assert (
        candidates(torch.zeros(2, 1000), CandidateWish(5))["tokens"].tolist() == [[*range(5)]] * 2
    )


def test_zero_asks_for_all_and_leaves_nothing() -> None:
    found = candidates(ROW, CandidateWish(0))
    assert found["tokens"].tolist() == [[1, 3, 5, 2, 4, 0]]
    assert found["left"].item() == -math.inf


def test_penalised_ids_are_named_instead_of_chosen() -> None:
    found = candidates(ROW, CandidateWish(2, penalised=(3, 0)))
    assert found["tokens"].tolist() == [[1, 5]]
    assert found["named"].tolist() == [[5, 1]]
    assert found["left"].item() == pytest.approx(ROW[0, [2, 4]].logsumexp(0).item())


def test_bias_comes_before_choosing_and_its_ids_are_named_after_the_penalised() -> None:
    wish = CandidateWish(2, penalised=(5,), bias=((0, 10.0), (1, -9.0), (5, 1.0)))
    found = candidates(ROW, wish)
    assert found["tokens"].tolist() == [[0, 3]]
    assert found["named"].tolist() == [[5, 11, -4, 5]]


def test_only_allowed_ids_are_candidates_and_no_others_weigh() -> None:
    found = candidates(ROW, CandidateWish(9, penalised=(0, 2), allowed=(4, 5, 2)))
    assert found["tokens"].tolist() == [[5, 4]]
    assert found["named"].tolist() == [[-math.inf, 3]]
    assert found["left"].item() == -math.inf


def test_the_given_logits_are_left_as_they_were() -> None:
    row = ROW.clone()
    candidates(row, CandidateWish(2, penalised=(1,), bias=((0, 10.0),), allowed=(0, 1, 2)))
    assert row.equal(ROW)


@pytest.mark.parametrize(
    "wish",
    [
        CandidateWish(1, penalised=(6,)),
        CandidateWish(1, bias=((-1, 1.0),)),
        CandidateWish(1, allowed=(1, 6)),
        CandidateWish(1, allowed=()),
    ],
)
def test_a_wish_beyond_the_vocabulary_or_for_nothing_is_the_senders_fault(
    wish: CandidateWish,
) -> None:
    with pytest.raises(StepError):
        candidates(ROW, wish)


def test_an_impossible_wish_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="count >= 0"):
        CandidateWish(-1)
    with pytest.raises(ValueError, match="biases that are numbers"):
        CandidateWish(1, bias=((1, math.nan),))


def test_logits_that_are_not_numbers_are_our_error_not_the_senders() -> None:
    with pytest.raises(BlocksError, match="not numbers") as caught:
        candidates(torch.tensor([[1.0, math.nan]]), CandidateWish(1))
    assert not isinstance(caught.value, StepError)


IDS = st.integers(0, 11)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=12, max_size=12),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(0, 14),
    penalised=st.lists(IDS, max_size=4).map(tuple),
    bias=st.lists(st.tuples(IDS, st.sampled_from([-2.0, 1.5])), max_size=3).map(tuple),
    allowed=st.none() | st.lists(IDS, min_size=1, max_size=8).map(tuple),
)
def test_candidates_equal_a_plain_sort_of_every_row(
    rows: list[list[float]],
    count: int,
    penalised: tuple[int, ...],
    bias: tuple[tuple[int, float], ...],
    allowed: tuple[int, ...] | None,
) -> None:
    found = candidates(torch.tensor(rows), CandidateWish(count, penalised, bias, allowed))
    for number, row in enumerate(rows):
        values = list(row)
        for token, amount in bias:
            values[token] += amount
        ids = [token for token in range(12) if allowed is None or token in allowed]
        free = sorted(set(ids) - set(penalised), key=lambda token: (-values[token], token))
        taken = free[: count or None]
        assert found["tokens"][number].tolist() == taken
        assert found["logits"][number].tolist() == [values[token] for token in taken]
        named = [*penalised, *(token for token, _ in bias)]
        expected = [values[token] if token in ids else -math.inf for token in named]
        assert found["named"][number].tolist() == expected
        left = sum(math.exp(values[token]) for token in free[len(taken) :])
        assert math.exp(found["left"][number].item()) == pytest.approx(left)


WISHES = (
    CandidateWish(3),
    CandidateWish(0),
    CandidateWish(2, (0, 5), ((1, 2.0), (7, -1.0))),
    CandidateWish(4, (3,), (), (1, 2, 3, 8)),
)


@pytest.mark.parametrize("wish", WISHES)
def test_a_device_that_is_not_waited_for_chooses_the_same_and_says_who_has_no_numbers(
    wish: CandidateWish, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(-4, 5, (6, 12), generator=generator).float()
    rows[1] = -math.inf
    expected = candidates(rows, wish)
    sick = rows.clone()
    sick[2, 3] = sick[4] = math.nan
    monkeypatch.setattr(blocks.ends, "_places", blocks.ends._places_unseen)
    found, has_numbers = chosen(sick, wish)
    well = [0, 1, 3, 5]
    assert has_numbers[well].all()
    assert not has_numbers[2]
    for name, values in expected.items():
        torch.testing.assert_close(found[name][well], values[well], rtol=0, atol=0)


def test_a_bias_that_makes_no_number_names_no_id_beyond_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a device that is told to look there ends the process
    monkeypatch.setattr(blocks.ends, "_places", blocks.ends._places_unseen)
    rows = torch.full((2, 12), -math.inf)
    found, _ = chosen(rows, CandidateWish(5, bias=((3, math.inf),)))
    assert found["tokens"].min() >= 0
