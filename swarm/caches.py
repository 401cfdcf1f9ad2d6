"""The caches of a server's legs: carries out, in time, what the budget decides.

1. A step reaches the executor only when there is room for what it adds; those of a leg in order.
2. Results that come back, legs that end and time that passes are all told to the budget.
"""

from collections import deque
from collections.abc import Callable

import trio

from routing.span import Span
from swarm.budget import Asked, Budget, Evict
from swarm.leg import Compute, step_length
from swarm.messages import Open
from swarm.worker import Worker

OnEvict = Callable[[int, float], None]
"""Called with a leg's number, and after how many seconds it may begin anew."""


class Caches:
    """What the legs of one server may keep in memory. `run` is awaited by its owner."""

    def __init__(self, budget: Budget, span: Span, worker: Worker, on_evict: OnEvict) -> None:
        self._budget = budget
        self._span = span
        self._worker = worker
        self._on_evict = on_evict
        self._held: dict[int, deque[Compute]] = {}
        self._news = trio.Event()

    @property
    def free_tokens(self) -> int:
        """The length of the longest session that would be admitted now."""
        return self._budget.free_tokens(trio.current_time())

    def refusal(self, opened: Open, span: Span) -> float | None:
        """None if a leg may begin with this Open, else after how many seconds to ask again."""
        return self._budget.refusal(self._asked(opened, span), trio.current_time())

    def begun(self, leg: int, opened: Open) -> None:
        """A leg that was not refused begins."""
        span = Span.parse(opened.hops[opened.at].span)
        self._budget.begun(leg, self._asked(opened, span), trio.current_time())

    def compute(self, action: Compute) -> None:
        """A step is to be computed, as soon as there is room."""
        self._held.setdefault(action.leg, deque()).append(action)
        length = action.step.start + step_length(action.step)
        self._budget.ask(action.leg, length, trio.current_time())

    def done(self, leg: int, length: int, taken_bytes: int) -> None:
        """The executor has done a step: the cache has so many positions and takes so much, 0 if
        that is not known.
        """
        self._budget.done(leg, length, taken_bytes, trio.current_time())

    def fork(self, leg: int, of: int, length: int) -> None:
        """A leg that has just begun takes over the first positions of another."""
        self._budget.forked(leg, length)
        self._worker.fork(leg, of, length)

    def keep(self, leg: int) -> None:
        """The session of this leg is over; its cache stays while nobody else needs the room."""
        self._budget.keep(leg)

    def forget(self, leg: int) -> None:
        """The leg is no more, or was evicted."""
        self._held.pop(leg, None)
        self._budget.forget(leg)
        self._worker.forget(leg)

    def settle(self) -> None:
        """Run what there is room for, evict what must give way. After all of the above."""
        self._decide()
        if self._held:
            self._news.set()

    def _decide(self) -> None:
        for decision in self._budget.settle(trio.current_time()):
            if isinstance(decision, Evict):
                self._on_evict(decision.leg, decision.retry_seconds)
                continue
            held = self._held[decision.leg]
            action = held.popleft()
            if not held:
                del self._held[decision.leg]
            span = Span.parse(action.span)
            self._worker.compute(action.leg, span.blocks, action.step, action.client)

    async def run(self) -> None:
        """Look again when time alone may have changed something, until cancelled."""
        while True:
            delay = self._budget.next_look(trio.current_time())
            with trio.move_on_after(float("inf") if delay is None else delay):
                await self._news.wait()
            self._news = trio.Event()
            self._decide()

    def _asked(self, opened: Open, span: Span) -> Asked:
        return Asked(
            session=(opened.client, opened.session),
            promise=opened.max_tokens,
            positions=min(opened.positions, opened.max_tokens),
            share=len(span) / len(self._span),
        )
