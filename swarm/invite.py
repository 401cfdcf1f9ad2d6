"""Join tokens: all that a newcomer must know to enter a swarm, as one word of text.

A token is "swarm1" and the base58 of a msgpack payload with a checksum over version and payload.
The checksum is the same in every version, so that a mistyped token is told from a foreign one.

1. `decode_invite(encode_invite(invite))` names the same secret, swarm and addresses of each peer.
2. `decode_invite` raises BadInput, never anything else, and its sentence says what is wrong.
3. A token is a secret: an invite's repr does not show it.
"""

import hashlib
import ipaddress
import re
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import base58
import msgspec

from swarm.errors import BadInput

# Everyone knows it: a swarm with this secret is open to all.
PUBLIC_SECRET = b"everyone may enter this swarm"
SWARM_ID_LENGTH = 16  # hex digits of the fingerprint: nobody finds a second model for 64 bits
LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 16, 32

_VERSION = 1
_CHECK_BYTES = 4
_MOST_CHARACTERS = 16384  # base58 takes quadratic time: this much, 0.1 s
_MOST_ADDRESSES, _MOST_WAY_CHARACTERS = 32, 256
_KEY_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # what every Ed25519 peer id begins with
_KEY_BYTES = 32
_COMPACT = re.compile(r"/ip([46])/([^/]+)/tcp/([1-9][0-9]{0,4})")

_ShortText = Annotated[str, msgspec.Meta(max_length=_MOST_WAY_CHARACTERS)]
_ShortBytes = Annotated[bytes, msgspec.Meta(max_length=64)]


class _Peer(msgspec.Struct, array_like=True, frozen=True):
    """A public key, and the ways to its peer: ip and port packed, all others as text."""

    key: Annotated[bytes, msgspec.Meta(min_length=_KEY_BYTES, max_length=_KEY_BYTES)]
    packed: Annotated[tuple[_ShortBytes, ...], msgspec.Meta(max_length=_MOST_ADDRESSES)]
    texts: Annotated[tuple[_ShortText, ...], msgspec.Meta(max_length=_MOST_ADDRESSES)]


