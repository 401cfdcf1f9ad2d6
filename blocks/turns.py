"""Whose turn it is: clients take turns, and so do the legs of a client. Pure.

1. Between two turns for which a client waits, every other client has one at most.
2. Between two turns for which a leg waits, every other leg of its client has one at most.
3. Who comes, or comes back, is behind all who wait.
"""

from collections.abc import Hashable, Iterator


class Turns:
    """Legs that wait for passes of one kind, by client; both in the order of their turns."""

    def __init__(self) -> None:
        self._clients: dict[Hashable, dict[Hashable, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Hashable]:
        """The first leg of each client, then the second of each that has one, and so on."""
        rounds = [iter(legs) for legs in self._clients.values()]
        while rounds:
            going_on = []
            for legs in rounds:
                leg = next(legs, None)
                if leg is not None:
                    yield leg
                    going_on.append(legs)
            rounds = going_on

    def add(self, client: Hashable, leg: Hashable) -> None:
        """Let a leg wait, that did not."""
        self._clients.setdefault(client, {})[leg] = None

    def had(self, client: Hashable, leg: Hashable) -> None:
        """The leg had its turn: it waits no longer, and its client is behind the others."""
        legs = self._clients.pop(client)
        del legs[leg]
        if legs:
            self._clients[client] = legs

    def remove(self, client: Hashable, leg: Hashable) -> None:
        """The leg waits no longer, though it had no turn."""
        legs = self._clients[client]
        del legs[leg]
        if not legs:
            del self._clients[client]

    def clear(self) -> None:
        """Nobody waits."""
        self._clients.clear()
