"""The thin client's sampling: from the last hop's candidates to one token id, in numpy.

A distribution here is always the *truncated* one: the K largest logits outside the penalised set
plus all penalised ids, renormalised. What the server left out has no chance to be chosen, and
top_p counts shares of what is left; top_k is exact, because `wish_for` asks for at least top_k.

1. `choose` is a pure function of (candidates, settings, position, counts): a replayed or drafted
   position gives the same token.
2. Equal logits go to the lowest id, as the first maximum of `torch.argmax` does.
3. The order is transformers': bias (at the server), repetition, presence and frequency,
   temperature, top_k, top_p, min_p. Penalties are computed in float32, as there; the rest in
   float64.
4. A payload from a peer raises nothing but PeerFault.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from swarm.errors import BadInput, PeerFault
from swarm.messages import Wish
from swarm.wire import Tensor

DRAWN_COUNT = 256  # 2 KB per token; the mass left out is below 1 % in real text
GREEDY_COUNT = 32  # the first would do, but who reads of likely others asks for 20 at most
MOST_COUNT = 1 << 20  # what a Wish may ask for
MOST_BIASED = 1024  # what a Wish may carry
_WORD = (1 << 64) - 1

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How to choose a token. The defaults are greedy: the highest logit.

    Repetition acts on every id seen, as in transformers; presence and frequency on how often an
    id was generated, as in OpenAI's interface. BadInput names an impossible value.
    """

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is no limit
    min_p: float = 0.0  # of the likeliest id's probability
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    allowed: frozenset[int] | None = None  # only these ids may be chosen

    def __post_init__(self) -> None:
        _need(0 <= self.temperature < math.inf, "temperature", "0 or more", self.temperature)
        _need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _need(0 <= self.top_k <= MOST_COUNT, "top_k", f"0 to {MOST_COUNT}", self.top_k)
        _need(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        repetition = self.repetition_penalty
        _need(0 < repetition < math.inf, "repetition_penalty", "above 0", repetition)
        for name in ("presence_penalty", "frequency_penalty"):
            _need(math.isfinite(getattr(self, name)), name, "a number", getattr(self, name))
        _need(len(self.bias) <= MOST_BIASED, "bias", f"of {MOST_BIASED} ids at most", "longer")
        for token, bias in self.bias.items():
            _need(0 <= token < 1 << 31 and math.isfinite(bias), "bias", "finite, for ids", token)
        if self.allowed is not None:
            _need(len(self.allowed) > 0, "allowed", "at least one id", "empty")

    @property
    def is_greedy(self) -> bool:
        """True when no random number is drawn."""
        return self.temperature == 0

    @property
    def is_penalising(self) -> bool:
        """True when ids seen before are treated unlike others."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The last hop's answer for one position.

    `tokens` and `logits` [K]: the largest outside the penalised set, descending. `named_tokens`
    and `named_logits` [P + B]: the penalised ids, then the ids with a bias. `left`: log-sum-exp
    of all other logits.
    """

    tokens: Ids
    logits: Logits
    named_tokens: Ids
    named_logits: Logits
    penalised: int  # P: how many of the named ids are penalised
    left: float

    def pool(self) -> tuple[Ids, Logits]:
        """Ids and logits of all that may be chosen: the K largest and the penalised."""
        count = self.penalised
        return (
            np.concatenate([self.tokens, self.named_tokens[:count]]),
            np.concatenate([self.logits, self.named_logits[:count]]),
        )

    def has_other_than(self, changes: Mapping[int, float]) -> bool:
        """Tell whether something possible is left that `Rules.changes` does not forbid."""
        tokens, logits = self.pool()
        possible = tokens[logits > -np.inf].tolist()
        return any(changes.get(token, 0.0) > -math.inf for token in possible)

    def log_probability(self, token: int) -> float:
        """Natural logarithm of the model's own probability of `token`: with the bias, before
        penalties and temperature, over all ids. -inf for an id that was left out.
        """
        tokens, logits = self.pool()
        found = np.flatnonzero(tokens == token)
        return float(logits[found[0]]) - self._total(logits) if len(found) else -math.inf

    def likeliest(self, count: int) -> list[tuple[int, float]]:
        """The `count` likeliest ids with their log-probabilities, as above: highest first, equal
        ones by lower id. Fewer if fewer are known or possible.
        """
        tokens, logits = self.pool()
        order = np.lexsort((tokens, -logits))[:count]
        total = self._total(logits)
        pairs = zip(tokens[order].tolist(), logits[order].tolist(), strict=True)
        return [(token, logit - total) for token, logit in pairs if logit > -math.inf]

    def _total(self, logits: Logits) -> float:
        """Log-sum-exp of all logits, those left out too."""
        every = np.append(logits.astype(np.float64), self.left)
        highest = every.max()
        return float(highest + math.log(np.exp(every - highest).sum()))


def wish_for(
    settings: SamplingSettings,
    seen_ids: Iterable[int],
    *,
    count: int | None = None,
    changed_ids: Iterable[int] = (),
) -> Wish:
    """Return what to ask the last hop for, so that `choose` has what it needs.

    `seen_ids` are the ids of the text so far, prompt included, in any order; for a drafted step
    also the draft's. `count` is raised to top_k; None for what settings like these need.
    `changed_ids` are those of `choose`'s changes: they come beside the `count` largest, so that
    others are left to choose from.
    """
    if count is None:
        count = GREEDY_COUNT if settings.is_greedy else DRAWN_COUNT
    return Wish(
        count=max(count, settings.top_k),
        penalised=tuple(sorted({*changed_ids, *(seen_ids if settings.is_penalising else ())})),
        bias=tuple(sorted(settings.bias.items())),
        allowed=None if settings.allowed is None else tuple(sorted(settings.allowed)),
    )


def counts_of(prompt_ids: Iterable[int], generated_ids: Iterable[int]) -> dict[int, int]:
    """Return how often each id of the text so far was generated; 0 for those of the prompt only."""
    counts = dict.fromkeys(prompt_ids, 0)
    for token in generated_ids:
        counts[token] = counts.get(token, 0) + 1
    return counts


def choose(
    candidates: Candidates,
    settings: SamplingSettings,
    position: int,
    counts: Mapping[int, int],
    changes: Mapping[int, float] | None = None,
) -> int:
    """Return the token for `position`, the absolute index that the token will have.

    `counts` is that of `counts_of`, for the text before `position`; `changes` are those of
    `Rules.changes`. PeerFault when the candidates leave nothing to choose.
    """
    tokens, logits = candidates.pool()
    if settings.allowed is not None:
        kept = np.isin(tokens, np.fromiter(settings.allowed, np.int64))
        tokens, logits = tokens[kept], logits[kept]
    if changes:
        tokens, logits = _changed(tokens, logits, changes)
    if settings.is_penalising and counts:
        logits = _penalised(tokens, logits, settings, counts)
    order = np.lexsort((tokens, -logits))  # highest first, then the lowest id
    tokens, logits = tokens[order], logits[order]
    if not len(tokens) or logits[0] == -np.inf:
        raise PeerFault("the last hop's candidates leave nothing to choose")
    if settings.is_greedy:
        return int(tokens[0])
    shares = _shares(logits, settings)
    cumulative = np.cumsum(shares)
    point = _random(settings.seed, position) * cumulative[-1]
    place = int(np.searchsorted(cumulative, point, side="right"))
    return int(tokens[min(place, len(shares) - 1)])


def candidates_from(payload: Mapping[str, Tensor], wish: Wish) -> list[Candidates]:
    """Return the candidates of each position that an Output's payload answers `wish` with.

    PeerFault when a tensor is missing, of another dtype or shape, or holds what no logit can be.
    """
    tokens = _ints(payload, "tokens")
    logits = _floats(payload, "logits")
    named = _floats(payload, "named")
    left = _floats(payload, "left", axes=1)
    positions, width = tokens.shape
    asked = wish.penalised + tuple(token for token, _ in wish.bias)
    if logits.shape != tokens.shape or left.shape != (positions,):
        raise PeerFault("the tensors of candidates differ in length")
    if named.shape != (positions, len(asked)) or (wish.count and width > wish.count):
        raise PeerFault("these are not the candidates that were asked for")
    if (tokens < 0).any():
        raise PeerFault("a candidate is not a token id")
    asked_ids = np.array(asked, np.int32)
    return [
        Candidates(
            tokens[row], logits[row], asked_ids, named[row], len(wish.penalised), float(left[row])
        )
        for row in range(positions)
    ]


def _changed(tokens: Ids, logits: Logits, changes: Mapping[int, float]) -> tuple[Ids, Logits]:
    """What is left of them, with what is added: see `Rules.changes`. All, if nothing would be left:
    what a grammar demands stands above what a model would rather not say.
    """
    added = np.array([changes.get(token, 0.0) for token in tokens.tolist()], np.float32)
    is_possible = logits > -np.inf
    forced = np.isposinf(added) & is_possible
    if forced.any():
        return tokens[forced], np.zeros_like(logits[forced])
    kept = np.isfinite(added) & is_possible
    if not kept.any():
        return tokens, logits
    return tokens[kept], logits[kept] + added[kept]


def _penalised(
    tokens: Ids, logits: Logits, settings: SamplingSettings, counts: Mapping[int, int]
) -> Logits:
    """The logits after all penalties; ids that `counts` does not name keep theirs."""
    times = np.array([counts.get(token, -1) for token in tokens.tolist()], np.int64)
    penalty = np.float32(settings.repetition_penalty)
    repeated = np.where(logits < 0, logits * penalty, logits / penalty)
    changed = np.where(times >= 0, repeated, logits)
    generated = np.maximum(times, 0).astype(np.float32)
    less = settings.presence_penalty * (generated > 0) + settings.frequency_penalty * generated
    result: Logits = (changed - less.astype(np.float32)).astype(np.float32)
    return result


def _shares(logits: Logits, settings: SamplingSettings) -> NDArray[np.float64]:
    """Unnormalised probabilities of descending `logits` [N], cut to those that may be drawn."""
    with np.errstate(over="ignore"):  # next to no temperature: all but the largest have no share
        scaled = (logits.astype(np.float64) - float(logits[0])) / settings.temperature
    if 0 < settings.top_k < len(scaled):  # what equals the last one kept is kept too
        scaled = scaled[scaled >= scaled[settings.top_k - 1]]
    shares: NDArray[np.float64] = np.exp(scaled)
    if settings.top_p < 1:
        tail = np.cumsum(shares[::-1])[::-1] / shares.sum()  # of each id and all below it
        shares = shares[: max(1, int((tail > 1 - settings.top_p).sum()))]
    if settings.min_p > 0:
        shares = shares[shares >= settings.min_p * shares[0]]
    return shares


def _random(seed: int, position: int) -> float:
    """A number in [0, 1) that belongs to (seed, position): no state, the same everywhere."""
    key = np.array([seed & _WORD, position & _WORD], np.uint64)
    return int(np.random.Philox(key=key).random_raw() >> 11) * 2.0**-53


def _ints(payload: Mapping[str, Tensor], name: str) -> Ids:
    tensor = _tensor(payload, name, "int32", axes=2)
    return np.frombuffer(tensor.data, "<i4").reshape(tensor.shape)


def _floats(payload: Mapping[str, Tensor], name: str, *, axes: int = 2) -> Logits:
    tensor = _tensor(payload, name, "float32", axes=axes)
    values = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise PeerFault(f"{name!r} of the candidates holds what no logit can be")
    return values


def _tensor(payload: Mapping[str, Tensor], name: str, dtype: str, *, axes: int) -> Tensor:
    tensor = payload.get(name)
    if tensor is None or tensor.dtype != dtype or len(tensor.shape) != axes:
        raise PeerFault(f"candidates without {name!r} as {dtype} of {axes} axes")
    if len(tensor.data) != 4 * math.prod(tensor.shape):
        raise PeerFault(f"{name!r} of the candidates has too many or too few bytes")
    return tensor


def _need(holds: bool, name: str, claim: str, value: object) -> None:
    if not holds:
        raise BadInput(f"{name} must be {claim}, not {value}")
