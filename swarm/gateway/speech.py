"""One answer's ids as text: cut at stops, with what each token's chance was. Pure.

1. The texts of all pieces together are the answer; what may begin a stop is held back.
2. A token's logarithm is that of the model's own probability, over all ids, with the bias and
   before penalties and temperature (`Candidates.log_probability`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.gateway.ask import Ask
from swarm.generate import FinishReason
from swarm.messages import HopTime
from swarm.sampling import Candidates
from swarm.text import StopScanner, TextStream, Tokens

LEAST_LOG = -9999.0  # JSON has no infinity


Route = tuple[dict[str, str], ...]
"""The peer, span and name of each hop."""


@dataclass(frozen=True, slots=True)
class Share:
    """A token and the natural logarithm of its probability."""

    token: int
    text: str
    log: float
    bytes: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """A chosen token, and the likeliest at its place."""

    chosen: Share
    likeliest: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer has a route."""

    index: int
    route: Route


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain, the tokens told with it (none unless asked for), and how many
    have come since the last piece.
    """

    index: int
    text: str
    told: tuple[Told, ...] = ()
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An answer is whole. `stop`: the stop string that ended it, if one did."""

    index: int
    reason: FinishReason
    tokens: int
    stop: str | None = None
    route: Route = ()
    reused_tokens: int = 0  # of the prompt, that hops had from other sessions
    failovers: int = 0
    replayed_tokens: int = 0


class Speech:
    """Turns the ids of one answer into pieces."""

    def __init__(self, index: int, tokens: Tokens, ask: Ask) -> None:
        choice = ask.choices[index]
        self._index = index
        self._tokens = tokens
        self._stream = TextStream(tokens, choice.prompt, skip_special=not ask.keeps_special)
        self._scanner = StopScanner((*ask.stops, *ask.own_stops))
        self._own_stops = ask.own_stops
        self._top = ask.top
        self._unsaid = choice.settings.end_ids if ask.keeps_special else ask.stop_ids
        self._since = 0  # tokens that made no piece yet
        self._is_stripping = ask.strips_start
        self._candidates: Candidates | None = None

    @property
    def is_stopped(self) -> bool:
        """True once a stop string has come."""
        return self._scanner.matched is not None

    @property
    def stop(self) -> str | None:
        """The caller's stop string that has come, if one has."""
        found = self._scanner.matched
        return None if found in self._own_stops else found

    def hear(self, _times: Sequence[HopTime], candidates: Sequence[Candidates]) -> None:
        """Take note of what the next id is chosen from."""
        self._candidates = candidates[0]

    def say(self, token: int) -> Piece:
        """Return what this id makes certain; its text may be empty."""
        new = [] if token in self._unsaid else [token]
        text = self._begun(self._scanner.feed(self._stream.feed(new)))
        told = self._told(token)
        self._since += 1
        piece = Piece(self._index, text, told, self._since)
        self._since = 0 if text or told else self._since
        return piece

    def finish(self) -> Piece:
        """Return what was held back, once no id will come."""
        if self.is_stopped:
            return Piece(self._index, "")
        rest = self._scanner.feed(self._stream.finish()) + self._scanner.finish()
        return Piece(self._index, self._begun(rest), tokens=self._since)

    def _begun(self, text: str) -> str:
        """The text without the white space that the answer begins with, if that is none of it."""
        if self._is_stripping:
            text = text.lstrip()
            self._is_stripping = not text
        return text

    def _told(self, token: int) -> tuple[Told, ...]:
        if self._top is None or self._candidates is None:
            return ()
        chosen = self._share(token, self._candidates.log_probability(token))
        likeliest = self._candidates.likeliest(self._top)
        return (Told(chosen, tuple(self._share(*each) for each in likeliest)),)

    def _share(self, token: int, log: float) -> Share:
        text, raw = self._tokens.decode([token], skip_special=False), self._tokens.bytes_of(token)
        return Share(token, text, max(log, LEAST_LOG), raw)
