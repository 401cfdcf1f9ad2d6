"""From a TCP socket to an authenticated, encrypted connection that carries many streams.

Noise and Yamux are libp2p's own; only how their messages travel is ours: a dial costs one round
trip for TCP and one for Noise, the proposals ride along.

1. The peer at the other end holds the key of the id we dialled, or there is no connection.
2. Whatever the other side sends, all that is raised is Unreachable.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import base58
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux

from swarm.errors import Unreachable
from swarm.host.channel import Channel
from swarm.host.negotiation import NotSpoken
from swarm.host.shortcut import Shortcut
from swarm.host.sockets import Tcp
from swarm.identity import Identity

_LENGTH = struct.Struct("!H")
_MOST_PLAIN_BYTES = 65535 - 16  # of one Noise frame, less its tag
_INSPECTION_BYTES = 128 << 10
_MOST_POSTED_BYTES = 256 << 10


class Sealed(Channel):
    """A Noise session over TCP. All frames that have arrived are opened at once. Of those posted in
    one pass of the event loop the first goes at once, the others in as few as hold them.

    `lock` is held by whoever waits as it writes.
    """

    def __init__(self, tcp: Tcp, noise: Any) -> None:
        super().__init__()
        self._tcp = tcp
        self._noise = noise
        self._torn = b""  # the beginning of a frame
        self._uninspected = 0
        self.inspect: Callable[[], None] | None = None
        self._shortcut: Shortcut | None = None
        self.lock = trio.Lock()
        self._posted: list[bytes] = []
        self._posted_bytes = 0
        self._is_gathering = False
        self._news = trio.lowlevel.ParkingLot()

    def serve(self, mux: Any) -> None:
        """Let the muxer read only what cannot be filed without it. It has read nothing yet."""
        self._shortcut = Shortcut(mux)
        self.lock = mux._write_lock
        held = self._drain()  # came with the proposal
        self._held += self._shortcut.rest(held)

    def _accept(self, data: bytes) -> None:
        if self._proposer is not None:
            super()._accept(data)
            data = self._drain()
        self._held += data if self._shortcut is None else self._shortcut.rest(data)

    async def _receive(self) -> bytes:
        data = await self._tcp.read()
        try:
            plain = self._open_frames(data)
            self._uninspected += len(plain)
            if self.inspect is not None and self._uninspected > _INSPECTION_BYTES:
                self._uninspected = 0
                self.inspect()
        except RawConnError:
            self.shut()  # the muxer forgives errors in the middle of a frame; a closed socket not
            raise
        return plain

    def _open_frames(self, data: bytes) -> bytes:
        opened, at = [], 0
        if self._torn:
            data = self._torn + data
        while at + _LENGTH.size <= len(data):
            end = at + _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
            if end > len(data):
                break
            try:
                opened.append(self._noise.decrypt(data[at + _LENGTH.size : end]))
            except Exception as error:  # the cipher's own kinds of "forged"; nothing else runs
                raise RawConnError("connection closed: a forged frame") from error
            at = end
        self._torn = data[at:]
        return opened[0] if len(opened) == 1 else b"".join(opened)

    def post(self, frame: bytes) -> bool:
        """Write a muxer's frame before whatever is written later. False, and it is not taken, if so
        much waits already that it could wait long.
        """
        if self._head or self._posted_bytes + len(frame) > _MOST_POSTED_BYTES:
            return False
        if not self._is_gathering and not self.lock.locked():
            self._is_gathering = True
            if not self._tcp.push(self._seal([frame])):
                self._is_gathering = False
                return False  # it has ended: who writes and waits is told why
        else:
            self._posted.append(frame)
            self._posted_bytes += len(frame)
        self._news.unpark()
        return True

    async def write_posted(self) -> None:
        """Write what is posted, until cancelled."""
        while True:
            if not self._is_gathering:
                await self._news.park()
            async with self.lock:
                await self._send(b"")
            self._is_gathering = bool(self._posted)

    def _seal(self, frames: Sequence[bytes]) -> bytes:
        pieces: list[bytes] = []
        for plain in _filled(frames):
            sealed = self._noise.encrypt(plain)
            pieces += (_LENGTH.pack(len(sealed)), sealed)
        return b"".join(pieces)

    async def _send(self, data: bytes) -> None:
        posted, self._posted, self._posted_bytes = self._posted, [], 0
        frames = [*posted, data] if data else posted
        await self._tcp.write(self._seal(frames))

    def shut(self) -> None:
        """Close the socket now."""
        self._tcp.shut()

    async def close(self) -> None:
        """Close the socket; what the muxer calls."""
        await self._tcp.close()


def _filled(frames: Sequence[bytes]) -> Iterator[bytes]:
    """The bytes of the muxer's frames in pieces that Noise can seal: whole frames, where they fit,
    because the other side files only whole ones quickly.
    """
    held: list[bytes] = []
    size = 0
    for frame in frames:
        if held and size + len(frame) > _MOST_PLAIN_BYTES:
            yield b"".join(held)
            held, size = [], 0
        if len(frame) > _MOST_PLAIN_BYTES:
            for start in range(0, len(frame), _MOST_PLAIN_BYTES):
                yield frame[start : start + _MOST_PLAIN_BYTES]
            continue
        held.append(frame)
        size += len(frame)
    if held:
        yield b"".join(held)


@dataclass(frozen=True, slots=True)
class Connection:
    """An upgraded connection; `peer` has proved its key. Who holds it runs `mux.start()`."""

    peer: str
    tcp: Tcp
    mux: Any
    sealed: Sealed
    is_dialler: bool


class Handshaker:
    """Upgrades sockets under one identity."""

    def __init__(self, identity: Identity) -> None:
        self.key_pair = create_new_key_pair(identity.seed)
        self._noise = Transport(self.key_pair, noise_privkey=create_noise_key_pair().private_key)

    async def dial(self, tcp: Tcp, peer: str) -> Connection:
        """Upgrade a socket that we connected to where `peer` should be. Unreachable if not.

        The socket is closed on every failure, cancellation included.
        """
        tcp.propose(NOISE)
        return await self._upgrade(tcp, peer)

    async def accept(self, tcp: Tcp) -> Connection:
        """Upgrade a socket that was connected to us. Unreachable if it does not come to that.

        The socket is closed on every failure, cancellation included.
        """
        return await self._upgrade(tcp, None)

    async def _upgrade(self, tcp: Tcp, peer: str | None) -> Connection:
        try:
            if peer is None:
                return await self._listen(tcp)
            return await self._call(tcp, peer)
        except trio.Cancelled:
            tcp.shut()
            raise
        except (NotSpoken, IOException) as error:
            tcp.shut()
            raise Unreachable(f"the handshake with {peer or 'a stranger'} failed") from error
        except Exception as error:  # libp2p's handshake raises what malformed bytes make it raise
            tcp.shut()
            raise Unreachable(
                f"the handshake with {peer or 'a stranger'} failed: {error}"
            ) from error

    async def _call(self, tcp: Tcp, peer: str) -> Connection:
        remote = ID(base58.b58decode(peer))
        session = await self._noise.secure_outbound(tcp, remote)
        sealed = Sealed(tcp, session.conn.noise_state)
        sealed.propose(YAMUX)
        mux = Yamux(sealed, remote, is_initiator=True)
        sealed.serve(mux)
        return Connection(peer, tcp, mux, sealed, is_dialler=True)

    async def _listen(self, tcp: Tcp) -> Connection:
        await tcp.answer(lambda protocol: protocol == NOISE)
        session = await self._noise.secure_inbound(tcp)
        sealed = Sealed(tcp, session.conn.noise_state)
        await sealed.answer(lambda protocol: protocol == YAMUX)
        remote = session.get_remote_peer()
        peer = base58.b58encode(remote.to_bytes()).decode()
        mux = Yamux(sealed, remote, is_initiator=False)
        sealed.serve(mux)
        return Connection(peer, tcp, mux, sealed, is_dialler=False)
