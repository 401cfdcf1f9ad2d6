"""The server's driver: who is let in, what is refused, and what grace leaves behind."""

import msgspec
import pytest
import trio
from session_worlds import FINGERPRINT, NOW, Served, World, candidates, run

from swarm import server as module
from swarm.messages import (
    CHAIN_PROTOCOL,
    Attach,
    Close,
    Fault,
    HopName,
    Open,
    Output,
    Prepare,
    Ready,
    Refused,
    Step,
)
from swarm.server import CLOCK_SLACK_SECONDS, GRACE_SECONDS, MOST_PREPARED
from swarm.transport import MessageStream
from swarm.wire import Tensor

SESSION = b"s" * 16
IDS = {"ids": Tensor("int32", (1, 2), bytes(8))}


def signed(world: World, served: Served, **changes: object) -> Open:
    opened = Open(
        session=SESSION,
        epoch=1,
        hops=(HopName(served.peer, str(served.span)),),
        at=0,
        client=world.identity.peer,
        fingerprint=FINGERPRINT,
        max_tokens=64,
        valid_until=NOW,
    )
    opened = msgspec.structs.replace(opened, **changes)
    signature = world.identity.sign(opened.signed_bytes())
    return msgspec.structs.replace(opened, signature=signature)


async def said_to(world: World, served: Served, opened: Open) -> MessageStream:
    stream = MessageStream(await world.host.open(served.peer, CHAIN_PROTOCOL, within=5.0))
    await stream.send(opened)
    return stream


async def refusal(world: World, served: Served, opened: Open) -> Refused:
    stream = await said_to(world, served, opened)
    answer = await stream.receive(within=5.0)
    await stream.close()
    assert isinstance(answer, Refused), answer
    return answer


def test_a_signed_open_is_answered_ready() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        assert await stream.receive(within=5.0) == Ready(have=0)

    run(body)


def test_an_open_that_its_client_did_not_sign_is_not_allowed() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        forged = msgspec.structs.replace(signed(world, served), max_tokens=65)
        assert (await refusal(world, served, forged)).reason == "not_allowed"

    run(body)


def test_an_open_that_is_too_old_is_not_allowed() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        just = signed(world, served, valid_until=NOW - CLOCK_SLACK_SECONDS)
        assert await (await said_to(world, served, just)).receive(within=5.0) == Ready(have=0)
        late = signed(world, served, valid_until=NOW - CLOCK_SLACK_SECONDS - 1, session=b"t" * 16)
        assert "old" in (await refusal(world, served, late)).message

    run(body)


def test_an_open_that_names_another_peer_here_or_another_sender_is_not_allowed() -> None:
    async def body(world: World) -> None:
        one, other = await world.add("0:2", "2:4")
        hops = (HopName(one.peer, "0:2"), HopName(other.peer, "2:4"))
        misplaced = signed(world, other, hops=hops)
        assert "another peer" in (await refusal(world, other, misplaced)).message
        foreign = signed(world, other, hops=hops, at=1)  # from the client, not from the hop before
        assert "another sender" in (await refusal(world, other, foreign)).message
        assert one.is_clean
        assert other.is_clean

    run(body)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "wrong_model"),
        ({"max_tokens": 4097}, "full"),
        ({"span": "0:5"}, "span_not_held"),
        ({"span": "3:3"}, "span_not_held"),
        ({"span": "3:2"}, "span_not_held"),
    ],
)
def test_what_a_server_cannot_take_is_refused_with_the_right_reason(
    changes: dict[str, object], reason: str
) -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        asked = dict(changes)
        if "span" in asked:
            asked["hops"] = (HopName(served.peer, str(asked.pop("span"))),)
        refused = await refusal(world, served, signed(world, served, **asked))
        assert refused.reason == reason
        assert (refused.retry_seconds > 0) == (reason == "full")

    run(body)


def test_legs_without_tokens_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LEGS", 1)

    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        await said_to(world, served, signed(world, served, max_tokens=0))
        await trio.sleep(0.1)
        another = signed(world, served, max_tokens=0, session=b"t" * 16)
        assert (await refusal(world, served, another)).reason == "full"

    run(body)


