"""Text from a session: prompt in chunks, candidates back, one choice after the other.

1. The tokens are those of the model: a failed route or a draft changes when they come, not which.
2. Generation ends with an end-of-sequence id, at `most_tokens`, or when `on_token` says so.
3. Under a guide no other id is chosen than one that it allows, whatever the rules say.
4. Where a model's positions go by the length of a text, each step says of how long a text it is:
   no step holds positions of two kinds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from swarm.client_session import ClientSession
from swarm.errors import BadInput, PeerFault
from swarm.messages import HopTime, Wanted, Wish
from swarm.model_card import LengthScaling, ModelCard
from swarm.prefix import PAGE_POSITIONS, ids_payload
from swarm.rules import Rules
from swarm.sampling import (
    Candidates,
    SamplingSettings,
    candidates_from,
    choose,
    counts_of,
    wish_for,
)
from swarm.wire import Tensor

# Long enough to be bound by compute, short enough that hops overlap (docs/protocol.md).
CHUNK_TOKENS = 256

FinishReason = Literal["length", "end", "stop"]
OnToken = Callable[[int], bool]
"""Called with each new id; True ends the generation."""
OnStep = Callable[[Sequence[HopTime], Sequence[Candidates]], None]
"""Called with each step's times, hop by hop, and its candidates, before an id is chosen of them."""

# Under a guide that allows too many ids to send: so many candidates are asked for that hardly ever
# none of them is allowed.
GUIDED_COUNT = 1024


class Draft(Protocol):
    """Guesses what comes next, cheaply."""

    def guess(self, ids: Sequence[int]) -> list[int]:
        """Return the ids that may follow, best guess; none if there is no good one."""


class Guide(Protocol):
    """Says which ids may come next, as a grammar does."""

    def few(self) -> frozenset[int] | None:
        """Return the ids allowed next; None if they are too many for every step to name them."""

    def every(self) -> frozenset[int]:
        """Return the ids allowed next, however many; at least one."""

    def narrowed(self, candidates: Candidates) -> Candidates | None:
        """Return the candidates that are allowed; None if none is."""

    def take(self, token: int) -> None:
        """Go on behind an id that was allowed."""


