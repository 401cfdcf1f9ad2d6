"""What waits to be computed, in bytes of memory, and how much may. Pure.

1. `bytes` is the sum over the steps added and not removed; so is what is known of each leg.
2. As long as nothing is added that `refusal` speaks against, no leg and not all together take
   more than they may.
"""

from collections import Counter
from collections.abc import Hashable

from blocks.codec import Payload

# What a step takes beside the bytes of its payload: on its way it is some twenty small objects, of
# which tracemalloc counts 1278 bytes.
STEP_BYTES = 1280


def bytes_of(payload: Payload) -> int:
    """Memory that a step with this payload takes while it waits."""
    return STEP_BYTES + sum(len(raw[2]) for raw in payload.values())


class Backlog:
    """The bytes that wait, overall and for each leg. Not safe between threads."""

    def __init__(self, most: int, most_of_leg: int) -> None:
        self._most, self._most_of_leg = most, most_of_leg
        self._of_legs: Counter[Hashable] = Counter()
        self.bytes = 0
        self.steps = 0

    def refusal(self, leg: Hashable, size: int) -> tuple[str, bool] | None:
        """Why a step of that size cannot wait, and whether its sender is at fault; None if it can.

        A step waits however large it is where nothing else of its leg does.
        """
        of_leg = self._of_legs[leg]
        if of_leg and of_leg + size > self._most_of_leg:
            return f"{of_leg} bytes of this session wait already, and {size} more came", True
        if self.bytes and self.bytes + size > self._most:
            return f"{self.bytes} bytes of steps wait already, and {size} more came", False
        return None

    def add(self, leg: Hashable, size: int) -> None:
        """A step of that size waits."""
        self._of_legs[leg] += size
        self.bytes += size
        self.steps += 1

    def remove(self, leg: Hashable, size: int) -> None:
        """It waits no longer."""
        self._of_legs[leg] -= size
        if not self._of_legs[leg]:
            del self._of_legs[leg]
        self.bytes -= size
        self.steps -= 1
