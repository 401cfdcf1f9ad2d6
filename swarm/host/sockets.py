"""TCP: sockets tuned for peers that vanish, addresses, and the port we listen on.

1. A peer whose machine is gone is noticed within USER_TIMEOUT_MILLISECONDS, on dialled and accepted
   sockets alike.
2. A write that is cancelled leaves no broken frame: what the kernel did not take follows before the
   next one.
3. A port belongs to one listener: a second one is told.
"""

import errno
import logging
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio
from libp2p.network.connection.exceptions import RawConnError

from swarm.errors import BadInput, Unreachable
from swarm.host.channel import Channel
from swarm.host.settings import USER_TIMEOUT_MILLISECONDS

logger = logging.getLogger(__name__)

_ACCEPT_PAUSE_SECONDS = 0.05
_RECEIVE_BYTES = 256 << 10
_BACKLOG = 256
_MOST_IN_A_ROW = 16  # reads without a look at the others: a fast sender must not be all there is
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3))

_ADDRESS = re.compile(
    r"/(ip4|ip6|dns|dns4|dns6)/([^/]{1,255})/tcp/([0-9]{1,5})(?:/p2p/([1-9A-HJ-NP-Za-km-z]{1,128}))?"
)
_FAMILY = {"ip4": socket.AF_INET, "dns4": socket.AF_INET, "ip6": socket.AF_INET6}
_FAMILY["dns6"] = socket.AF_INET6


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer may be dialled, as a multiaddr says it. `peer` is empty if it names none."""

    kind: str
    name: str
    port: int
    peer: str = ""

    def __str__(self) -> str:
        end = f"/p2p/{self.peer}" if self.peer else ""
        return f"/{self.kind}/{self.name}/tcp/{self.port}{end}"


def parse_address(text: str) -> Address | None:
    """Read a multiaddr; None if it is not one that this host can dial."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[3]) < 65536:
        return None
    return Address(found[1], found[2], int(found[3]), found[4] or "")


class Tcp(Channel):
    """A connected socket. Raises RawConnError when it has ended."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._unsent = b""
        self._in_a_row = 0
        self._is_drained = False  # the last read left nothing
        sock.setblocking(False)
        _tune(sock)

    async def _receive(self) -> bytes:
        self._in_a_row += 1
        if self._in_a_row > _MOST_IN_A_ROW:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        while True:
            if self._is_drained:
                self._is_drained, self._in_a_row = False, 0
                await self._wait(trio.lowlevel.wait_readable)
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                self._is_drained = True
                continue
            except OSError as error:
                raise RawConnError(f"connection closed: {error}") from error
            if not data:
                raise RawConnError("connection closed by peer")
            self._is_drained = len(data) < _RECEIVE_BYTES
            return data

    async def _send(self, data: bytes) -> None:
        # One task writes at a time. Cancelled here, the rest stays and goes before what follows: a
        # frame of Noise that were dropped would end the whole connection.
        if data or self._unsent:
            self._unsent = self._unsent + data if self._unsent else self._push(data)
        while self._unsent:
            await self._wait(trio.lowlevel.wait_writable)
            self._unsent = self._push(self._unsent)

    def push(self, data: bytes) -> bool:
        """Write what the kernel takes now; the rest follows with the next write, which must come.
        False if the connection has ended.
        """
        try:
            self._unsent = self._unsent + data if self._unsent else self._push(data)
        except RawConnError:
            return False
        return True

    def _push(self, data: bytes) -> bytes:
        try:
            return data[self._sock.send(data) :]
        except (BlockingIOError, InterruptedError):
            return data
        except OSError as error:
            raise RawConnError(f"connection closed: {error}") from error

    async def _wait(self, until: Callable[[int], Awaitable[None]]) -> None:
        try:
            await until(self._sock.fileno())
        except (OSError, trio.ClosedResourceError) as error:
            raise RawConnError("connection closed") from error

    def shut(self) -> None:
        """Close the socket now; whoever waits on it gets an error."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()

    async def close(self) -> None:
        """Close the socket; what libp2p calls."""
        self.shut()
        await trio.lowlevel.checkpoint()


async def connect(address: Address) -> Tcp:
    """Open a connection. Unreachable says why not."""
    try:
        found = await trio.socket.getaddrinfo(
            address.name,
            address.port,
            family=_FAMILY.get(address.kind, socket.AF_UNSPEC),
            type=socket.SOCK_STREAM,
        )
        family, kind, proto, _, place = found[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise Unreachable(f"{address}: {error.strerror or error}") from error
    try:
        sock.setblocking(False)
        failure = sock.connect_ex(place)
        if failure == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock.fileno())
            failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, errno.errorcode.get(failure, str(failure)))
        return Tcp(sock)
    except OSError as error:
        sock.close()
        raise Unreachable(f"{address}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise


@contextmanager
def listening(name: str, port: int) -> Iterator[socket.socket]:
    """Hold a listening socket, without blocking. BadInput if the port is in use."""
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((name, port))
            sock.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise _listening_failure(name, port, error) from error
        sock.setblocking(False)
        yield sock


async def accepted(listener: socket.socket) -> AsyncIterator[Tcp]:
    """Yield connections as they come, for ever."""
    while True:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError):
            await trio.lowlevel.wait_readable(listener.fileno())
        except OSError as error:  # gone before we took it, or no descriptor is free
            logger.warning("a connection could not be accepted: %s", error)
            await trio.sleep(_ACCEPT_PAUSE_SECONDS)
        else:
            yield Tcp(sock)


def _listening_failure(name: str, port: int, error: Exception) -> BadInput:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return BadInput(
            f"port {port} is in use by another process", next_step="choose another with --port"
        )
    return BadInput(f"cannot listen on {name} port {port}: {error}")


def own_addresses(name: str, port: int) -> tuple[Address, ...]:
    """Where a socket bound to this name is reached: for a wildcard, at every interface."""
    if name not in ("0.0.0.0", "::"):
        return (Address("ip6" if ":" in name else "ip4", name, port),)
    return tuple(Address("ip4", found, port) for found in _interface_addresses())


def _interface_addresses() -> Sequence[str]:
    """The machine's IPv4 addresses, the loopback last."""
    found: dict[str, None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):  # the address of the default route; nothing is sent
            probe.connect(("192.0.2.1", 9))
            found[probe.getsockname()[0]] = None
        for _, interface in socket.if_nameindex():
            with suppress(OSError, ImportError):
                import fcntl

                asked = struct.pack("256s", interface.encode()[:15])
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
                found[socket.inet_ntoa(reply[20:24])] = None
    found.pop("127.0.0.1", None)
    return (*found, "127.0.0.1")


def _tune(sock: socket.socket) -> None:
    """Send at once, and notice a silent death. What this system lacks is skipped."""
    options = [(socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT_MILLISECONDS)]
    options += [(socket.IPPROTO_TCP, name, seconds) for name, seconds in _KEEPALIVE]
    with suppress(OSError):  # a socket that the peer has already closed shows so when read
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for level, name, value in options:
            if hasattr(socket, name):
                sock.setsockopt(level, getattr(socket, name), value)