_NO_RULES = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What to generate: at most `most_tokens`, ended by any of `end_ids`."""

    most_tokens: int
    end_ids: frozenset[int]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rules: Rules = field(default_factory=Rules)

    def changes(
        self, ids: Sequence[int], prompt: Sequence[int], drafted: Sequence[int] = ()
    ) -> list[dict[int, float]]:
        """What the rules add to the logits behind `ids`, which begin with the prompt, and behind
        each of the drafted ones.
        """
        if self.rules == _NO_RULES:
            return [{} for _ in range(len(drafted) + 1)]
        texts = [ids, *([*ids, *drafted[: place + 1]] for place in range(len(drafted)))]
        size, most = len(prompt), self.most_tokens
        return [self.rules.changes(text, size, most, self.end_ids) for text in texts]


@dataclass(slots=True)
class Generation:
    """What came of it. Seconds count from the first step sent."""

    token_ids: list[int]
    finish_reason: FinishReason = "length"
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    reused_tokens: int = 0  # of the prompt, that the first hop had from other sessions
    steps: int = 0
    computed_seconds: float = 0.0  # the hops' own, summed over decode steps
    decode_seconds: float = 0.0  # from the first token to the last


def check_prompt(prompt: Sequence[int], card: ModelCard) -> None:
    """BadInput if the prompt is empty, leaves no room for a token, or is beyond the vocabulary."""
    if not prompt:
        raise BadInput("the prompt is empty", next_step="give at least one word")
    if len(prompt) >= card.context_length:
        raise BadInput(
            f"the prompt has {len(prompt)} tokens, the model's context is {card.context_length}",
            next_step="shorten the prompt",
        )
    if max(prompt) >= card.vocabulary_size:
        raise BadInput(
            f"the tokenizer gives the id {max(prompt)}, beyond the model's {card.vocabulary_size}",
            next_step="leave special tokens out of the prompt",
        )


async def generate(
    session: ClientSession,
    prompt: Sequence[int],
    settings: GenerateSettings,
    on_token: OnToken = lambda _token: False,
    draft: Draft | None = None,
    *,
    on_step: OnStep = lambda _times, _candidates: None,
    guide: Guide | None = None,
) -> Generation:
    """Send the prompt and generate. The session must have room for prompt and `most_tokens`.

    A guide goes without a draft. Raises what `ClientSession.next_output` raises, and PeerFault for
    impossible candidates.
    """
    if guide is not None and draft is not None:
        raise ValueError("a draft does not know what a guide allows")
    began = trio.current_time()
    made = Generation([])
    ids = list(prompt)
    counts = counts_of(ids, ())
    drafted: list[int] = []
    changes = settings.changes(ids, prompt)
    wish = _next_wish(settings.sampling, counts, guide, changes)
    _send_text(session, ids, wish, session.pages)
    while True:
        times, choices = await _next_choices(session, made, wish, len(drafted) + 1)
        if guide is not None:
            allowed = _allowed(session, ids, settings.sampling, guide, choices[0], changes[0])
            choices = [await allowed]
        on_step(times, choices)
        for place, candidates in enumerate(choices):
            token = choose(candidates, settings.sampling, len(ids), counts, changes[place])
            ids.append(token)
            counts[token] = counts.get(token, 0) + 1
            made.token_ids.append(token)
            _note_time(made, began)
            if _is_over(made, token, settings, on_token):
                return made
            if place < len(drafted) and drafted[place] != token:
                break
        if guide is not None:
            guide.take(token)
        room = settings.most_tokens - len(made.token_ids) - 1
        drafted = draft.guess(ids)[:room] if draft is not None else []
        drafted = _fitting(session.length_scaling, len(ids), drafted)
        changes = settings.changes(ids, prompt, drafted)
        wish = _next_wish(settings.sampling, {*counts, *drafted}, guide, changes)
        _send_next(session, ids, drafted, wish)


def _send_next(session: ClientSession, ids: list[int], drafted: list[int], wish: Wish) -> None:
    """Send the last id and what was drafted behind it, or all anew where the family does so."""
    if len(ids) - 1 == session.length_scaling.anew_after:
        _send_text(session, ids, wish)
        return
    step = ids_payload([ids[-1], *drafted])
    session.step(len(ids) - 1, step, "all" if drafted else "last", wish)


def _send_text(session: ClientSession, ids: Sequence[int], wish: Wish, pages: int = 0) -> None:
    """Send all of a text, as one forward, for what comes after it."""
    for start, chunk, is_last in _chunks(ids, pages):
        wanted: Wanted = "last" if is_last else "none"
        session.step(start, ids_payload(chunk), wanted, wish, sequence_length=len(ids))


def _fitting(scaling: LengthScaling, length: int, drafted: list[int]) -> list[int]:
    """Those drafted ids that one step can verify behind a text of this length."""
    fits, regime = 0, scaling.regime(length)
    if length - 1 == scaling.anew_after:
        return []
    while length + fits != scaling.anew_after and scaling.regime(length + fits + 1) == regime:
        fits += 1
        if fits >= len(drafted):
            break
    return drafted[:fits]


async def _next_choices(
    session: ClientSession, made: Generation, wish: Wish, count: int
) -> tuple[Sequence[HopTime], list[Candidates]]:
    """The next output's times and candidates, noted in `made`. PeerFault unless they are of so
    many positions.
    """
    output = await session.next_output()
    made.steps += 1
    made.reused_tokens = session.reused_tokens
    choices = candidates_from(output.payload, wish)
    if len(choices) != count:
        raise PeerFault(f"the last hop answered {len(choices)} positions, not {count}")
    if made.steps > 1:
        made.computed_seconds += _computed(output.times)
    return output.times, choices


async def mean_hidden(session: ClientSession, prompt: Sequence[int]) -> NDArray[np.float32]:
    """Return the mean over all positions of the hidden states behind the last block [H], before
    the final norm. The session must have room for the prompt.

    Raises what `ClientSession.next_output` raises, and PeerFault for what is no hidden state.
    """
    chunks = list(_chunks(prompt))
    for start, chunk, _ in chunks:
        session.step(start, ids_payload(chunk), "all", sequence_length=len(prompt))
    total: NDArray[np.float64] | None = None
    for _, chunk, _ in chunks:
        output = await session.next_output()
        states = _states(output.payload, len(chunk))
        part = states.sum(axis=0, dtype=np.float64)
        if total is not None and part.shape != total.shape:
            raise PeerFault("the last hop answered hidden states of several widths")
        total = part if total is None else total + part
    if total is None:
        raise BadInput("the prompt is empty", next_step="give at least one word")
    mean: NDArray[np.float32] = (total / len(prompt)).astype(np.float32)
    return mean


def _states(payload: Mapping[str, Tensor], count: int) -> NDArray[np.float32]:
    """The hidden states [S, H] of an Output. PeerFault if they are none of so many positions."""
    tensor = payload.get("hidden")
    if tensor is None or len(tensor.shape) < 3 or tensor.shape[:2] != (1, count):
        raise PeerFault(f"the last hop answered no hidden states of {count} positions")
    if tensor.dtype == "bfloat16":  # the upper half of a float32
        wide = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        values = wide.view(np.float32)
    elif tensor.dtype in ("float16", "float32"):
        values = np.frombuffer(tensor.data, tensor.dtype).astype(np.float32)
    else:
        raise PeerFault(f"hidden states of dtype {tensor.dtype}")
    if values.size != math.prod(tensor.shape) or not np.isfinite(values).all():
        raise PeerFault("the last hop answered what no hidden state can be")
    return values.reshape(count, -1)


def _next_wish(
    sampling: SamplingSettings,
    seen: Iterable[int],
    guide: Guide | None,
    changes: Sequence[Mapping[int, float]],
) -> Wish:
    """What to ask the last hop for, so that the next ids can be chosen, each under its changes."""
    changed = set().union(*changes)
    if guide is None:
        return wish_for(sampling, seen, changed_ids=changed)
    few = guide.few()
    if few is None:
        return wish_for(sampling, seen, count=GUIDED_COUNT, changed_ids=changed)
    return wish_for(replace(sampling, allowed=few), seen, changed_ids=changed)


async def _allowed(
    session: ClientSession,
    ids: Sequence[int],
    sampling: SamplingSettings,
    guide: Guide,
    candidates: Candidates,
    changes: Mapping[int, float],
) -> Candidates:
    """What the guide leaves of the candidates. If that is nothing, or nothing that the changes do
    not forbid, the last position is computed once more, for the likeliest of all that it allows.
    """
    left = guide.narrowed(candidates)
    if left is not None and (guide.few() is not None or left.has_other_than(changes)):
        return left
    wish = wish_for(replace(sampling, allowed=guide.every()), set(ids), changed_ids=changes)
    session.step(len(ids) - 1, ids_payload(ids[-1:]), "last", wish)
    output = await session.next_output()
    found = candidates_from(output.payload, wish)
    left = guide.narrowed(found[0]) if len(found) == 1 else None
    if left is None:
        raise PeerFault("the last hop's candidates are not among the ids that were allowed")
    return left


def _is_over(made: Generation, token: int, settings: GenerateSettings, on_token: OnToken) -> bool:
    """True if this token is the last; says why in `finish_reason`."""
    is_stopped = on_token(token)
    if token in settings.end_ids:
        made.finish_reason = "end"
    elif is_stopped:
        made.finish_reason = "stop"
    elif len(made.token_ids) < settings.most_tokens:
        return False
    return True


def _note_time(made: Generation, began: float) -> None:
    now = trio.current_time() - began
    if len(made.token_ids) == 1:
        made.first_token_seconds = now
    made.seconds = now
    made.decode_seconds = now - made.first_token_seconds


def _computed(times: Sequence[HopTime]) -> float:
    return sum(time.computed for time in times)


def _chunks(prompt: Sequence[int], pages: int = 0) -> Iterator[tuple[int, Sequence[int], bool]]:
    """Where each step of the prompt starts, its ids, and whether it is the last."""
    paged = pages * PAGE_POSITIONS
    for start in (*range(0, paged, PAGE_POSITIONS), *range(paged, len(prompt), CHUNK_TOKENS)):
        stop = min(start + (PAGE_POSITIONS if start < paged else CHUNK_TOKENS), len(prompt))
        yield start, prompt[start:stop], stop == len(prompt)
