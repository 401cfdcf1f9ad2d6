"""What is said of a request that fails: a status, and OpenAI's or Anthropic's form around it.

1. A fault of the swarm is 429 or 503, and its sentence says what is missing. 500 is a bug of ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swarm.errors import BadInput, NoRoute, Refusal, SwarmError

RETRY_SECONDS = 1.0  # that an answer takes, until one is known
MOST_RETRY_SECONDS = 60.0  # clients heed no longer one
RETRY_ROUTE_SECONDS = 5.0  # a newcomer is known about this soon

_OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault, `code` the kind, if any."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_seconds = retry_seconds

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, in whole seconds, where asking again may help; the scheme for a key."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.retry_seconds is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_seconds)))}


def openai_form(error: ApiError) -> dict[str, Any]:
    """The body of an error as OpenAI's clients expect it."""
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_form(error: ApiError) -> dict[str, Any]:
    """The body of an error as Anthropic's clients expect it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it stands."""
    return ApiError(400, message, param=param, code=code)


def fault_of(error: SwarmError, spans: Sequence[str] = ()) -> ApiError:
    """What a caller is told of an error of ours; `spans`: blocks whose servers failed."""
    sentence = error.sentence()
    if spans and not any(span in sentence for span in spans):
        sentence += f" (blocks {', '.join(spans)})"
    match error:
        case BadInput():
            return bad(sentence)
        case Refusal():
            return ApiError(
                429, sentence, code="servers_full", retry_seconds=max(error.retry_seconds, 1.0)
            )
        case NoRoute() if error.kind == "refused":  # every block is served, nobody has room
            return ApiError(429, sentence, code="servers_full", retry_seconds=RETRY_ROUTE_SECONDS)
    return ApiError(503, sentence, code=error.kind, retry_seconds=RETRY_ROUTE_SECONDS)


def checked(holds: bool, message: str, param: str) -> None:
    """Raise the ApiError of a field that is not as it must be."""
    if not holds:
        raise bad(message, param)


def unsupported(fields: Mapping[str, object]) -> None:
    """ApiError for the first field that is given and would be passed over."""
    for name, value in fields.items():
        if value:
            raise bad(f"{name} is not supported here", name, "unsupported_parameter")
