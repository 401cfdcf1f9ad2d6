"""The budget's plan for a leg covers what a real cache takes as it grows."""

import pytest
import torch

from blocks.measure import cache_bytes_per_token
from routing.span import Span
from swarm.budget import PAGE_TOKENS, Asked, Budget
from swarm.loading import cache_bytes
from swarm.model import describe, load
from swarm.settings import DEMO_FOLDER

TOKENS = 4096


@pytest.mark.parametrize("step", [1, 7, 64, 200])
def test_no_cache_takes_more_than_was_planned_for_it(step: int) -> None:
    description = describe(DEMO_FOLDER)
    stack = load(description, Span(0, 2), "float32", "cpu")
    each = cache_bytes_per_token(stack)
    budget = Budget(TOKENS, cache_bytes(TOKENS, each, 0))
    budget.begun(1, Asked(session=1, promise=TOKENS), 0.0)
    cache, length = stack.new_cache(), 0
    while length < min(600, stack.context_length - step):
        length += step
        budget.ask(1, length, 0.0)
        budget.settle(0.0)
        planned = budget._charged
        stack.run(torch.zeros(1, step, dtype=torch.long), cache=cache, start=length - step)
        assert cache.byte_count <= planned
        budget.done(1, length, cache.byte_count, 0.0)
        assert cache.byte_count <= budget._charged <= 2 * each * (length + 2 * PAGE_TOKENS)


def test_caches_that_do_not_grow_have_half_of_what_is_free() -> None:
    assert 0 < cache_bytes(TOKENS, 0, 1000) < 500
