"""What a client must know of a model: its sizes, how it samples, how its positions are computed."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from swarm.errors import PeerFault
from swarm.rules import Rules
from swarm.sampling import SamplingSettings

DEFAULT_TOP_K = 50  # transformers' own, when a generation config samples and names none

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e6)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How the model's own generation config samples; None where it is silent."""

    do_sample: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Above0 | None = None
    rules: Rules = field(default_factory=Rules)
    stop_strings: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=1024)], ...],
        msgspec.Meta(max_length=64),
    ] = ()

    def settings(self, *, seed: int = 0) -> SamplingSettings:
        """The settings under which transformers' `generate` would run this model."""
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        if not self.do_sample:
            return SamplingSettings(repetition_penalty=penalty, seed=seed)
        return SamplingSettings(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=DEFAULT_TOP_K if self.top_k is None else self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=penalty,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthScaling:
    """How the model's positions are computed by the length of a text.

    They change beyond each of `switches`, and with each length beyond `grows_after`. A text that
    grows beyond `anew_after` is computed anew from its first position.
    """

    switches: Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)] = ()
    grows_after: Size | None = None
    anew_after: Size | None = None

    def regime(self, length: int) -> int:
        """The least length whose positions are computed as those of this one; 0: of short ones."""
        if self.grows_after is not None and length > self.grows_after:
            return length
        return max((switch + 1 for switch in self.switches if length > switch), default=0)


ANY_LENGTH = LengthScaling()  # of most models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a client must know of the model: model.json, made by a server from its checkpoint."""

    format: Literal[1]
    name: Annotated[str, msgspec.Meta(max_length=256)]
    model_type: Annotated[str, msgspec.Meta(max_length=128)]
    blocks: Size
    hidden_size: Size
    vocabulary_size: Size
    context_length: Size  # positions, prompt and answer together
    end_of_sequence_ids: tuple[TokenId, ...]  # generation ends with any of them
    begin_of_sequence_id: TokenId | None = None
    generation: GenerationDefaults = GenerationDefaults()
    length_scaling: LengthScaling = ANY_LENGTH

    @classmethod
    def read(cls, data: bytes) -> "ModelCard":
        """Return the card that model.json holds. PeerFault names what is wrong with it."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise PeerFault(f"the model's description is malformed: {error}") from error

    def written(self) -> bytes:
        """Return the bytes of model.json, the same for equal cards."""
        return msgspec.json.encode(self, order="deterministic")
