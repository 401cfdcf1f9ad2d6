"""One server of the explored chain: its legs, its executor, its grace timers, its memory."""

from collections import deque
from typing import Any

from chain_client import Scenario
from chain_stack import Stack

from swarm.chain import histories_to_drop
from swarm.legs import Legs
from swarm.messages import Open, Refused, Step


class Peer:
    """One server: its legs, its executor, its grace timers."""

    def __init__(self, scenario: Scenario, new_link: Any) -> None:
        self.room = scenario.room
        self.history_bytes = scenario.history_bytes
        self.new_link = new_link
        self.is_alive = True
        self.refusals = 0
        self.restart()

    def restart(self) -> None:
        self.is_draining = False
        self.legs = Legs(self.admission, self.new_link)
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

    def save_memory(self) -> bool:
        """Drop what does not fit, as a server does. True if anything was dropped."""
        excess = self.legs.history_bytes - self.history_bytes
        dropped = histories_to_drop(self.legs.spares(), excess)
        for number in dropped:
            self.legs.drop_history(number)
        return bool(dropped)
