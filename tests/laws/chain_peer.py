"""One server of the explored chain: its legs, its executor, its grace timers, its memory."""

from collections import deque
from typing import Any

from chain_client import Scenario
from chain_stack import Stack

from swarm.chain import histories_to_drop
from swarm.leg import Compute, Forget, Fork, Grace, Keep
from swarm.legs import Legs
from swarm.messages import Open, Refused, Step
from swarm.sharing import Sharing


class Peer:
    """One server: its legs, its executor, its grace timers."""

    def __init__(self, scenario: Scenario, new_link: Any) -> None:
        self.room = scenario.room
        self.history_bytes = scenario.history_bytes
        self.waiting_bytes = scenario.waiting_bytes
        self.page = scenario.page
        self.new_link = new_link
        self.is_alive = True
        self.refusals = 0
        self.restart()

    def restart(self) -> None:
        self.is_draining = False
        self.sharing = Sharing("f", page=self.page)
        self.legs = Legs(self.admission, self.new_link, self.waiting_bytes, self.sharing)
        self.stacks: dict[int, Stack] = {}
        self.steps: dict[int, deque[Step]] = {}
        self.timers: set[int] = set()
        self.broken: set[int] = set()  # legs whose executor fails from here on

    def admission(self, opened: Open) -> Refused | None:
        if self.refusals:
            self.refusals -= 1
            return Refused(reason="full")
        if self.is_draining:
            return Refused(reason="draining")
        return Refused(reason="full") if len(self.legs) >= self.room else None

    @property
    def has_stray_stacks(self) -> bool:
        """True if a cache is held of a leg that is neither here nor kept."""
        legs = {leg.number for leg in self.legs.legs()}
        return any(leg not in legs and leg not in self.sharing for leg in self.stacks)

    def carry_out(self, action: object) -> None:
        """Do what concerns neither links nor the client."""
        match action:
            case Compute(leg=leg, step=step):
                self.steps.setdefault(leg, deque()).append(step)
            case Fork(leg=leg, of=donor, length=length):
                self.stacks[leg] = self.stacks[donor].fork(length)
            case Keep(leg=leg):
                if self.steps.pop(leg, None):
                    raise AssertionError("a leg is kept while steps of it wait")
                self.timers.add(leg)
            case Forget(leg=leg):
                self.steps.pop(leg, None)
                self.stacks.pop(leg, None)
                self.broken.discard(leg)
            case Grace(leg=leg, is_running=True):
                self.timers.add(leg)
            case Grace(leg=leg):
                self.timers.discard(leg)

    def to_drop(self) -> list[int]:
        """The legs whose histories do not fit, as a server finds them."""
        held = self.legs.history_bytes + self.sharing.history_bytes
        return histories_to_drop(self.legs.spares(), held - self.history_bytes)
