"""Who comes when no more answers may be generated waits in order, within bounds."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from gateway_world import MODEL, ScriptedSwarm, application_of, ask
from trio.testing import MockClock

from swarm.gateway.desk import Desk
from swarm.gateway.faults import ApiError
from swarm.gateway.settings import GatewaySettings


class Visitors:
    """Who holds room at a desk, and what became of the others."""

    def __init__(self, **bounds: Any) -> None:
        self.desk = Desk(ScriptedSwarm("x"), GatewaySettings(**bounds))
        self.served: list[str] = []
        self.refused: dict[str, ApiError] = {}

    async def visit(self, name: str, answers: int = 1, seconds: float = 10.0) -> None:
        try:
            async with self.desk.room_for(answers):
                self.served.append(name)
                await trio.sleep(seconds)
        except ApiError as error:
            self.refused[name] = error

    @property
    def waiting(self) -> float:
        lines = self.desk.meter.text().decode().splitlines()
        return next(float(x.split()[1]) for x in lines if x.startswith("num_requests_waiting "))


def run(body: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await body(nursery)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def come(nursery: trio.Nursery, visit: Any, *arguments: Any) -> None:
    nursery.start_soon(visit, *arguments)
    await trio.testing.wait_all_tasks_blocked()


def test_who_comes_first_is_served_first_and_a_large_one_is_not_passed_by() -> None:
    found = Visitors(most_running=3)

    async def body(nursery: trio.Nursery) -> None:
        for name, answers in (("a", 2), ("b", 3), ("c", 1), ("d", 1), ("e", 2)):
            await come(nursery, found.visit, name, answers)
        assert found.served == ["a"]  # c has room, and waits behind b
        assert found.waiting == 4
        await trio.sleep(11)
        assert found.served == ["a", "b"]
        await trio.sleep(10)
        assert sorted(found.served[2:]) == ["c", "d"]  # at once

    run(body)
    assert found.served[4:] == ["e"]
    assert not found.refused
    assert found.waiting == 0


def test_a_queue_that_is_full_or_too_slow_says_when_to_come_again() -> None:
    found = Visitors(most_running=2, most_waiting=3, queue_seconds=25.0)

    async def body(nursery: trio.Nursery) -> None:
        await come(nursery, found.visit, "warm", 1, 40.0)
        await trio.sleep(100)
        for name, answers in (("a", 2), ("b", 2), ("c", 1)):
            await come(nursery, found.visit, name, answers, 20.0)
        await come(nursery, found.visit, "d", 1)
        assert found.refused["d"].status == 429
        assert "2 of 2" in found.refused["d"].message
        assert "3 wait" in found.refused["d"].message
        seconds = int(found.refused["d"].headers["retry-after"])
        assert 4 < seconds < 40  # four answers, two at a time, of about nine seconds
        await trio.sleep(24)
        assert "c" not in found.refused

    run(body)
    assert found.served == ["warm", "a", "b"]
    assert list(found.refused) == ["d", "c"]


def test_who_leaves_the_queue_leaves_nothing_in_it() -> None:
    found = Visitors(most_running=2)

    async def body(nursery: trio.Nursery) -> None:
        await come(nursery, found.visit, "a", 1, 50.0)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                await come(waiting, found.visit, "large", 2)
                await come(nursery, found.visit, "b", 1, 50.0)
                assert found.served == ["a"]
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert found.served == ["a", "b"]  # at once: the large one in front has left
        assert found.waiting == 0

    run(body)


def test_a_hundred_at_once_are_all_answered() -> None:
    made: list[int] = []

    async def body(nursery: trio.Nursery) -> None:
        app = application_of(ScriptedSwarm("Hello."))
        asking = {"model": MODEL, "prompt": "Hi", "temperature": 0}

        async def one(number: int) -> None:
            body = {**asking, "stream": number % 2 == 0}
            made.append((await ask(app, "/v1/completions", body)).status)

        async with trio.open_nursery() as crowd:
            for number in range(100):
                crowd.start_soon(one, number)
        text = (await ask(app, "/metrics")).body.decode()
        assert "num_requests_waiting 0.0" in text
        assert "num_requests_running 0.0" in text

    run(body)
    assert made == [200] * 100


def test_a_client_that_hangs_up_in_the_queue_is_never_answered() -> None:
    swarm = ScriptedSwarm("Hello.")

    async def body(nursery: trio.Nursery) -> None:
        app = application_of(swarm, most_running=1, answer_seconds=30.0)
        asking = {"model": MODEL, "prompt": "Hi"}
        stuck = trio.Event()
        swarm.session = _never(stuck)  # type: ignore[method-assign]
        nursery.start_soon(ask, app, "/v1/completions", asking)
        await stuck.wait()
        gone = trio.Event()

        async def impatient() -> None:
            await ask(app, "/v1/completions", asking, hang_up=gone)

        await come(nursery, impatient)
        assert "num_requests_waiting 1.0" in (await ask(app, "/metrics")).body.decode()
        gone.set()
        await trio.testing.wait_all_tasks_blocked()
        assert "num_requests_waiting 0.0" in (await ask(app, "/metrics")).body.decode()

    run(body)
    assert not swarm.sessions


def _never(begun: trio.Event) -> Any:
    class Stuck(AsyncExitStack):
        async def __aenter__(self) -> Any:
            begun.set()
            await trio.sleep_forever()

    return lambda *_words, **_more: Stuck()


@pytest.mark.parametrize("count", [1, 32])
def test_a_place_is_given_back_however_an_answer_ends(count: int) -> None:
    async def body(nursery: trio.Nursery) -> None:
        app = application_of(ScriptedSwarm("Hello."), most_running=32)
        asking = {"model": MODEL, "prompt": "Hi", "temperature": 0, "n": count}
        for _ in range(3):
            bad = {**asking, "guided_choice": []}
            assert (await ask(app, "/v1/completions", bad)).status == 400
            assert (await ask(app, "/v1/completions", asking)).status == 200

    run(body)
