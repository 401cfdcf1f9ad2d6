"""The streams of the explored chain: two queues each, which may break under their load."""

from collections import deque
from dataclasses import dataclass, field

from swarm.messages import FaultKind, Message

DOWN, UP = 0, 1  # towards who was dialled; towards who dialled


@dataclass(frozen=True, slots=True)
class End:
    """The last thing a side hears of a link."""

    how: FaultKind


@dataclass(slots=True)
class Link:
    """A stream between who dialled it (named `number`) and who was dialled (`-number`)."""

    number: int
    ends: tuple[str, str]  # who listens to DOWN, who listens to UP
    queues: list[deque[Message | End]] = field(default_factory=lambda: [deque(), deque()])
    listens: list[bool] = field(default_factory=lambda: [True, True])
    is_broken: bool = False
    is_new: bool = True

    def name_at(self, way: int) -> int:
        return -self.number if way == DOWN else self.number

    def cut(self, way: int, kept: int, how: FaultKind = "closed") -> None:
        """Lose what is in flight one way after `kept` messages."""
        if self.listens[way]:
            queue = self.queues[way]
            while len(queue) > kept:
                queue.pop()
            queue.append(End(how))
