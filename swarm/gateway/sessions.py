"""What the gateway asks of a swarm: its model, its servers, and sessions."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from swarm.client_session import ClientSession
from swarm.fetching import Model
from swarm.record import PeerRecord

Made = TypeVar("Made")


class Swarm(Protocol):
    """What the gateway needs of a `Client`."""

    @property
    def model(self) -> Model:
        """What is known of the model."""

    def session(
        self, max_tokens: int, *, prompt: Sequence[int] = ..., route_seconds: float = ...
    ) -> AbstractAsyncContextManager[ClientSession]:
        """Open a session with room for so many tokens, to begin with these."""

    def records(self) -> tuple[PeerRecord, ...]:
        """The servers known now."""

    def record_of(self, peer: str) -> PeerRecord | None:
        """What a server says of itself."""
