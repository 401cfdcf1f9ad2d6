"""Between connections and the application: one place reads what a client sends.

Somebody must read all the time, or a closed socket is not noticed.

1. The body is read whole, up to a bound, before anybody may see it; the rest is thrown away.
2. Whoever closes the socket before the answer is out cancels all work on it at once.
3. An answer that is out is never cancelled: the connection is about to be used again.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import trio

from swarm.gateway.faults import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Attended:
    """An ASGI application whose requests come whole and whose clients are watched."""

    def __init__(self, app: App, *, most_bytes: int, within: float) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._within = within

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry one request out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        inbox = _Inbox(self._most_bytes, self._within)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inbox.fill, receive, nursery.cancel_scope)
            await self._app(scope, inbox.receive, inbox.noticing(send))
            nursery.cancel_scope.cancel()


class _Inbox:
    """What one client sends."""

    def __init__(self, most_bytes: int, within: float) -> None:
        self._most_bytes = most_bytes
        self._within = within
        self._parts: list[bytes] = []
        self._size = 0
        self._is_whole = trio.Event()
        self._is_answered = False

    async def fill(self, receive: Receive, scope: trio.CancelScope) -> None:
        """Take whatever comes until the client or the answer is done."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                if not self._is_answered:
                    scope.cancel()
                return
            self._add(message.get("body", b""))
            if not message.get("more_body", False):
                self._is_whole.set()

    async def receive(self) -> Message:
        """Return the whole body. ApiError 413 if it is too large, 408 if it does not come."""
        with trio.move_on_after(self._within) as scope:
            await self._is_whole.wait()
        if scope.cancelled_caught:
            raise ApiError(408, f"the request did not come within {self._within:g} seconds")
        if self._size > self._most_bytes:
            raise ApiError(413, f"the request is larger than {self._most_bytes} bytes")
        return {"type": "http.request", "body": b"".join(self._parts), "more_body": False}

    def noticing(self, send: Send) -> Send:
        """`send`, but the last message of an answer is noticed before it is out."""

        async def noticed(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._is_answered = True
            await send(message)

        return noticed

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._most_bytes:
            self._parts.append(part)
        else:
            self._parts.clear()
            self._is_whole.set()  # enough is known
