"""Data frames that need no decision go straight to their streams, past the muxer's reader.

The muxer's reader takes two reads, a lock and a pass of the event loop for each frame: more than
all the rest of what a hop spends on receiving a step. So what has arrived is looked at before: the
whole data frames at its beginning, of streams the muxer knows, are filed as the muxer would file
them. It gets everything else: what opens, ends or widens a stream, pings, and torn frames.

1. Bytes of a stream reach it in the order sent: what follows a frame that the muxer gets, gets the
   muxer too, and nothing is filed while the muxer is in the middle of a frame.
2. Filing does to a stream what the muxer's reader would do.
"""

import struct
from typing import Any

from libp2p.stream_muxer.yamux.yamux import MAX_WINDOW_SIZE, TYPE_DATA

_HEADER = struct.Struct("!BBHII")


class Shortcut:
    """Files frames for one muxer. It is asked by the muxer's own reader, so nothing runs beside."""

    def __init__(self, mux: Any) -> None:
        self._mux = mux
        self._torn = bytearray()  # the head of a frame, given to the muxer as far as it goes
        self._passing = 0  # bytes of a frame that the muxer is in the middle of

    def rest(self, data: bytes) -> bytes:
        """File the frames that can be; return what is the muxer's to read, perhaps nothing."""
        at = 0
        if not self._passing and not self._torn and not self._mux.streams_lock.locked():
            at = self._filed(data)
        self._follow(data, at)
        return data[at:] if at else data

    def _filed(self, data: bytes) -> int:
        """File whole frames from the beginning; return where the first other one begins."""
        at, size = 0, len(data)
        while at + _HEADER.size <= size:
            version, kind, flags, stream, length = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + length
            if version or kind != TYPE_DATA or flags or end > size or length > MAX_WINDOW_SIZE:
                break
            if stream not in self._mux.streams:
                break
            self._file(stream, memoryview(data)[at + _HEADER.size : end])
            at = end
        return at

    def _file(self, stream: int, payload: memoryview) -> None:
        muxed = self._mux.streams[stream]
        self._mux.stream_buffers[stream] += payload
        # who sends beyond the window is ended by the link, once too much lies unread
        muxed.recv_window = max(0, muxed.recv_window - len(payload))
        self._mux.stream_events[stream].set()

    def _follow(self, data: bytes, at: int) -> None:
        """Note where the muxer will be in its frames when it has read `data` from `at` on."""
        size = len(data)
        while at < size:
            if self._passing:
                step = min(self._passing, size - at)
                self._passing -= step
                at += step
                continue
            missing = _HEADER.size - len(self._torn)
            self._torn += data[at : at + missing]
            at += missing
            if len(self._torn) == _HEADER.size:
                _, kind, _, _, length = _HEADER.unpack(self._torn)
                self._passing = length if kind == TYPE_DATA else 0
                self._torn.clear()
