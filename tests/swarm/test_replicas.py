"""Who is hurt by a blow, and who comes back: decided here, over processes that are not real."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from routing.span import Span
from swarm.cable import Cable
from swarm.chaos_plan import Blow, Kind
from swarm.errors import SwarmError
from swarm.replicas import Replica, Replicas


@dataclass
class Puppet:
    """A process that notes what it is told, and dies of a kill."""

    signals: list[int] = field(default_factory=list)
    code: int | None = None
    stdout: None = None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.code = -9

    def poll(self) -> int | None:
        return self.code

    async def wait(self) -> int:
        while self.code is None:
            await trio.sleep_forever()
        return self.code


class Puppets(Replicas):
    """Replicas whose fresh servers are puppets too."""

    def __init__(self, names: str) -> None:
        super().__init__(Path(), Path(), cast(Any, None), has_cables=False)
        for name in names:
            self.put(name, Span(0, 2))

    def put(self, name: str, span: Span) -> None:
        puppet = cast(trio.Process, Puppet())
        self.all.append(Replica(puppet, span, Cable(), trio.CancelScope(), name, "token"))

    async def add(self, span: Span) -> None:
        self.put("fresh", span)

    def signals(self, peer: str) -> list[int]:
        replica = next(replica for replica in self.all if replica.peer == peer)
        return cast(Any, replica.process).signals

    def strike_at(self, hop: float, kind: Kind = "kill", *, returns: bool = False) -> str | None:
        route = [(replica, "0:2") for replica in "abc"]
        blow = Blow(text=0, position=1, kind=kind, hop=hop, delay=0.0, returns=returns)
        victim = self.strike(route, blow)
        return victim.peer if victim else None


@pytest.mark.parametrize(("hop", "victim"), [(0.0, "a"), (0.33, "a"), (0.34, "b"), (0.99, "c")])
def test_a_blow_falls_on_the_hop_that_it_names(hop: float, victim: str) -> None:
    assert Puppets("abcd").strike_at(hop) == victim


def test_a_hop_that_was_hurt_is_passed_over_and_nobody_off_the_route_is_hurt() -> None:
    puppets = Puppets("abcd")
    assert [puppets.strike_at(0.5) for _ in range(4)] == ["b", "c", "a", None]
    assert puppets.signals("d") == []


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("close", [signal.SIGTERM]),
        ("kill", [signal.SIGKILL]),
        ("stop", [signal.SIGSTOP]),
        ("cut", []),
    ],
)
def test_each_kind_hurts_in_its_own_way(kind: Kind, told: list[int]) -> None:
    puppets = Puppets("abc")
    puppets.strike_at(0.0, kind)
    assert puppets.signals("a") == told
    assert puppets.all[0].cable.is_cut is (kind == "cut")


@pytest.mark.parametrize("kind", ["stop", "cut"])
@pytest.mark.parametrize("returns", [True, False])
def test_the_silenced_come_back_as_they_were_or_are_replaced(kind: Kind, returns: bool) -> None:
    async def main() -> None:
        puppets = Puppets("abc")
        puppets.strike_at(0.0, kind, returns=returns)
        await puppets.restore()
        peers = {replica.peer for replica in puppets.serving()}
        if returns:
            assert peers == {"a", "b", "c"}
            assert puppets.signals("a")[-1] == signal.SIGCONT
            assert not puppets.all[0].cable.is_cut
        else:
            assert peers == {"fresh", "b", "c"}

    trio.run(main)


def test_one_that_does_not_end_its_drain_is_killed_and_replaced() -> None:
    async def main() -> None:
        puppets = Puppets("abc")
        puppets.strike_at(0.0, "close")
        leaving = puppets.all[0]
        await puppets.restore()
        assert cast(Any, leaving.process).signals == [signal.SIGTERM, signal.SIGKILL]
        assert {replica.peer for replica in puppets.serving()} == {"fresh", "b", "c"}

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_server_that_ended_unprovoked_is_an_error_not_a_replacement() -> None:
    async def main() -> None:
        puppets = Puppets("abc")
        cast(Any, puppets.all[1].process).code = 1
        with pytest.raises(SwarmError, match="nobody had hurt it"):
            await puppets.restore()

    trio.run(main)
