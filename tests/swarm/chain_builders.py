"""Short names for what the chain's machines are told in the tests."""

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from swarm.chain import EARLY_CREDIT, FIRST_CREDIT, Entry, Payload, Send
from swarm.leg import Compute, Leg, step_length
from swarm.legs import Legs
from swarm.messages import (
    Attach,
    HopName,
    HopTime,
    Message,
    Mode,
    Open,
    Ready,
    Refused,
    Step,
    Wanted,
)
from swarm.session import Session
from swarm.wire import Tensor

SESSION = b"s" * 16
KEPT: tuple[tuple[str, str, Mode], ...] = (("here", "0:1", "keep"), ("next", "1:2", "keep"))
TIME = HopTime(0.5, 0.25)


def payload(length: int = 1, size: int = 4) -> Payload:
    """`length` positions of `size` bytes each."""
    return {"ids": Tensor("int32", (1, length), bytes(size * length))}


def entry(serial: int, start: int, size: int = 4, wanted: Wanted = "last") -> Entry:
    return Entry(serial, start, payload(1, size), wanted)


def step(
    serial: int,
    start: int,
    *,
    after: int | None = None,
    length: int = 1,
    size: int = 4,
    wanted: Wanted = "last",
) -> Step:
    before = serial - 1 if after is None else after
    return Step(
        serial=serial, after=before, start=start, wanted=wanted, payload=payload(length, size)
    )


def route(
    epoch: int,
    *hops: str | tuple[str, str] | tuple[str, str, Mode],
    at: int = 0,
    session: bytes = SESSION,
    client: str = "me",
    positions: int = 0,
    window: int = EARLY_CREDIT,
) -> Open:
    """An Open; a hop without span holds one block at its place, without mode it is new."""
    names = [
        HopName(h, f"{i}:{i + 1}") if isinstance(h, str) else HopName(*h)
        for i, h in enumerate(hops)
    ]
    return Open(
        session=session,
        epoch=epoch,
        hops=tuple(names),
        at=at,
        client=client,
        fingerprint="f",
        max_tokens=64,
        valid_until=0.0,
        positions=positions,
        window=window,
    )


def ready(have: int) -> Ready:
    """What a hop says whose links have all the room there is."""
    return Ready(have=have, window=FIRST_CREDIT)


def attach(epoch: int, span: str, have: int = 0) -> Attach:
    return Attach(session=SESSION, epoch=epoch, span=span, have=have)


class Desk:
    """The legs of one peer, fed by hand. Links that others open are 1 to 99, ours from 101."""

    def __init__(self, admission: Callable[[Open], Refused | None] = lambda opened: None) -> None:
        numbers = count(101)
        self.legs = Legs(admission, lambda: next(numbers))

    @property
    def leg(self) -> Leg:
        (leg,) = self.legs.legs()
        return leg

    def compute(self, actions: Iterable[object], size: int = 4) -> list[object]:
        """Compute every step that the actions ask for, `size` bytes a position."""
        done: list[object] = []
        for action in actions:
            if isinstance(action, Compute):
                made = payload(step_length(action.step), size)
                done += self.legs.computed(action.leg, action.step.serial, made, TIME)
        return done


def said(actions: Iterable[object], link: int) -> list[Message]:
    """The messages that the actions send to a link."""
    return [a.message for a in actions if isinstance(a, Send) and a.link == link]


def serials(messages: Iterable[Message]) -> list[int]:
    return [message.serial for message in messages if isinstance(message, Step)]


def session_of(*hops: tuple[str, str]) -> tuple[Session, Sequence[object]]:
    """A session that has taken this route: uplink 1, downlink 2. And its first actions."""
    numbers = count(1)
    session = Session(
        session=SESSION,
        client="me",
        fingerprint="f",
        max_tokens=64,
        sign=lambda opened: opened,
        new_link=lambda: next(numbers),
    )
    return session, session.take_route(hops)
