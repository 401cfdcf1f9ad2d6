"""Answers that must be JSON of some schema, or of another form: which ids may come next, by
llguidance.

1. Whatever is chosen under a guide can be gone on with to JSON of the schema; an end-of-sequence id
   is allowed only behind it. An answer that is cut at its length is a beginning of such JSON.
2. A schema that is not understood in full is refused by name, never followed in part.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from swarm.errors import BadInput
from swarm.fetching import Model
from swarm.gateway.faults import bad
from swarm.generate import Guide
from swarm.sampling import Candidates
from swarm.tasks import in_thread

MOST_FEW = 1024  # ids to name in a step: some 4 KB, as much as the candidates that come back
WHITE_SPACE = r"[ \n\t]{0,20}"  # enough to indent, and no model is lost in it


class Grammars:
    """Makes guides for one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer: Any = None
        self._making = trio.Lock()

    async def compiled(self, kind: str, form: str, param: str) -> Callable[[], Guide]:
        """Return what makes a guide for each answer: of a JSON schema, a regex, a choice of texts
        (as JSON) or a grammar. ApiError names what is wrong with it; `param` holds it.
        """
        if not self._model.card.end_of_sequence_ids:
            raise bad("this model has no end-of-sequence token to end such an answer with", param)
        async with self._making:  # one at a time: a schema may take all of a processor
            if self._tokenizer is None:
                self._tokenizer = await in_thread(self._read_tokenizer)
            matcher, fault = await in_thread(lambda: self._compile(kind, form))
        if fault:
            noun = "schema" if kind == "json" else kind
            raise bad(f"the {noun} cannot be followed: {fault.strip()[:400]}", param)
        size = self._model.card.vocabulary_size
        try:  # what cannot even begin is told before a stream has
            await in_thread(JsonGuide(matcher.deep_copy(), size).every)
        except BadInput as error:
            raise bad(error.sentence(), param) from error
        return lambda: JsonGuide(matcher.deep_copy(), size)

    def _read_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        card, tokens = self._model.card, self._model.tokens
        try:
            return LLTokenizer(
                tokens.written(),
                n_vocab=max(card.vocabulary_size, tokens.size),
                eos_token=list(card.end_of_sequence_ids),
            )
        except ValueError as error:
            raise BadInput(f"no form can be had of this model's tokenizer: {error}") from error

    def _can_say(self, text: str) -> bool:
        tokens = self._tokenizer.tokenize_str(text)
        said: bytes = self._tokenizer.decode_bytes(tokens)
        return said == text.encode()

    def _compile(self, kind: Any, form: str) -> tuple[Any, str]:
        """The matcher at its start, and what is wrong with the form, if anything is."""
        from llguidance import LLMatcher, grammar_from

        try:
            if kind == "json":
                white: Any = {"whitespace_pattern": WHITE_SPACE}
                grammar = LLMatcher.grammar_from_json_schema(form, overrides=white)
            else:
                grammar = grammar_from(kind, form)
                texts = json.loads(form) if kind == "choice" else ()
                unsaid = [text for text in texts if not self._can_say(text)]
                if unsaid:
                    return None, f"this model has no tokens to say {unsaid[0]!r}"
        except ValueError as error:
            return None, str(error)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        return matcher, matcher.get_error() if matcher.is_error() else ""


class JsonGuide:
    """Which ids may come next in one answer: a `Guide`."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher = matcher
        self._size = size
        self._mask: NDArray[np.bool_] | None = None

    def few(self) -> frozenset[int] | None:
        """The ids allowed next; None if they are more than MOST_FEW."""
        mask = self._allowed()
        return None if int(mask.sum()) > MOST_FEW else self.every()

    def every(self) -> frozenset[int]:
        """The ids allowed next."""
        return frozenset(np.flatnonzero(self._allowed()).tolist())

    def narrowed(self, candidates: Candidates) -> Candidates | None:
        """The candidates that are allowed; None if none is."""
        mask = self._allowed()
        kept = self._is_kept(mask, candidates.tokens)
        named = self._is_kept(mask, candidates.named_tokens)
        logits = np.where(named, candidates.named_logits, np.float32(-np.inf))
        if not kept.any() and not (logits[: candidates.penalised] > -np.inf).any():
            return None
        return replace(
            candidates,
            tokens=candidates.tokens[kept],
            logits=candidates.logits[kept],
            named_logits=logits,
        )

    def take(self, token: int) -> None:
        """Go on behind an id. BadInput if the grammar has become too large to follow."""
        self._mask = None
        if not self._matcher.consume_token(token):
            raise BadInput(f"the schema cannot be followed further: {self._matcher.get_error()}")

    def _allowed(self) -> NDArray[np.bool_]:
        if self._mask is None:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[: self._size]
            if self._matcher.is_error() or not bits.any():
                raise BadInput(f"the schema allows no token here: {self._matcher.get_error()}")
            self._mask = bits.astype(np.bool_)
        return self._mask

    def _is_kept(self, mask: NDArray[np.bool_], tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        known = tokens < len(mask)
        kept: NDArray[np.bool_] = known & mask[np.where(known, tokens, 0)]
        return kept
