"""The gateway behind real sockets: clients that flood, stall, leave, or say nonsense."""

import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import trio
from gateway_world import MODEL, ScriptedSwarm

from swarm.gateway import http1, serving
from swarm.gateway.door import open_door
from swarm.gateway.serving import open_gateway
from swarm.gateway.settings import GatewaySettings

Connect = Callable[[], Awaitable[trio.SocketStream]]


def with_gateway(body: Callable[[Connect], Awaitable[None]], script: str = "Hi.") -> None:
    """Run a body that can connect; afterwards no task of a connection may be left."""

    async def main() -> None:
        with trio.fail_after(60):
            door = open_door(GatewaySettings(most_body_bytes=100_000))
            port = door.bound.getsockname()[1]
            async with open_gateway(ScriptedSwarm(script), door) as url:
                assert url == f"http://127.0.0.1:{port}"

                async def connect() -> trio.SocketStream:
                    return await trio.open_tcp_stream("127.0.0.1", port)

                await answered(await connect(), request("/health"), b"200")
                before = await settled()
                await body(connect)
                while await settled() > before:  # noqa: ASYNC110
                    await trio.sleep(0.05)

    trio.run(main)


async def settled() -> int:
    """How many tasks there are, once those that were about to end have ended."""
    await trio.sleep(0.1)
    return trio.lowlevel.current_statistics().tasks_living


def request(path: str, body: Any = None, *, length: int | None = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    size = len(data) if length is None else length
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + data


async def answered(stream: trio.SocketStream, data: bytes, status: bytes) -> None:
    """Send, and wait for this status; then close."""
    async with stream:
        await stream.send_all(data)
        assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 " + status)


COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 500, "temperature": 0}


async def flood(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"x" * 65_536)


def test_a_flood_is_refused_read_for_a_while_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http1, "LINGER_SECONDS", 0.5)

    async def body(connect: Connect) -> None:
        for size in (1_000_000, 10_000_000_000):
            async with await connect() as stream:
                await stream.send_all(request("/v1/completions", {}, length=size))
                if size > 1_000_000:
                    with pytest.raises(trio.BrokenResourceError):
                        await flood(stream)
                else:
                    await stream.send_all(b"x" * 900_000)
                    assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 413")
        stream = await connect()
        await answered(stream, request("/v1/completions", COMPLETION), b"200")

    with_gateway(body)


