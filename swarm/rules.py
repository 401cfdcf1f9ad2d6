"""What the text so far does to the next id, as a model or a caller wishes it. Pure.

1. Names, order and effect are those of transformers' generation config; ids are the same.
2. `changes` depends on nothing but its arguments: it is the same for a replayed or drafted place.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Ids = Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=1 << 16)]
Words = Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=1 << 14)]
Bias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Ids that are forbidden, forced, or more or less likely. The defaults change nothing."""

    suppress_tokens: Ids = ()
    begin_suppress_tokens: Ids = ()
    bad_words_ids: Annotated[tuple[Words, ...], msgspec.Meta(max_length=1 << 14)] = ()
    sequence_bias: Annotated[tuple[tuple[Words, Bias], ...], msgspec.Meta(max_length=1 << 14)] = ()
    no_repeat_ngram_size: Count = 0
    encoder_no_repeat_ngram_size: Count = 0  # of the prompt alone
    min_length: Count = 0  # of prompt and answer; min_new_tokens replaces it
    min_new_tokens: Count = 0
    forced_bos_token_id: TokenId | None = None  # behind a prompt of one id
    forced_eos_token_id: Ids = ()  # at the last place that there is room for

    def changes(
        self, ids: Sequence[int], prompt_length: int, most_tokens: int, end_ids: Collection[int]
    ) -> dict[int, float]:
        """Return what is added to the logits of which ids behind `ids`, of which the first
        `prompt_length` are the prompt, in an answer of at most `most_tokens`: -inf forbids an id,
        inf forces it.
        """
        added: dict[int, float] = {}
        for words, bias in dict(self.sequence_bias).items():
            if _ends_with(ids, words[:-1]):
                added[words[-1]] = added.get(words[-1], 0.0) + bias
        added |= dict.fromkeys(self._forbidden(ids, prompt_length, end_ids), -math.inf)
        return added | dict.fromkeys(self._forced(ids, prompt_length, most_tokens), math.inf)

    def _forced(self, ids: Sequence[int], prompt_length: int, most_tokens: int) -> Collection[int]:
        if len(ids) == prompt_length + most_tokens - 1 and self.forced_eos_token_id:
            return set(self.forced_eos_token_id) - set(self.suppress_tokens)
        if len(ids) == 1 and self.forced_bos_token_id is not None:
            return (self.forced_bos_token_id,)
        return ()

    def _forbidden(
        self, ids: Sequence[int], prompt_length: int, end_ids: Collection[int]
    ) -> Iterator[int]:
        yield from self.suppress_tokens
        is_behind_bos = prompt_length == 1 and self.forced_bos_token_id is not None
        if len(ids) == prompt_length + is_behind_bos:
            yield from self.begin_suppress_tokens
        least = prompt_length + self.min_new_tokens if self.min_new_tokens else self.min_length
        if len(ids) < least:
            yield from end_ids
        for words in self.bad_words_ids:
            is_end = len(words) == 1 and words[0] in end_ids
            if not is_end and _ends_with(ids, words[:-1]):
                yield words[-1]
        yield from _repeating(ids, ids, self.no_repeat_ngram_size)
        yield from _repeating(ids[:prompt_length], ids, self.encoder_no_repeat_ngram_size)


def _ends_with(ids: Sequence[int], words: Sequence[int]) -> bool:
    return not words or tuple(ids[-len(words) :]) == tuple(words)


def _repeating(text: Sequence[int], ids: Sequence[int], size: int) -> Iterator[int]:
    """The ids that would complete behind `ids` a run of so many that is in `text`."""
    if not 0 < size <= len(ids):
        return
    start = list(ids[len(ids) - size + 1 :])
    for place in range(len(text) - size + 1):
        is_alike = size == 1 or text[place + size - 2] == start[-1]  # few are, and need a look
        if is_alike and list(text[place : place + size - 1]) == start:
            yield text[place + size - 1]
