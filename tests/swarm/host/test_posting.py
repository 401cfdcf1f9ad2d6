"""What is posted to a connection: in order, together, and never without bound."""

from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from swarm.host.handshake import Sealed


class PlainNoise:
    """Seals by putting its bytes between brackets, so that a test sees what went together."""

    def encrypt(self, plain: bytes) -> bytes:
        return b"<" + plain + b">"


class Wire:
    """A socket that notes each write; it blocks while it is full."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_open = True
        self.room = trio.Event()
        self.room.set()

    def push(self, data: bytes) -> bool:
        self.writes.append(data)
        return self.is_open

    async def write(self, data: bytes) -> None:
        if data:
            self.writes.append(data)
        await self.room.wait()


def frames(write: bytes) -> list[bytes]:
    found = []
    while write:
        size = int.from_bytes(write[:2], "big")
        found.append(write[3 : 1 + size])
        write = write[2 + size :]
    return found


def test_of_what_is_posted_in_one_pass_the_first_goes_at_once_and_the_others_in_one_frame() -> None:
    async def main() -> None:
        wire: Any = Wire()
        sealed = Sealed(wire, PlainNoise())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sealed.write_posted)
            await wait_all_tasks_blocked()
            assert all(sealed.post(b"%d," % number) for number in range(16))
            assert [frames(write) for write in wire.writes] == [[b"0,"]]
            await wait_all_tasks_blocked()
            others = b"".join(b"%d," % number for number in range(1, 16))
            assert [frames(write) for write in wire.writes[1:]] == [[others]]
            assert sealed.post(b"at once")
            assert sealed.post(b"first,")
            await sealed.write(b"second")
            await wait_all_tasks_blocked()
            assert [frames(write) for write in wire.writes[2:]] == [[b"at once"], [b"first,second"]]
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_frames_stay_whole_where_a_sealed_one_holds_them() -> None:
    async def main() -> None:
        wire: Any = Wire()
        sealed = Sealed(wire, PlainNoise())
        posted = [bytes([number]) * 40_000 for number in range(3)]
        assert sealed.post(b"at once")
        assert all(map(sealed.post, posted))
        await sealed.write(b"x" * 150_000)
        _, write = wire.writes
        assert frames(write)[:3] == posted
        assert b"".join(frames(write)[3:]) == b"x" * 150_000

    trio.run(main)


def test_a_full_socket_bounds_what_is_posted_and_loses_nothing_of_it() -> None:
    async def main() -> None:
        wire: Any = Wire()
        sealed = Sealed(wire, PlainNoise())
        wire.room = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sealed.write_posted)
            await wait_all_tasks_blocked()
            assert sealed.post(b"stuck")
            await wait_all_tasks_blocked()
            taken = [sealed.post(bytes([number]) * 30_000) for number in range(20)]
            assert taken.index(False) == sum(taken) == 8
            wire.room.set()
            await wait_all_tasks_blocked()
            whole = b"".join(b"".join(frames(write)) for write in wire.writes)
            assert whole == b"stuck" + b"".join(bytes([n]) * 30_000 for n in range(8))
            assert sealed.post(b"room again")
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_nothing_is_posted_past_one_who_waits_as_it_writes_nor_to_what_has_ended() -> None:
    async def main() -> None:
        wire: Any = Wire()
        sealed = Sealed(wire, PlainNoise())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sealed.write_posted)
            await wait_all_tasks_blocked()
            async with sealed.lock:
                assert sealed.post(b"behind")
                await wait_all_tasks_blocked()
                assert not wire.writes
            await wait_all_tasks_blocked()
            assert [frames(write) for write in wire.writes] == [[b"behind"]]
            wire.is_open = False
            assert not sealed.post(b"too late")
            assert not sealed.post(b"too late")
            nursery.cancel_scope.cancel()

    trio.run(main)