def test_half_a_request_and_nonsense_leave_nothing() -> None:
    async def body(connect: Connect) -> None:
        for data in (
            request("/v1/completions", COMPLETION, length=10_000),
            b"POST /v1/comp",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            async with await connect() as stream:
                await stream.send_all(data)
                await trio.sleep(0.1)

    with_gateway(body)


HEADERS = (
    b"Host: localhost\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"HTTP2-Settings: zzzz\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: close\r\n",
    b"X: " + b"y" * 20_000 + b"\r\n",
    b"Authorization: \xff\xfe\r\n",
)
LINES = (
    b"GET /health HTTP/1.1\r\n",
    b"POST /v1/completions HTTP/1.1\r\n",
    b"GET /health HTTP/1.0\r\n",
    b"OPTIONS * HTTP/1.1\r\n",
    b"GET /\xff%ff HTTP/1.1\r\n",
    b"CONNECT x:1 HTTP/1.1\r\n",
    b"HEAD /health HTTP/1.1\r\n",
    b"GET //?%00 HTTP/1.1\r\n",
)
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HPACK = bytes.fromhex("828684418a089d5c0b8170dc780f03")  # GET / of a host


def nonsense(rng: Random) -> bytes:
    """Requests of HTTP/1 and HTTP/2 that somebody got wrong."""
    if rng.random() < 0.5:
        headers = b"".join(rng.sample(HEADERS, rng.randrange(5)))
        bodies = (b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", rng.randbytes(20))
        data = rng.choice(LINES) + headers + b"\r\n" + rng.choice(bodies)
        return data + rng.choice((b"", b"", LINES[0] + HEADERS[0] + b"\r\n", HTTP2))
    begun = bytes([0, 0, 15, 1, rng.choice((4, 5, 0x24)), 0, 0, 0, 1]) + HPACK
    frames = HTTP2 + (begun if rng.random() < 0.7 else b"")
    for _ in range(rng.randrange(6)):
        size, kind = rng.choice((0, 4, 5, 8)), rng.randrange(10)
        stream = rng.choice((0, 1, 3, 5))
        frames += bytes([0, 0, size, kind, rng.randrange(256), 0, 0, 0, stream])
        frames += rng.randbytes(size)
    return frames


def test_no_nonsense_ends_the_connections_of_others() -> None:
    async def body(connect: Connect) -> None:
        rng = Random(3)

        async def one(data: bytes) -> None:
            with suppress(trio.BrokenResourceError), trio.move_on_after(rng.choice((0.005, 0.1))):
                async with await connect() as stream:
                    cut = rng.randrange(len(data) + 1)
                    await stream.send_all(data[:cut])
                    await stream.send_all(data[cut:])
                    while await stream.receive_some(4096):
                        pass

        for _ in range(40):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(one, nonsense(rng))
        await answered(await connect(), request("/v1/completions", COMPLETION), b"200")

    with_gateway(body)


def test_one_connection_too_many_is_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_CONNECTIONS", 2)

    async def body(connect: Connect) -> None:
        async with await connect() as first, await connect(), await connect() as third:
            assert await third.receive_some(1) == b""
            await first.send_all(request("/health"))
            assert (await first.receive_some(4096)).startswith(b"HTTP/1.1 200")
        await settled()
        await answered(await connect(), request("/health"), b"200")

    with_gateway(body)


def test_a_connection_is_used_again_after_an_answer_an_error_and_a_stream() -> None:
    async def body(connect: Connect) -> None:
        async with await connect() as stream:
            for data, status in (
                (request("/v1/completions", COMPLETION), b"200"),
                (request("/v1/completions", {"model": MODEL}), b"400"),
                (request("/v1/completions", {**COMPLETION, "stream": True}), b"200"),
                (request("/v1/models"), b"200"),
            ):
                await stream.send_all(data)
                said = b""
                while not said.endswith((b"}", b"0\r\n\r\n")):
                    said += await stream.receive_some(65536)
                assert said.startswith(b"HTTP/1.1 " + status)

    with_gateway(body)


def test_http_is_spoken_as_it_is_written() -> None:
    async def said_to(connect: Connect, data: bytes) -> bytes:
        said = b""
        async with await connect() as stream:
            await stream.send_all(data)
            with trio.move_on_after(0.5):
                while part := await stream.receive_some(65536):
                    said += part
        return said

    async def body(connect: Connect) -> None:
        head = await said_to(connect, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert head.endswith(b"\r\n\r\n")
        pipelined = await said_to(connect, request("/health") + request("/v1/models"))
        assert pipelined.count(b"HTTP/1.1 200") == 2
        asked = request("/v1/completions", COMPLETION)
        expecting = asked.replace(b"Host: localhost", b"Host: localhost\r\nExpect: 100-continue")
        top, _, rest = expecting.partition(b"\r\n\r\n")
        async with await connect() as stream:
            await stream.send_all(top + b"\r\n\r\n")
            assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 100")
            await stream.send_all(rest)
            assert (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200")
        old = await said_to(connect, b"GET /health HTTP/1.0\r\n\r\n")
        assert old.startswith(b"HTTP/1.1 200")
        assert old.endswith(b"}")
        assert (await said_to(connect, b"BREW /tea\r\n\r\n")).startswith(b"HTTP/1.1 400")
        long = b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000
        assert (await said_to(connect, long)).startswith(b"HTTP/1.1 431")

    with_gateway(body)


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "HEAD_SECONDS", 0.3)

    async def body(connect: Connect) -> None:
        async with await connect() as stream:
            await stream.send_all(b"GET /health HTT")
            with trio.fail_after(20):
                assert await stream.receive_some(1) == b""

    with_gateway(body)


def test_who_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "WRITE_SECONDS", 0.5)

    async def body(connect: Connect) -> None:
        asked = {**COMPLETION, "stream": True, "n": 32, "logprobs": 20}
        before = await settled()
        stream = await connect()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await stream.send_all(request("/v1/completions", asked))
        assert await settled() > before
        while await settled() > before:  # noqa: ASYNC110  (with_gateway has a deadline)
            await trio.sleep(0.05)
        await stream.aclose()

    with_gateway(body, script="x" * 600)


def test_the_end_does_not_wait_for_idle_connections_but_for_answers() -> None:
    async def main() -> None:
        door = open_door(GatewaySettings())
        port = door.bound.getsockname()[1]
        said = bytearray()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                async with open_gateway(ScriptedSwarm("x" * 600), door):
                    idle = await trio.open_tcp_stream("127.0.0.1", port)
                    busy = await trio.open_tcp_stream("127.0.0.1", port)
                    await busy.send_all(request("/v1/completions", {**COMPLETION, "stream": True}))
                    said += await busy.receive_some(1000)

                    async def read_on() -> None:
                        while b"[DONE]" not in said:
                            said.extend(await busy.receive_some(65536))

                    nursery.start_soon(read_on)
                    began = trio.current_time()
                assert trio.current_time() - began < 9  # GRACE_SECONDS were not needed
                assert await idle.receive_some(1) == b""
        assert said.count(b'"text":"x"') == 500

    trio.run(main)
