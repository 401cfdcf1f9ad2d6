"""The way back of a session whose joined step broke half way.

A step that breaks alone costs its own session a new start. One that breaks in a pass with others
would cost all of them theirs, for what may be the fault of one, or a moment's lack of memory.

1. Saving copies no tensor. It relies on what joined steps do with a session's own: keys and values
   are written behind those held, recurrent states not before the step is computed
   (`blocks.join`). After a step of a session by itself nothing of this holds.
2. A restored cache is as it was, and no longer torn.
"""

from typing import Any

from blocks.cache import StackCache


class Savepoint:
    """What the layers of a cache hold at this moment. Lives no longer than one joined step."""

    def __init__(self, cache: StackCache) -> None:
        self._cache = cache
        self._held = [_copied(vars(layer)) for layer in cache.held]

    def restore(self) -> None:
        """Bring it back, whatever a joined step has stored since."""
        for layer, stored in zip(self._cache.held, self._held, strict=True):
            vars(layer).clear()
            vars(layer).update(_copied(stored))
        self._cache.is_torn = False


def _copied(stored: dict[str, Any]) -> dict[str, Any]:
    """The names of what a layer stores; recurrent states are dictionaries of their own."""
    return {
        name: dict(value) if isinstance(value, dict) else value for name, value in stored.items()
    }
