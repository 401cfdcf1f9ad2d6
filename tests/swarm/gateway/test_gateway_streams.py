"""Streams in virtual time: silence, repairs, lost routes, clients that leave, room, slow bodies."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from gateway_world import (
    MODEL,
    Answer,
    WorldSwarm,
    application_of,
    ask,
)
from session_worlds import World, run, said_after

from swarm.gateway.attending import App, Attended
from swarm.gateway.faults import ApiError

COMPLETIONS = "/v1/completions"
PROMPT = "Once"
LONG = {
    "model": MODEL,
    "prompt": PROMPT,
    "max_tokens": 40,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}


def in_world(
    *spans: str, **bounds: Any
) -> Callable[[Callable[[World, App], Awaitable[None]]], None]:
    """Run a body with a world of these servers, and the API before them."""

    def carry_out(body: Callable[[World, App], Awaitable[None]]) -> None:
        async def main(world: World) -> None:
            await world.add(*spans)
            await body(world, application_of(WorldSwarm(world), **bounds))

        run(main)

    return carry_out


def text_of(answer: Answer) -> str:
    return "".join(
        choice["text"]
        for event in answer.events
        if event != "[DONE]"
        for choice in event["choices"]
    )


def wanted(count: int) -> str:
    world = WorldSwarm(None)  # type: ignore[arg-type]
    prompt = world.model.tokens.encode(PROMPT)
    return world.model.tokens.decode(said_after(prompt, count))


def test_a_stream_is_the_models_text() -> None:
    async def body(world: World, app: App) -> None:
        made = await ask(app, COMPLETIONS, LONG)
        assert (made.status, made.headers["content-type"].split(";")[0]) == (
            200,
            "text/event-stream",
        )
        assert text_of(made) == wanted(40)
        assert made.events[-1] == "[DONE]"
        await trio.sleep(0.5)
        assert all(server.is_clean for server in world.servers)

    in_world("0:2", "2:4")(body)


def test_silence_is_filled_with_comments_and_who_hangs_up_then_is_noticed_at_once() -> None:
    async def body(world: World, app: App) -> None:
        world.servers[0].executor.is_stuck = True  # the prefill never ends
        hang_up, made = trio.Event(), Answer()
        async with trio.open_nursery() as nursery:

            async def asking() -> None:
                await ask(app, COMPLETIONS, LONG, hang_up=hang_up, answer=made)
                nursery.cancel_scope.cancel()

            nursery.start_soon(asking)
            await trio.sleep(17)
            assert made.status == 200
            assert made.body == b": keep-alive\n\n" * 3
            left = trio.current_time()
            hang_up.set()
            await trio.sleep(30)
        assert trio.current_time() - left < 1
        await trio.sleep(0.5)
        assert all(server.is_clean for server in world.servers)

    in_world("0:2", "2:4")(body)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_whoever_hangs_up_while_tokens_come_leaves_nothing_on_the_servers(
    is_streamed: bool,
) -> None:
    async def body(world: World, app: App) -> None:
        hang_up = trio.Event()
        executor = world.servers[0].executor
        async with trio.open_nursery() as nursery:

            async def asking() -> None:
                asked = {**LONG, "max_tokens": 400, "stream": is_streamed}
                await ask(app, COMPLETIONS, asked, hang_up=hang_up)
                nursery.cancel_scope.cancel()

            nursery.start_soon(asking)
            while len(executor.jobs) < 20:  # noqa: ASYNC110
                await trio.sleep(0.01)
            left = trio.current_time()
            hang_up.set()
            await trio.sleep(60)
        assert trio.current_time() - left < 1
        await trio.sleep(0.5)
        assert len(executor.jobs) < 30
        assert all(server.is_clean for server in world.servers)

    in_world("0:2", "2:4")(body)


def test_a_server_lost_in_a_stream_changes_nothing_but_what_is_told_of_it() -> None:
    async def body(world: World, app: App) -> None:
        made = Answer()

        def strike(_part: bytes) -> None:
            if len(made.parts) == 10:
                world.network.kill(world.servers[0].peer)

        made.on_part = strike
        await ask(app, COMPLETIONS, LONG, answer=made)
        assert text_of(made) == wanted(40)
        assert made.events[-2]["choices"][0]["finish_reason"] == "length"
        assert made.events[-2]["x_swarm"]["failovers"] == 1
        assert made.events[-2]["x_swarm"]["replayed_tokens"] > 0

    in_world("0:4", "0:4")(body)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_route_that_is_lost_for_good_is_an_error_and_never_an_end(is_streamed: bool) -> None:
    async def body(world: World, app: App) -> None:
        made = Answer()
        executor = world.servers[0].executor
        async with trio.open_nursery() as nursery:

            async def strike() -> None:
                while len(executor.jobs) < 10:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                world.network.kill(world.servers[0].peer)
                world.servers.clear()

            nursery.start_soon(strike)
            await ask(app, COMPLETIONS, {**LONG, "stream": is_streamed}, answer=made)
        if is_streamed:
            *chunks, last = made.events
            assert all(c["choices"][0]["finish_reason"] is None for c in chunks)
            assert len(chunks) >= 9
        else:
            last = made.json
            assert made.status == 503
            assert made.headers["retry-after"]
        assert "block 0 is served by nobody" in last["error"]["message"]
        assert last["error"]["type"] == "service_unavailable"
        assert made.is_whole

    in_world("0:4")(body)


def test_anthropics_streams_name_their_errors() -> None:
    async def body(world: World, app: App) -> None:
        made = Answer()

        def strike(_part: bytes) -> None:
            if len(made.parts) == 10:
                world.network.kill(world.servers.pop().peer)

        made.on_part = strike
        messages = [{"role": "user", "content": PROMPT}]
        asked = {"model": MODEL, "messages": messages, "max_tokens": 100, "stream": True}
        asked["temperature"] = 0  # drawn, it might end before it is struck
        await ask(app, "/v1/messages", asked, answer=made)
        *_, last = made.body.decode().strip().split("\n\n")
        assert last.startswith("event: error\ndata: ")
        assert made.events[-1]["error"]["type"] == "overloaded_error"
        assert not any(event["type"] == "message_stop" for event in made.events)

    in_world("0:4")(body)


def test_before_a_route_is_found_a_stream_has_a_status_of_its_own() -> None:
    async def body(world: World, app: App) -> None:
        began = trio.current_time()
        made = await ask(app, COMPLETIONS, {**LONG, "model": "Architecture"})
        assert (made.status, made.json["error"]["code"]) == (503, "uncovered")
        assert 2 <= trio.current_time() - began < 4

    in_world(route_seconds=2.0)(body)


def test_more_answers_than_there_is_room_for_are_told_to_come_again() -> None:
    async def body(world: World, app: App) -> None:
        made: list[Answer] = []

        async def asking(count: int) -> None:
            made.append(await ask(app, COMPLETIONS, {**LONG, "n": count}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(asking, 2)
            await trio.sleep(0.02)
            nursery.start_soon(asking, 2)
            await trio.sleep(0.02)
            nursery.start_soon(asking, 1)
        assert [each.status for each in made] == [429, 200, 200]
        assert made[0].headers["retry-after"] == "1"
        assert "2 of 3" in made[0].json["error"]["message"]
        assert (await ask(app, COMPLETIONS, {**LONG, "n": 3})).status == 200

    in_world("0:4", most_running=3, most_waiting=0)(body)


def test_an_answer_that_takes_too_long_is_ended() -> None:
    async def body(world: World, app: App) -> None:
        world.servers[0].executor.is_stuck = True
        made = await ask(app, COMPLETIONS, {**LONG, "stream": False})
        assert (made.status, trio.current_time() < 120) == (503, True)

    in_world("0:4", answer_seconds=60.0)(body)


def test_servers_without_room_are_a_429() -> None:
    async def body(world: World) -> None:
        await world.add("0:4", tokens=16)
        app = application_of(WorldSwarm(world), route_seconds=2.0)
        made = await ask(app, COMPLETIONS, {**LONG, "stream": False})
        assert (made.status, made.json["error"]["code"]) == (429, "servers_full")
        assert int(made.headers["retry-after"]) >= 1

    run(body)


def attended(messages: list[Any], *, most: int = 10, within: float = 30.0) -> list[Any]:
    """What an application gets of these messages from the socket, or what it is told."""
    got: list[Any] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        try:
            got.append((await receive())["body"])
        except ApiError as error:
            got.append(error.status)
        await trio.sleep(5)
        got.append("worked")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await trio.sleep(5)
        got.append("ended")

    async def body(_world: World) -> None:
        async def receive() -> Any:
            if not messages:
                await trio.sleep_forever()
            seconds, message = messages.pop(0)
            await trio.sleep(seconds)
            return message

        async def send(_message: Any) -> None:
            await trio.lowlevel.checkpoint()

        await Attended(app, most_bytes=most, within=within)({"type": "http"}, receive, send)

    run(body)
    return got


def part(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


GONE = {"type": "http.disconnect"}


def test_a_body_comes_whole_however_it_was_cut() -> None:
    cut = [(0, part(b"ab", more=True)), (1, part(b"cd", more=True)), (1, part(b""))]
    assert attended(cut) == [b"abcd", "worked", "ended"]


def test_a_body_that_is_too_large_is_told_at_once_and_the_rest_thrown_away() -> None:
    flood = [(0, part(b"x" * 8, more=True)) for _ in range(100)]
    assert attended(flood) == [413, "worked", "ended"]
    assert not flood


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    assert attended([(0, part(b"ab", more=True))], within=3.0) == [408, "worked", "ended"]


def test_who_leaves_cancels_the_work_and_not_what_is_done_after_the_answer() -> None:
    assert attended([(0, part(b"ab")), (2, GONE)]) == [b"ab"]
    assert attended([(0, part(b"ab")), (7, GONE)]) == [b"ab", "worked", "ended"]
