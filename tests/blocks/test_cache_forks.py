"""Caches that share what they have in common go on as if they never had."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BLOCKS, WINDOW, TinyModel, some_ids, whole_logits

from blocks.cache import StackCache
from blocks.errors import BlocksError, StepError
from blocks.growing import ROLLBACK_TOKENS
from blocks.load import load_stack
from blocks.stack import Stack

Get = Callable[[str, bool], TinyModel]

FORKING = ("llama", "gemma3_text", "deepseek_v3", "deepseek_v32", "bloom", "gemma3n_text")
MOST = 120  # positions: the tiny models end at 128


@dataclass
class Session:
    """A cache, and what was done with it: ids it went on with, lengths it went back to."""

    cache: StackCache
    done: tuple[torch.Tensor | int, ...] = ()

    @property
    def ids(self) -> torch.Tensor:
        held = some_ids(0)
        for one in self.done:
            held = held[:, :one] if isinstance(one, int) else torch.cat([held, one], dim=1)
        return held


@pytest.fixture(scope="module")
def stacks(tiny_model: Get) -> Callable[[str], tuple[TinyModel, Stack]]:
    loaded: dict[str, tuple[TinyModel, Stack]] = {}

    def get(family: str) -> tuple[TinyModel, Stack]:
        if family not in loaded:
            model = tiny_model(family, False)
            loaded[family] = model, load_stack(model.checkpoint, 0, BLOCKS)
        return loaded[family]

    return get


Stacks = Callable[[str], tuple[TinyModel, Stack]]


def begun(stack: Stack, count: int = 0) -> Session:
    session = Session(stack.new_cache())
    if count:
        go_on(stack, session, count, 0)
    return session


def go_on(stack: Stack, session: Session, count: int, seed: int) -> torch.Tensor:
    more = some_ids(count, seed=seed)
    session.done = (*session.done, more)
    cache = session.cache
    return stack.run(more, cache=cache, start=cache.length, logits_for=0)


def go_back(session: Session, length: int) -> None:
    session.cache.rollback(length)
    session.done = (*session.done, length)


def fork(session: Session, length: int) -> Session:
    return Session(session.cache.fork(length), (*session.done, length))


def assert_alone(stack: Stack, session: Session) -> None:
    """What the session says next is what it would have said had it never shared anything."""
    cache = stack.new_cache()
    for one in session.done:
        if isinstance(one, int):
            cache.rollback(one)
        else:
            stack.run(one, cache=cache, start=cache.length, logits_for=0)
    more = some_ids(2, seed=99)
    alone = stack.run(more, cache=cache, start=cache.length, logits_for=0)
    assert torch.equal(go_on(stack, session, 2, 99), alone)


def assert_whole(model: TinyModel, stack: Stack, session: Session) -> None:
    """What the session says next is what the whole model says after its ids, in 64 bits.

    In 32 bits gemma3n_text is off by up to 4e-5 itself, more on some CPUs than on others: what
    the whole model is off by for these ids is allowed beside the usual 1e-5.
    """
    ours = go_on(stack, session, 2, 99)
    whole = copy.deepcopy(model.whole).double()
    whole.set_experts_implementation("eager")  # the grouped product has no 64 bits
    with torch.inference_mode():
        exact = whole(input_ids=session.ids, use_cache=False).logits
    own = float((whole_logits(model, session.ids) - exact).abs().max())
    assert exact.std() > 0.1
    torch.testing.assert_close(ours.double(), exact[:, -2:], rtol=0, atol=1e-5 + own)


Change = tuple[str, int, int]  # what, of which session, how much
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("go on", "go on", "fork", "fork", "back", "drop")),
        st.integers(0, 30),
        st.integers(1, 40),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(changes=CHANGES, first=st.integers(1, 90))
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v32"])
def test_a_cache_and_its_forks_go_on_in_any_order_as_if_nothing_were_shared(
    stacks: Stacks, family: str, changes: list[Change], first: int
) -> None:
    _, stack = stacks(family)
    sessions = [begun(stack, first)]
    for place, (what, which, amount) in enumerate(changes, 1):
        session = sessions[which % len(sessions)]
        length = session.cache.length
        if what == "go on" and length + amount < MOST:
            go_on(stack, session, amount, seed=place)
        elif what == "fork":
            shortest = session.cache.shortest_fork
            assert shortest is not None
            sessions.append(fork(session, max(shortest, length - amount)))
        elif what == "back" and session.cache.can_roll_back(max(1, length - amount)):
            go_back(session, max(1, length - amount))
        elif what == "drop" and len(sessions) > 1:
            sessions.remove(session)
    for session in sessions:
        assert_alone(stack, session)


@pytest.mark.parametrize("family", FORKING)
def test_a_fork_and_its_donor_say_what_the_whole_model_says(stacks: Stacks, family: str) -> None:
    model, stack = stacks(family)
    donor = begun(stack, 40)
    forked = fork(donor, 32)
    assert forked.cache.length == 32
    go_on(stack, donor, 3, seed=1)
    go_on(stack, forked, 5, seed=2)
    go_back(donor, 20)
    go_on(stack, donor, 30, seed=3)
    assert_whole(model, stack, forked)
    assert_whole(model, stack, donor)


def test_a_fork_copies_nothing_before_it_goes_on(stacks: Stacks) -> None:
    _, stack = stacks("llama")
    donor = begun(stack, 40)
    forked = fork(donor, 32)
    places = [layer.keys.data_ptr() for layer in donor.cache.held]
    assert [layer.keys.data_ptr() for layer in forked.cache.held] == places
    go_on(stack, donor, 1, seed=1)  # behind what the fork looks at: in place
    assert [layer.keys.data_ptr() for layer in donor.cache.held] == places
    go_back(donor, 20)
    go_on(stack, donor, 1, seed=1)  # now it has rooms of its own
    places = [layer.keys.data_ptr() for layer in donor.cache.held]
    go_on(stack, donor, 1, seed=1)
    assert [layer.keys.data_ptr() for layer in donor.cache.held] == places


def test_a_fork_lives_on_when_its_donor_is_dropped(stacks: Stacks) -> None:
    model, stack = stacks("llama")
    donor = begun(stack, 40)
    forked = fork(donor, 40)
    go_back(donor, 0)
    go_on(stack, donor, 40, seed=5)
    del donor
    assert_whole(model, stack, forked)


def test_a_sliding_family_forks_no_further_back_than_a_draft_may_go(stacks: Stacks) -> None:
    _, stack = stacks("gemma3_text")
    session = begun(stack)
    for _ in range(3):
        go_on(stack, session, MOST // 3, seed=1)
    shortest = session.cache.shortest_fork
    assert shortest is not None
    assert WINDOW < shortest <= MOST - ROLLBACK_TOKENS
    with pytest.raises(BlocksError, match="cannot be forked"):
        session.cache.fork(shortest - 1)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_mamba"])
def test_recurrent_families_have_no_forks(stacks: Stacks, family: str) -> None:
    _, stack = stacks(family)
    session = begun(stack, 10)
    assert session.cache.shortest_fork is None
    with pytest.raises(BlocksError, match="cannot be forked"):
        session.cache.fork(10)


def test_there_is_no_fork_of_nothing_nor_of_more_than_is_held(stacks: Stacks) -> None:
    _, stack = stacks("llama")
    session = begun(stack)
    assert session.cache.shortest_fork is None
    go_on(stack, session, 10, seed=0)
    assert session.cache.shortest_fork == 1
    for length in (0, 11):
        with pytest.raises(StepError, match="10 are held"):
            session.cache.fork(length)


def test_a_torn_cache_has_no_forks(stacks: Stacks) -> None:
    _, stack = stacks("llama")
    session = begun(stack, 10)
    session.cache.begin(1)
    assert session.cache.shortest_fork is None
    with pytest.raises(BlocksError, match="cannot be forked"):
        session.cache.fork(5)
