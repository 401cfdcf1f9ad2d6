"""HTTP/1.1 connections on trio, by h11: each carries out one request after the other.

1. Whatever a client sends, nothing but its own connection ends of it.
2. Every wait on a client has a deadline, and a write that takes none of the task's cancellations
   has one, too: a stream is never cut within a chunk.
3. A connection is used again only if request and answer have both come to their ends.
4. Reading goes on while an answer is made, so that a closed socket is noticed.
"""

import logging
from collections.abc import Iterable
from email.utils import formatdate
from typing import Any, cast
from urllib.parse import unquote

import h11
import trio

from swarm.gateway.attending import App, Message, Scope

log = logging.getLogger(__name__)

IDLE_SECONDS = 75.0  # longer than most clients and proxies keep connections that they do not use
HEAD_SECONDS = 15.0  # until a request's head has come whole
WRITE_SECONDS = 20.0  # nobody reads there
LINGER_SECONDS = 2.0  # for a client to read why it should stop sending
READ_BYTES = 1 << 16
MOST_HEAD_BYTES = 1 << 15
MOST_AHEAD_BYTES = 1 << 17  # of a next request, while an answer is made


class Connection:
    """One client's connection."""

    def __init__(self, stream: trio.SocketStream, app: App) -> None:
        self._stream = stream
        self._app = app
        self._protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD_BYTES)
        self._waiting = trio.CancelScope()  # for a request
        self._is_ending = False
        self._work = trio.CancelScope()
        self._ahead = 0
        self._status = 0
        self._has_body = True
        self._headers: list[tuple[bytes, bytes]] = []

    async def run(self) -> None:
        """Answer requests until the client or `end` ends it, then close it. Never raises."""
        try:
            while not self._is_ending and await self._answer_next():
                self._protocol.start_next_cycle()
                self._ahead = 0
            if self._protocol.their_state in (h11.SEND_BODY, h11.ERROR) and self._status:
                await self._linger()
        except (
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            h11.ProtocolError,
            OSError,
        ) as error:
            log.debug("a connection ended: %s", error)
        except Exception:  # a bug, and the other connections go on
            log.exception("a connection failed")
        finally:
            await trio.aclose_forcefully(self._stream)

    def end(self) -> None:
        """Answer the request that is being answered, and no more."""
        self._is_ending = True
        self._waiting.cancel()

    async def _answer_next(self) -> bool:
        """Wait for a request and answer it; True if another may follow."""
        try:
            request = await self._next_request()
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint)
            self._status = error.error_status_hint
            return False
        if request is None:
            return False
        self._status = 0
        self._has_body = request.method != b"HEAD"
        with trio.CancelScope() as self._work:
            await self._app(self._scope_of(request), self._receive, self._send)
        if not self._status:  # whoever left needs none
            return False
        return self._protocol.our_state is self._protocol.their_state is h11.DONE

    async def _next_request(self) -> h11.Request | None:
        """Return the next request; None if none comes in time."""
        deadline = trio.current_time() + IDLE_SECONDS
        with trio.CancelScope(deadline=deadline) as self._waiting:
            while True:
                event = self._protocol.next_event()
                if isinstance(event, h11.Request):
                    return event
                if event is not h11.NEED_DATA:
                    return None
                self._protocol.receive_data(await self._stream.receive_some(READ_BYTES))
                begun = trio.current_time() + HEAD_SECONDS
                self._waiting.deadline = min(self._waiting.deadline, begun)
        return None

    async def _receive(self) -> Message:
        """The next part of the body or, once the client has left, the news of it."""
        while True:
            try:
                event = self._protocol.next_event()
            except h11.RemoteProtocolError:
                return {"type": "http.disconnect"}
            if isinstance(event, h11.Data):
                return {"type": "http.request", "body": bytes(event.data), "more_body": True}
            if isinstance(event, h11.EndOfMessage):
                return {"type": "http.request", "body": b"", "more_body": False}
            if isinstance(event, h11.ConnectionClosed):
                return {"type": "http.disconnect"}
            if event is h11.PAUSED and self._ahead > MOST_AHEAD_BYTES:
                await trio.sleep_forever()
            try:
                if self._protocol.they_are_waiting_for_100_continue:
                    await self._write([h11.InformationalResponse(status_code=100, headers=[])])
                data = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                return {"type": "http.disconnect"}
            self._protocol.receive_data(data)
            self._ahead += len(data) if event is h11.PAUSED else 0

    async def _send(self, message: Message) -> None:
        """Send a part of the answer; ends the work on it if nobody takes it."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message["headers"])
            return
        events: list[h11.Event] = []
        if self._protocol.our_state is h11.SEND_RESPONSE:
            events.append(h11.Response(status_code=self._status, headers=self._fields()))
        if message.get("body") and self._has_body:
            events.append(h11.Data(data=message["body"]))
        if not message.get("more_body", False):
            events.append(h11.EndOfMessage())
        try:
            await self._write(events)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._work.cancel()
            await trio.lowlevel.checkpoint()

    def _fields(self) -> list[tuple[bytes, bytes]]:
        fields = [*self._headers, (b"date", formatdate(usegmt=True).encode())]
        return [*fields, (b"connection", b"close")] if self._is_ending else fields

    async def _write(self, events: Iterable[h11.Event]) -> None:
        data = b"".join(self._protocol.send(event) or b"" for event in events)
        deadline = trio.current_time() + WRITE_SECONDS
        with trio.CancelScope(deadline=deadline, shield=True) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError(f"it took nothing for {WRITE_SECONDS:g} seconds")

    async def _refuse(self, status: int) -> None:
        """Answer what is no request."""
        if self._protocol.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            response = h11.Response(status_code=status, headers=headers)
            await self._write([response, h11.EndOfMessage()])

    async def _linger(self) -> None:
        """Let the client read the answer before the socket is closed: it still sends, and closed
        now, the answer would be lost with what was sent.
        """
        await self._stream.send_eof()
        with trio.move_on_after(LINGER_SECONDS):
            while await self._stream.receive_some(READ_BYTES):
                pass

    def _scope_of(self, request: h11.Request) -> Scope:
        path, _, query = request.target.partition(b"?")
        client = self._stream.socket.getpeername()
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.1"},
            "http_version": request.http_version.decode(),
            "method": request.method.decode().upper(),
            "scheme": "http",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": list(cast(Any, request.headers)),
            "client": client[:2],
            "server": self._stream.socket.getsockname()[:2],
        }
