"""Multistream: how two ends agree on a protocol, without I/O.

1. The one who proposes does not wait: the proposal travels with the first bytes, and the answer is
   stripped from the first bytes that come back.
2. The one who answers reads bounded lines; whatever comes, only NotSpoken is raised.
3. Bytes behind the negotiation are never lost: they are what `feed` leaves.
"""

from collections.abc import Callable

_HEADER = b"/multistream/1.0.0"
_REFUSAL = b"na"
_LONGEST_LINE = 127  # so that a length is always one byte of varint
_MOST_PROPOSALS = 16


class NotSpoken(Exception):
    """The other side does not speak the protocol, or not multistream at all."""


def line(text: bytes) -> bytes:
    """Frame one line. ValueError if it is too long."""
    if len(text) >= _LONGEST_LINE:
        raise ValueError(f"a protocol id of {len(text)} bytes is too long")
    return bytes([len(text) + 1]) + text + b"\n"


def proposal(protocol: str) -> bytes:
    """Return what to send before the first bytes."""
    return line(_HEADER) + line(protocol.encode())


class Lines:
    """Cuts bytes into lines."""

    def __init__(self) -> None:
        self.held = bytearray()

    def next(self) -> bytes | None:
        """Return the next whole line, or None until it is there. NotSpoken if it is no line."""
        if not self.held:
            return None
        length = self.held[0]
        if not 1 <= length <= _LONGEST_LINE:
            raise NotSpoken("a malformed line")
        if len(self.held) <= length:
            return None
        text = bytes(self.held[1 : length + 1])
        del self.held[: length + 1]
        if not text.endswith(b"\n"):
            raise NotSpoken("a malformed line")
        return text[:-1]


class Proposer:
    """The side that proposes one protocol and goes on as if it were accepted."""

    def __init__(self, protocol: str) -> None:
        self._expected = [_HEADER, protocol.encode()]
        self._protocol = protocol
        self._lines = Lines()

    @property
    def is_done(self) -> bool:
        """True once the other side has accepted."""
        return not self._expected

    def feed(self, data: bytes) -> bytes:
        """Take bytes and return those behind the answer. NotSpoken if it is a no."""
        self._lines.held += data
        while self._expected:
            text = self._lines.next()
            if text is None:
                return b""
            if text != self._expected.pop(0):
                raise NotSpoken(f"does not speak {self._protocol}")
        rest = bytes(self._lines.held)
        self._lines.held.clear()
        return rest


class Answerer:
    """The side that accepts the first proposal it speaks."""

    def __init__(self, speaks: Callable[[str], bool]) -> None:
        self._speaks = speaks
        self._lines = Lines()
        self._has_header = False
        self._proposals = 0
        self.chosen: str | None = None

    def feed(self, data: bytes) -> bytes:
        """Take bytes and return what to answer; `chosen` is set once agreed. NotSpoken at the end
        of patience.
        """
        self._lines.held += data
        reply = b""
        while self.chosen is None and (text := self._lines.next()) is not None:
            reply += self._answer(text)
        return reply

    def rest(self) -> bytes:
        """Return, once, the bytes behind the negotiation."""
        rest = bytes(self._lines.held)
        self._lines.held.clear()
        return rest

    def _answer(self, text: bytes) -> bytes:
        if not self._has_header:
            if text != _HEADER:
                raise NotSpoken("does not speak multistream")
            self._has_header = True
            return line(_HEADER)
        self._proposals += 1
        if self._proposals > _MOST_PROPOSALS:
            raise NotSpoken("proposes too many protocols")
        protocol = text.decode("utf-8", "replace")
        if not self._speaks(protocol):
            return line(_REFUSAL)
        self.chosen = protocol
        return line(text)
