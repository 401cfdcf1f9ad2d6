"""One request and its answer: read, reply, or stream.

1. An answer is begun once. What fails before it is a status and a body; what fails in a stream is
   an event of it, and the stream ends without the mark of a whole one.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from swarm.errors import SwarmError
from swarm.gateway.attending import Receive, Scope, Send
from swarm.gateway.faults import ApiError, fault_of, openai_form
from swarm.gateway.metrics import Meter
from swarm.gateway.requests import read

log = logging.getLogger(__name__)

Asked = TypeVar("Asked")
Handler = Callable[["Exchange"], Awaitable[None]]
Form = Callable[[ApiError], dict[str, Any]]

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # a proxy must not hold tokens back
}


class Exchange:
    """One request, and what is sent back."""

    def __init__(self, request: Request, send: Send, path: str, meter: Meter) -> None:
        self.request = request
        self._send = send
        self._path = path
        self._meter = meter
        self.is_begun = False

    async def read(self, kind: type[Asked]) -> Asked:
        """Return the request's body. ApiError if it is not JSON of this kind."""
        declared = self.request.headers.get("content-type", "")
        if declared.partition(";")[0].strip().lower() != "application/json":
            # and no page in a browser may send it without asking first
            raise ApiError(415, "the content-type must be application/json")
        return read(await self.request.body(), kind)

    async def reply(
        self, body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer with an object."""
        data = msgspec.json.encode(body)
        await self.reply_bytes(data, "application/json", status, headers)

    async def reply_bytes(
        self,
        data: bytes,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with these bytes."""
        fields = {"content-type": content_type, "content-length": str(len(data)), **(headers or {})}
        await self._begin(status, fields)
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def begin_stream(self) -> None:
        """Begin a stream of events."""
        await self._begin(200, _STREAM_HEADERS)

    async def push(self, data: bytes) -> None:
        """Send a part of the stream."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self) -> None:
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, status: int, fields: Mapping[str, str]) -> None:
        self.is_begun = True
        self._meter.responses.labels(self._path, str(status)).inc()
        headers = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


class Endpoint:
    """An ASGI application of one handler at one path, whose errors take `form`."""

    def __init__(self, handler: Handler, meter: Meter, path: str, form: Form = openai_form) -> None:
        self._handler = handler
        self._meter = meter
        self._path = path
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(Request(scope, receive), send, self._path, self._meter)
        try:
            await self._handler(exchange)
        except ApiError as error:
            await self._fail(exchange, error)
        except SwarmError as error:
            await self._fail(exchange, fault_of(error))
        except Exception:  # a bug: told and logged, and the others are served on
            log.exception("a request to %s failed", scope["path"])
            await self._fail(exchange, ApiError(500, "a bug in swarm: its log tells more"))

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        body = self._form(error)
        if not exchange.is_begun:
            await exchange.reply(body, error.status, error.headers)
            return
        kind = b"event: error\n" if body.get("type") == "error" else b""  # Anthropic names events
        await exchange.push(kind + b"data: " + msgspec.json.encode(body) + b"\n\n")
        await exchange.end_stream()