class _Payload(msgspec.Struct, array_like=True, frozen=True):
    """An empty secret stands for the public one."""

    secret: _ShortBytes
    swarm_id: _ShortBytes
    peers: Annotated[tuple[_Peer, ...], msgspec.Meta(max_length=_MOST_ADDRESSES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """Whom to dial, the secret to prove, and which model's swarm it is.

    Each address is a multiaddr that ends in /p2p/ID; `swarm_id` is as `swarm_id_of` gives it.
    """

    addresses: tuple[str, ...]
    secret: bytes = field(repr=False)
    swarm_id: str

    def __post_init__(self) -> None:
        """Raise ValueError for an address without a peer, or a secret too short to be one."""
        if not LEAST_SECRET_BYTES <= len(self.secret) <= MOST_SECRET_BYTES:
            raise ValueError(f"a secret has 16 to 32 bytes, not {len(self.secret)}")
        if not re.fullmatch(f"[0-9a-f]{{{SWARM_ID_LENGTH}}}", self.swarm_id):
            raise ValueError(f"a swarm id is {SWARM_ID_LENGTH} hex digits, not {self.swarm_id!r}")
        if not 0 < len(self.addresses) <= _MOST_ADDRESSES:
            raise ValueError(f"an invite names 1 to {_MOST_ADDRESSES} addresses")
        for address in self.addresses:
            way, peer = _split(address)
            if len(way) > _MOST_WAY_CHARACTERS:
                raise ValueError(f"an address of {len(address)} characters")
            _key_of(peer)

    @property
    def peers(self) -> Mapping[str, tuple[str, ...]]:
        """The addresses, whole, of each peer named."""
        found: dict[str, tuple[str, ...]] = {}
        for address in self.addresses:
            peer = _split(address)[1]
            found[peer] = (*found.get(peer, ()), address)
        return found

    @property
    def is_public(self) -> bool:
        """True if everyone knows the secret."""
        return self.secret == PUBLIC_SECRET


def new_secret() -> bytes:
    """Return a fresh secret that nobody can guess."""
    return secrets.token_bytes(LEAST_SECRET_BYTES)


def swarm_id_of(fingerprint: str) -> str:
    """Return the part of a model's fingerprint, in hex, that tells its swarm from others."""
    return fingerprint[:SWARM_ID_LENGTH]


def encode_invite(invite: Invite) -> str:
    """Return the join token. Addresses are grouped by peer, those of plain ip and port first."""
    secret = b"" if invite.is_public else invite.secret
    peers = tuple(_pack_peer(peer, addresses) for peer, addresses in invite.peers.items())
    payload = _Payload(secret, bytes.fromhex(invite.swarm_id), peers)
    body = msgspec.msgpack.encode(payload)
    return f"swarm{_VERSION}{base58.b58encode(body + _checksum(_VERSION, body)).decode()}"


def decode_invite(text: str) -> Invite:
    """Return what a join token says. BadInput if it is damaged, foreign or no token at all."""
    token = "".join(text.split())  # a terminal may have wrapped it
    if not token:
        raise BadInput("the join token is empty", next_step="copy it from `swarm serve`")
    match = re.fullmatch(r"swarm([0-9])(.*)", token)
    if match is None:
        raise BadInput(
            "this is not a join token", next_step=f"it is one word and begins with swarm{_VERSION}"
        )
    version = int(match[1])
    body = _checked_body(version, match[2])
    if version != _VERSION:
        raise BadInput(
            f"the join token is of version {version}, this program reads version {_VERSION}",
            next_step="use the same release of swarm as the peer that made it",
        )
    try:
        payload = msgspec.msgpack.decode(body, type=_Payload)
        addresses = tuple(way for peer in payload.peers for way in _unpack_peer(peer))
        secret = payload.secret or PUBLIC_SECRET
        return Invite(addresses=addresses, secret=secret, swarm_id=payload.swarm_id.hex())
    except (ValueError, RecursionError, struct.error) as error:  # msgspec's are ValueErrors
        raise BadInput(
            "the join token is whole but says nothing that can be used",
            next_step="ask for a fresh one",
        ) from error


def _checked_body(version: int, text: str) -> bytes:
    damaged = BadInput("the join token is damaged", next_step="copy it again whole")
    if len(text) > _MOST_CHARACTERS:
        raise damaged
    try:
        packed = base58.b58decode(text)
    except ValueError as error:
        raise damaged from error
    body, check = packed[:-_CHECK_BYTES], packed[-_CHECK_BYTES:]
    if check != _checksum(version, body):
        raise damaged
    return body


def _checksum(version: int, body: bytes) -> bytes:
    return hashlib.sha256(b"swarm%d" % version + body).digest()[:_CHECK_BYTES]


def _split(address: str) -> tuple[str, str]:
    """Return the way to a peer and its id: "/ip4/1.2.3.4/tcp/4001" and the rest of /p2p/ID."""
    way, mark, peer = address.rpartition("/p2p/")
    if not (mark and peer and address.startswith("/") and address.isprintable()) or "/" in peer:
        raise ValueError(f"not a multiaddr that ends in /p2p/ID: {address!r}")
    return way, peer


def _key_of(peer: str) -> bytes:
    decoded = base58.b58decode(peer)
    if len(decoded) != len(_KEY_PREFIX) + _KEY_BYTES or not decoded.startswith(_KEY_PREFIX):
        raise ValueError(f"not the id of an Ed25519 key: {peer}")
    return decoded[len(_KEY_PREFIX) :]


def _pack_peer(peer: str, addresses: tuple[str, ...]) -> _Peer:
    packed, texts = [], []
    for address in addresses:
        way = _split(address)[0]
        found = _pack_way(way)
        if found is None:
            texts.append(way)
        else:
            packed.append(found)
    return _Peer(_key_of(peer), tuple(packed), tuple(texts))


def _pack_way(way: str) -> bytes | None:
    """Return 6 or 18 bytes for a canonical ip and port, None for every other way to a peer."""
    match = _COMPACT.fullmatch(way)
    if match is None:
        return None
    try:
        packed = ipaddress.ip_address(match[2]).packed + struct.pack("!H", int(match[3]))
    except (ValueError, struct.error):
        return None
    return packed if _unpack_way(packed) == way else None


def _unpack_way(packed: bytes) -> str:
    address = ipaddress.ip_address(packed[:-2])
    (port,) = struct.unpack("!H", packed[-2:])
    return f"/ip{address.version}/{address}/tcp/{port}"


def _unpack_peer(peer: _Peer) -> tuple[str, ...]:
    peer_id = base58.b58encode(_KEY_PREFIX + peer.key).decode()
    ways = (*map(_unpack_way, peer.packed), *peer.texts)
    return tuple(f"{way}/p2p/{peer_id}" for way in ways)