def test_a_server_that_drains_refuses_new_sessions_and_serves_the_old() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        await stream.receive(within=5.0)
        served.server.is_draining = True
        other = signed(world, served, session=b"t" * 16)
        assert (await refusal(world, served, other)).reason == "draining"
        await stream.send(Step(serial=1, after=0, start=0, payload=IDS))
        await trio.sleep(0.1)
        assert len(served.executor.jobs) == 1

    run(body)


def test_a_leg_outlives_its_up_stream_for_one_grace_time_and_then_nothing_is_left() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        await stream.send(Step(serial=1, after=0, start=0, payload=IDS))
        await trio.sleep(0.1)
        await stream.close()
        await trio.sleep(GRACE_SECONDS - 1)
        assert served.server.sessions == 1
        assert served.executor.caches
        await trio.sleep(GRACE_SECONDS + 2)
        assert served.is_clean
        assert served.server.free_tokens == 4096
        assert not served.server._graces

    run(body)


def test_a_close_frees_at_once() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        await stream.send(Step(serial=1, after=0, start=0, payload=IDS))
        await stream.send(Close())
        await trio.sleep(0.5)
        assert served.is_clean

    run(body)


def test_an_attach_without_its_open_is_forgotten_after_a_grace_time() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = MessageStream(await world.host.open(served.peer, CHAIN_PROTOCOL, within=5.0))
        await stream.send(Attach(session=SESSION, epoch=1, span="0:4", have=0))
        await trio.sleep(GRACE_SECONDS + 1)
        assert served.is_clean
        assert not served.server._graces

    run(body)


def test_a_stream_that_begins_with_something_else_is_ended() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = MessageStream(await world.host.open(served.peer, CHAIN_PROTOCOL, within=5.0))
        await stream.send(Close())
        with pytest.raises(module.SwarmError):
            await stream.receive(within=5.0)
        assert served.is_clean

    run(body)


def test_a_stream_that_says_nothing_is_ended_in_time() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        raw = await world.host.open(served.peer, CHAIN_PROTOCOL, within=5.0)
        await raw.send_all(b"\0")
        with pytest.raises(module.SwarmError), trio.fail_after(module.FIRST_MESSAGE_SECONDS + 1):
            await raw.receive_some()

    run(body)


def test_hints_to_dial_are_followed_and_bounded() -> None:
    async def body(world: World) -> None:
        one, other = await world.add("0:2", "2:4")
        stream = await said_to(world, one, signed(world, one))
        await stream.send(Prepare(peer=other.peer))
        await trio.sleep(0.2)
        assert other.peer in one.host.links()
        for number in range(10 * MOST_PREPARED):
            one.host.learn(f"nobody{number}", (f"/memory/nobody{number}",))
            world.network.cut(one.peer, f"nobody{number}")
            await stream.send(Prepare(peer=f"nobody{number}"))
        await trio.sleep(0.5)
        assert len(one.server._preparing) == MOST_PREPARED
        await trio.sleep(module.PREPARE_SECONDS)
        assert not one.server._preparing

    run(body)


def test_a_result_that_fits_no_frame_fails_its_session_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_RESULT_BYTES", 4)

    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        await stream.receive(within=5.0)
        await stream.send(Step(serial=1, after=0, start=0, wanted="last", payload=IDS))
        fault = await stream.receive(within=5.0)
        assert isinstance(fault, Fault)
        assert (fault.failure, fault.peer) == ("failed", served.peer)
        assert "shorter" in fault.message
        assert served.server.sessions == 1

    run(body)


def test_a_server_that_ended_starts_nothing_any_more() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        stream = await said_to(world, served, signed(world, served))
        await stream.receive(within=5.0)
        served.server._nursery.cancel_scope.cancel()
        await trio.sleep(0.1)
        served.server.received(1, Prepare(peer="x"))
        served.server.ended(1, "closed", "")

    run(body)


def test_the_last_hop_answers_the_client_that_attached() -> None:
    async def body(world: World) -> None:
        (served,) = await world.add("0:4")
        up = await said_to(world, served, signed(world, served))
        down = MessageStream(await world.host.open(served.peer, CHAIN_PROTOCOL, within=5.0))
        await down.send(Attach(session=SESSION, epoch=1, span="0:4", have=0))
        await up.send(Step(serial=1, after=0, start=0, wanted="last", payload=IDS))
        answer = await down.receive(within=5.0)
        assert isinstance(answer, Output)
        assert answer.payload == candidates([0])

    run(body)
