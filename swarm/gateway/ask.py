"""What a request comes to: ids to send, settings to choose under, and how the text is cut.

1. `Ask`s are made of requests of every form; nothing behind them knows which form it was.
2. Whatever cannot be is an ApiError before a session is opened.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swarm.errors import BadInput
from swarm.gateway.faults import ApiError, bad, checked, unsupported
from swarm.gateway.requests import Request, ResponseFormat, Stops, StructuredOutputs
from swarm.gateway.settings import GatewaySettings
from swarm.generate import GenerateSettings, Guide, check_prompt
from swarm.model_card import ModelCard
from swarm.sampling import MOST_BIASED, SamplingSettings

_LEAST_SHARE = 1e-9  # top_p 0 keeps the likeliest id alone


Form = tuple[str, str, str]
"""The form that an answer must have: its kind (json, regex, choice or grammar), the form in that
kind's words, and the field that asks for it.
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer wanted: a session of its own."""

    prompt: tuple[int, ...]
    settings: GenerateSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """All answers that one request wants."""

    choices: tuple[Choice, ...]
    prompt_tokens: int  # each prompt counted once, however many answers it gets
    stops: tuple[str, ...] = ()
    own_stops: tuple[str, ...] = ()  # the template's, not the caller's
    stop_ids: frozenset[int] = frozenset()  # the caller's: they end the answer, and are none of it
    top: int | None = None  # how many likeliest ids to tell beside each token; None: no logprobs
    keeps_special: bool = False  # special tokens are text, too: some mark a tool's call
    strips_start: bool = False  # white space at the start is no part of the answer
    new_guide: Callable[[], Guide] | None = None
    tools: tuple[str, ...] = ()  # that may be called in the answer, by name
    has_one_call: bool = False  # of them, at most
    thinks: bool = False  # the answer may begin with a thought
    is_thinking: bool = False  # the prompt ends in one


def ask_of(
    request: Request,
    prompts: Sequence[Sequence[int]],
    most_tokens: int,
    card: ModelCard,
    bounds: GatewaySettings,
    *,
    own_stops: tuple[str, ...] = (),
    **shape: Any,
) -> Ask:
    """Return what the request wants of these prompts; `own_stops` end answers, too, and
    `shape` are the other fields of an Ask.

    ApiError if a prompt does not fit, or some setting is impossible for this model.
    """
    count = (request.n or 1) * len(prompts)
    most = min(bounds.most_choices, bounds.most_running)
    checked(count <= most, f"{count} answers in one request are more than {most}", "n")
    seed = secrets.randbits(32) if request.seed is None else request.seed
    sampling = sampling_of(request, card)
    # others never come, and a server would refuse a wish that names them
    stop_ids = frozenset(one for one in request.stop_token_ids or () if one < card.vocabulary_size)
    ends = stop_ids if request.ignore_eos else stop_ids.union(card.end_of_sequence_ids)
    least = request.min_tokens or 0
    checked(least <= most_tokens, f"more than the {most_tokens} tokens at most", "min_tokens")
    own = card.generation.rules
    choices = []
    for prompt in prompts:
        check_fits(prompt, card)
        room = card.context_length - len(prompt)
        for number in range(request.n or 1):
            settings = GenerateSettings(
                most_tokens=min(most_tokens, room),
                end_ids=ends,
                sampling=_seeded(sampling, seed + number),
                rules=replace(own, min_new_tokens=max(least, own.min_new_tokens)),
            )
            choices.append(Choice(tuple(prompt), settings))
    return Ask(
        choices=tuple(choices),
        prompt_tokens=sum(map(len, prompts)),
        stops=stops_of(request.stop),
        own_stops=(*own_stops, *card.generation.stop_strings),
        stop_ids=stop_ids,
        **shape,
    )


def check_fits(prompt: Sequence[int], card: ModelCard) -> None:
    """ApiError unless these ids are a prompt for this model."""
    try:
        check_prompt(prompt, card)
    except BadInput as error:
        is_long = len(prompt) >= card.context_length
        code = "context_length_exceeded" if is_long else None
        raise bad(error.sentence(), "prompt", code) from error


def sampling_of(request: Request, card: ModelCard) -> SamplingSettings:
    """The caller's choice, completed by the model's own generation config, then by OpenAI's
    defaults. ApiError for an impossible value.
    """
    own = card.generation
    top_k = own.top_k or 0 if request.top_k is None else max(request.top_k, 0)
    try:
        return SamplingSettings(
            temperature=_first(request.temperature, own.temperature, 1.0),
            top_p=max(_first(request.top_p, own.top_p, 1.0), _LEAST_SHARE),
            top_k=top_k,
            min_p=_first(request.min_p, own.min_p, 0.0),
            repetition_penalty=_first(request.repetition_penalty, own.repetition_penalty, 1.0),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            bias=_bias(request, card),
        )
    except BadInput as error:
        raise bad(error.sentence()) from error


def stops_of(stop: Stops | None) -> tuple[str, ...]:
    """The stop strings of a request."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def form_of(request: Request) -> Form | None:
    """The form that the request wants, if any. ApiError if it wants several."""
    asked = request.structured_outputs or StructuredOutputs()
    refused = ("structural_tag", "whitespace_pattern", "disable_any_whitespace")
    unsupported(
        {name: getattr(asked, name) for name in (*refused, "disable_additional_properties")}
    )
    kinds = ("json", "regex", "choice", "grammar")
    given = [(kind, getattr(asked, kind), "structured_outputs") for kind in kinds]
    given += [(kind, getattr(request, f"guided_{kind}"), f"guided_{kind}") for kind in kinds]
    given.append(("json", {"type": "object"} if asked.json_object else None, "structured_outputs"))
    given.append(("json", _schema_of(request.response_format), "response_format"))
    found = [each for each in given if each[1] is not None]
    if not found:
        return None
    kind, form, param = found[-1]
    checked(len(found) == 1, "an answer can have one form only", param)
    if kind == "json" and isinstance(form, str):
        try:
            form = json.loads(form)
        except (ValueError, RecursionError) as error:
            raise bad("the schema is not JSON", param) from error
    return kind, form if isinstance(form, str) else json.dumps(form), param


def _schema_of(form: ResponseFormat | None) -> dict[str, Any] | None:
    if form is None or form.type == "text":
        return None
    schema = form.json_schema.schema if form.json_schema is not None else None
    checked(form.type == "json_object" or schema is not None, "no schema", "response_format")
    return {"type": "object"} if schema is None else schema


def _bias(request: Request, card: ModelCard) -> dict[int, float]:
    given = request.logit_bias or {}
    checked(len(given) <= MOST_BIASED, f"at most {MOST_BIASED} ids", "logit_bias")
    bias = {}
    for key, value in given.items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10
        checked(
            is_id and int(key) < card.vocabulary_size,
            f"{key[:32]!r} is not an id of this model's {card.vocabulary_size} tokens",
            "logit_bias",
        )
        bias[int(key)] = value
    return bias


def _seeded(sampling: SamplingSettings, seed: int) -> SamplingSettings:
    return replace(sampling, seed=seed)


def _first(*values: float | None) -> float:
    return next((value for value in values if value is not None), 0.0)


def model_missing(asked: str, name: str) -> ApiError:
    """A request for a model that this swarm does not serve."""
    return ApiError(
        404,
        f"the model {asked[:128]!r} is not served here, only {name!r}",
        param="model",
        code="model_not_found",
    )
