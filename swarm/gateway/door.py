"""The address of the API, taken before anything is loaded: what cannot be had is told at once."""

import socket
from dataclasses import dataclass

from swarm.errors import BadInput
from swarm.gateway.settings import GatewaySettings

BACKLOG = 256


@dataclass(frozen=True, slots=True)
class Door:
    """An address that is ours, and what is to be answered there. Whoever opened it closes it."""

    settings: GatewaySettings
    bound: socket.socket

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self.bound.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def listen(self) -> int:
        """Begin to listen; return the socket's number, which the caller closes. BadInput if
        somebody was faster.
        """
        try:
            self.bound.listen(BACKLOG)
        except OSError as error:
            raise _not_to_be_had(self.settings, error) from error
        return self.bound.detach()


def open_door(settings: GatewaySettings) -> Door:
    """Take the address. BadInput if it is not to be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise _not_to_be_had(settings, error) from error
    return Door(settings, bound)


def _not_to_be_had(settings: GatewaySettings, error: OSError) -> BadInput:
    return BadInput(
        f"the API cannot listen on {settings.host}:{settings.port}: {error.strerror}",
        next_step="choose another address, or port 0 for any",
    )
