"""Frames: bytes to headers and tensors and back, without I/O.

A frame is `[u32 length][msgpack header][raw tensor bytes]`, big-endian length of all that follows.
The header is a map; its key "t" lists the tensors that follow as [name, dtype, shape].

1. Nothing a peer sends makes this module raise anything but PeerFault, or take more memory than
   `Limits` allows.
2. A tensor is never interpreted: a dtype's name, a shape, and exactly the bytes they call for.
3. Feeding bytes in any cuts gives the same frames.
4. After a PeerFault a decoder is dead: every later feed raises again.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack

from swarm.errors import PeerFault

DTYPE_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}

Buffer = bytes | bytearray | memoryview

_LENGTH = struct.Struct("!I")
_TENSORS = "t"
_SMALL_BYTES = 32 << 10
_USUAL_HEADER_BYTES = 4 << 10


class Tensor(NamedTuple):
    """Raw values: little-endian, C order. Equal to the plain tuple that `blocks` speaks."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


@dataclass(frozen=True, slots=True)
class Limits:
    """What one frame may cost its receiver."""

    frame_bytes: int = 32 << 20  # two 512-token chunks of hidden 8192 in float32
    header_bytes: int = 1 << 20  # a page of records, or the ids of a long prompt's mask
    tensors: int = 16
    axes: int = 6


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Frame:
    """A header and the tensors that travel with it."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def encode(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Return the frame as one piece, to be written at once. ValueError if it breaks the limits."""
    header = dict(frame.header)
    if frame.tensors:
        header[_TENSORS] = [[name, t.dtype, list(t.shape)] for name, t in frame.tensors.items()]
    packed = msgpack.packb(header, use_bin_type=True)
    length = len(packed) + sum(len(t.data) for t in frame.tensors.values())
    if length > limits.frame_bytes or len(packed) > limits.header_bytes:
        raise ValueError(f"a frame of {length} bytes is over the limit")
    return b"".join((_LENGTH.pack(length), packed, *(t.data for t in frame.tensors.values())))


class Decoder:
    """Collects bytes and gives frames as they complete."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._held: Buffer = bytearray()
        self._fault: PeerFault | None = None

    @property
    def is_empty(self) -> bool:
        """True between frames; a stream that ends elsewhere was cut off."""
        return not self._held

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Yield every frame that `data` completes. PeerFault when a frame is malformed.

        What is whole in `data` is not copied: tensors are views of it, so it must not change.
        """
        if self._fault is not None:
            raise self._fault
        if self._held:
            self._held = self._growing()
            self._held += data
        else:
            self._held = data
        try:
            while (frame := self._take()) is not None:
                yield frame
        except PeerFault as fault:
            self._fault = fault
            self._held = b""
            raise
        self._held = self._growing()

    def _growing(self) -> bytearray:
        """What is held as what can grow; nobody else has a view of it."""
        return self._held if isinstance(self._held, bytearray) else bytearray(self._held)

    def _take(self) -> Frame | None:
        if len(self._held) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        if length > self._limits.frame_bytes:
            raise PeerFault(f"a frame of {length} bytes is over the limit")
        end = _LENGTH.size + length
        if len(self._held) < end:
            return None
        view = memoryview(self._held)
        # what was held stays with the views of it, and the rest begins anew
        self._held = view[end:]
        return decode_body(view[_LENGTH.size : end], self._limits)


def decode_body(body: Buffer, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Return the frame whose bytes after the length are `body`. PeerFault if it is malformed."""
    header, used = _header(body, limits)
    tensors: dict[str, Tensor] = {}
    listed = header.pop(_TENSORS, [])
    if not isinstance(listed, list) or len(listed) > limits.tensors:
        raise PeerFault("a frame's list of tensors is malformed")
    view = memoryview(body)
    for entry in listed:
        name, dtype, shape = _tensor_entry(entry, limits)
        size = DTYPE_BYTES[dtype] * math.prod(shape)
        if name in tensors or used + size > len(body):
            raise PeerFault(f"tensor {name!r} is twice in a frame or longer than it")
        values = view[used : used + size]
        # a view keeps all that it is a view of: a small one is better a copy
        tensors[name] = Tensor(dtype, shape, values if size >= _SMALL_BYTES else bytes(values))
        used += size
    if used != len(body):
        raise PeerFault("a frame has bytes that no tensor calls for")
    return Frame(header, tensors)


def _header(body: Buffer, limits: Limits) -> tuple[dict[str, Any], int]:
    """The header and its size."""
    most = min(len(body), limits.header_bytes)
    try:
        try:
            header, used = _unpacked(body, min(most, _USUAL_HEADER_BYTES))
        except msgpack.OutOfData:
            header, used = _unpacked(body, most)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise PeerFault("a frame's header is not msgpack within the limits") from error
    if not isinstance(header, dict) or not all(isinstance(key, str) for key in header):
        raise PeerFault("a frame's header is not a map of names")
    return header, used


def _unpacked(body: Buffer, size: int) -> tuple[Any, int]:
    """The first object in the first `size` bytes, which are copied, and how many it takes."""
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=True, max_buffer_size=max(size, 1), max_ext_len=0
    )
    unpacker.feed(memoryview(body)[:size])
    return unpacker.unpack(), unpacker.tell()


def _tensor_entry(entry: Any, limits: Limits) -> tuple[str, str, tuple[int, ...]]:
    match entry:
        case [str(name), str(dtype), list(shape)] if dtype in DTYPE_BYTES:
            if len(shape) <= limits.axes and all(
                type(axis) is int and 0 <= axis <= limits.frame_bytes for axis in shape
            ):
                return name, dtype, tuple(shape)
    raise PeerFault("a frame's list of tensors is malformed")
