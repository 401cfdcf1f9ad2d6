"""Text from a session: prompt in chunks, candidates back, one choice after the other.

1. The tokens are those of the model: a failed route or a draft changes when they come, not which.
2. Generation ends with an end-of-sequence id, at `most_tokens`, or when `on_token` says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import trio

from swarm.client_session import ClientSession
from swarm.errors import BadInput, PeerFault
from swarm.messages import HopTime
from swarm.sampling import SamplingSettings, candidates_from, choose, counts_of, wish_for
from swarm.text import ModelCard
from swarm.wire import Tensor

# Long enough to be bound by compute, short enough that hops overlap (docs/protocol.md).
CHUNK_TOKENS = 256

FinishReason = Literal["length", "end", "stop"]
OnToken = Callable[[int], bool]
"""Called with each new id; True ends the generation."""


class Draft(Protocol):
    """Guesses what comes next, cheaply."""

    def guess(self, ids: Sequence[int]) -> list[int]:
        """Return the ids that may follow, best guess; none if there is no good one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What to generate: at most `most_tokens`, ended by any of `end_ids`."""

    most_tokens: int
    end_ids: frozenset[int]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(slots=True)
class Generation:
    """What came of it. Seconds count from the first step sent."""

    token_ids: list[int]
    finish_reason: FinishReason = "length"
    seconds: float = 0.0
    first_token_seconds: float = 0.0
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
) -> Generation:
    """Send the prompt and generate. The session must have room for prompt and `most_tokens`.

    Raises what `ClientSession.next_output` raises, and PeerFault for impossible candidates.
    """
    began = trio.current_time()
    made = Generation([])
    ids = list(prompt)
    counts = counts_of(ids, ())
    drafted: list[int] = []
    wish = wish_for(settings.sampling, counts)
    for start, chunk, is_last in _chunks(prompt):
        session.step(start, _payload(chunk), "last" if is_last else "none", wish)
    while True:
        output = await session.next_output()
        made.steps += 1
        choices = candidates_from(output.payload, wish)
        if len(choices) != len(drafted) + 1:
            raise PeerFault(
                f"the last hop answered {len(choices)} positions, not {len(drafted) + 1}"
            )
        if made.steps > 1:
            made.computed_seconds += _computed(output.times)
        for place, candidates in enumerate(choices):
            token = choose(candidates, settings.sampling, len(ids), counts)
            ids.append(token)
            counts[token] = counts.get(token, 0) + 1
            made.token_ids.append(token)
            _note_time(made, began)
            if _is_over(made, token, settings, on_token):
                return made
            if place < len(drafted) and drafted[place] != token:
                break
        room = settings.most_tokens - len(made.token_ids) - 1
        drafted = draft.guess(ids)[:room] if draft is not None else []
        wish = wish_for(settings.sampling, {*counts, *drafted})
        step = [ids[-1], *drafted]
        session.step(len(ids) - 1, _payload(step), "all" if drafted else "last", wish)


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


def _chunks(prompt: Sequence[int]) -> Iterator[tuple[int, Sequence[int], bool]]:
    for start in range(0, len(prompt), CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, len(prompt))
        yield start, prompt[start:stop], stop == len(prompt)


def _payload(ids: Sequence[int]) -> dict[str, Tensor]:
    return {"ids": Tensor("int32", (1, len(ids)), np.asarray(ids, "<i4").tobytes())}
