"""What programs send, as structs, and the first look at it.

Unknown fields are passed over, as OpenAI's own server does with some and vLLM with all; fields that
would change the answer and are not supported are refused by name (`NEUTRAL`, `unsupported`).

1. `read` raises nothing but ApiError 400, and names the field.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from swarm.gateway.faults import bad, unsupported

Asked = TypeVar("Asked")

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Stops = Stop | Annotated[list[Stop], msgspec.Meta(max_length=16)]
Choices = Annotated[list[str], msgspec.Meta(min_length=1, max_length=4096)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
ModelName = Annotated[str, msgspec.Meta(max_length=512)]

_PLACE = re.compile(r" - at `(?:key in )?\$?\.?(?P<path>[^`]*)`$")


NEUTRAL: dict[str, tuple[Any, ...]] = {
    # other programs' fields that change an answer, with the values that do not; one that the
    # request's own kind has is not looked at
    **dict.fromkeys(
        ("use_beam_search", "echo", "include_stop_str_in_output", "logprobs"), (False,)
    ),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("n", "best_of", "num_beams", "length_penalty", "typical_p", "tfs"), (1,)),
    **dict.fromkeys(("top_a", "mirostat", "dry_multiplier", "xtc_probability"), (0,)),
    **dict.fromkeys(("top_logprobs", "no_repeat_ngram_size", "min_new_tokens"), (0,)),
    **dict.fromkeys(("stop", "stop_sequences", "bad_words", "tools", "documents"), ([],)),
    **dict.fromkeys(("suffix", "grammar", "chat_template"), ("",)),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), ()),
    **dict.fromkeys(("max_new_tokens", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("allowed_token_ids", "logits_processors"), ([],)),
    "n_predict": (-1,),
    "prompt_logprobs": (0,),
    **dict.fromkeys(("guided_whitespace_pattern", "thinking_token_budget"), ()),
    **dict.fromkeys(("mm_processor_kwargs", "json_schema", "prompt_embeds"), ()),
    "response_format": ({"type": "text"},),
}
_Refused: Any = msgspec.defstruct("_Refused", [(name, Any, None) for name in NEUTRAL], frozen=True)


class StreamOptions(msgspec.Struct, frozen=True):
    """What else a stream should hold."""

    include_usage: bool | None = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """The form of the answer: vLLM's newer name for it. At most one may be given."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How every kind of answer may be chosen. None: as the model's own configuration says."""

    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    # not OpenAI's, but vLLM's
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=256)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def sampling(self) -> dict[str, Any]:
        """These fields alone, to be handed on to another kind of request."""
        return {name: getattr(self, name) for name in Sampling.__struct_fields__}


class Request(Sampling, frozen=True, kw_only=True):
    """What chats and completions have in common."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    stop: Stops | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    response_format: "ResponseFormat | None" = None

    @property
    def has_usage(self) -> bool:
        """True when a stream should end with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Request, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    suffix: str | None = None


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """A function the model called; `arguments` is JSON as text."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    """A call in an assistant's message."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct, frozen=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool the model may use. Those of another type run at a provider, and are left out."""

    function: Function | None = None
    type: str = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """The function that must be called."""

    name: str


class NamedTool(msgspec.Struct, frozen=True):
    """The tool that must be used."""

    function: NamedFunction | None = None
    type: str = "function"


class JsonSchema(msgspec.Struct, frozen=True):
    """A schema that the answer must follow."""

    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Request, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # vLLM's: the template's own variables, and where the answer begins
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    prediction: Any = None
    web_search_options: Any = None


def read(body: bytes, kind: type[Asked]) -> Asked:
    """Return the request that the body holds. ApiError 400 names what is wrong with it."""
    try:
        asked = msgspec.json.decode(body, type=kind)
        if issubclass(kind, Sampling) and "stream" in kind.__struct_fields__:  # one that generates
            _check_passed_over(msgspec.json.decode(body, type=_Refused), kind)
        return asked
    except msgspec.ValidationError as error:
        sentence = str(error)
        place = _PLACE.search(sentence)
        param = place["path"] if place is not None else _missing(sentence)
        raise bad(sentence.replace("`$.", "`"), param or None) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise bad("the body is nested too deeply") from error


def _check_passed_over(given: Any, kind: type[Sampling]) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(given, name) if name not in kind.__struct_fields__ else None
        unsupported({name: value is not None and value not in neutral})


def _missing(sentence: str) -> str | None:
    found = re.search(r"missing required field `(\w+)`", sentence)
    return found[1] if found else None
