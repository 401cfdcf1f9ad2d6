"""What every request passes: the key, the model's name, room for one more, the prompt's ids.

1. No more than `most_running` answers are being generated. Whoever comes then waits for room, first
   come, first served; so do `most_waiting` answers at most, for `queue_seconds` at most. Others are
   told when to come again.
2. Whoever leaves the queue, however, leaves nothing in it.
"""

import hmac
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

import trio
from starlette.requests import Request

from routing.coverage import uncovered
from swarm.gateway.ask import model_missing
from swarm.gateway.faults import MOST_RETRY_SECONDS, RETRY_SECONDS, ApiError
from swarm.gateway.grammar import Grammars
from swarm.gateway.metrics import Meter
from swarm.gateway.sessions import Swarm
from swarm.gateway.settings import OWN_NAMES, GatewaySettings
from swarm.record import offer_of
from swarm.tasks import in_thread

# Shorter text is encoded in less time than a thread takes to begin.
_SHORT_CHARACTERS = 16_384

_LATEST_SHARE = 0.2  # of the last answer in the mean of how long one takes

_PORT = re.compile(r":[0-9]*$")

Made = TypeVar("Made")


class Desk:
    """The gateway's view of its swarm, and its bounds."""

    def __init__(self, swarm: Swarm, settings: GatewaySettings) -> None:
        self.swarm = swarm
        self.settings = settings
        self.meter = Meter()
        self.grammars = Grammars(swarm.model)
        self._keys = tuple(key.encode() for key in settings.keys)
        self._running = 0
        self._queue: dict[trio.Event, int] = {}  # who waits, for how many answers, in their order
        self._mean_seconds = RETRY_SECONDS  # that an answer takes
        self._name = swarm.model.card.name

    @property
    def model_name(self) -> str:
        """What most servers call the model: its hub name or, without one, its folder's."""
        records = self.swarm.records()
        hubs = Counter(record.hub_name for record in records if record.hub_name)
        names = hubs or Counter(record.model_name for record in records if record.model_name)
        if names:  # else it bears the name that it had when somebody was there
            self._name = min(names, key=lambda name: (-names[name], name))
        return self._name

    def uncovered(self) -> list[str]:
        """The blocks that nobody serves, as spans."""
        blocks = self.swarm.model.card.blocks
        offers = [offer_of(record) for record in self.swarm.records() if record.blocks == blocks]
        return [str(span) for span in uncovered(offers, blocks)]

    def check_key(self, request: Request) -> None:
        """ApiError 401 unless the request holds a key, where one is needed.

        Without keys, 403 for what a page in a browser of this machine may have sent, having named
        itself by our address.
        """
        if not self._keys:
            if not (self.settings.is_open or _is_own_name(request.headers.get("host", ""))):
                raise ApiError(
                    403,
                    "without a key this API answers for localhost only: ask it by that name",
                    code="host_not_allowed",
                )
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = (
            token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        )
        offered = given.encode()
        # All are compared, each in the time of any: nothing tells which one was near.
        if not sum(hmac.compare_digest(offered, key) for key in self._keys):
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key")

    def check_model(self, asked: str) -> None:
        """ApiError 404 unless this model is served here."""
        name = self.model_name
        if asked not in (name, name.rpartition("/")[2]):
            raise model_missing(asked, name)

    @asynccontextmanager
    async def room_for(self, answers: int) -> AsyncIterator[None]:
        """Wait for room for so many answers, and hold it. ApiError 429 if there is none in time."""
        if self._queue or self._running + answers > self.settings.most_running:
            await self._wait_for_room(answers)
        else:
            self._running += answers
        began = trio.current_time()
        try:
            yield
        finally:
            seconds = trio.current_time() - began
            self._mean_seconds += _LATEST_SHARE * (seconds - self._mean_seconds)
            self._running -= answers
            self._let_in()

    async def _wait_for_room(self, answers: int) -> None:
        if sum(self._queue.values()) + answers > self.settings.most_waiting:
            raise self._too_many(answers)
        turn = trio.Event()
        self._queue[turn] = answers
        try:
            with (
                trio.move_on_after(self.settings.queue_seconds),
                self.meter.waiting.track_inprogress(),
            ):
                await turn.wait()
        finally:
            if not turn.is_set():
                del self._queue[turn]
                self._let_in()
        if not turn.is_set():
            raise self._too_many(answers)

    def _let_in(self) -> None:
        """Give room to those who wait, as far as it goes."""
        for turn, answers in list(self._queue.items()):
            if self._running + answers > self.settings.most_running:
                return
            del self._queue[turn]
            self._running += answers
            turn.set()

    def _too_many(self, answers: int) -> ApiError:
        waiting, most = sum(self._queue.values()), self.settings.most_running
        return ApiError(
            429,
            f"{self._running} of {most} answers are being generated and {waiting} wait for room: "
            "come again later",
            code="rate_limit_exceeded",
            retry_seconds=min(self._mean_seconds * (waiting + answers) / most, MOST_RETRY_SECONDS),
        )

    @contextmanager
    def time_for(self) -> Iterator[None]:
        """Give one answer its time. ApiError 503 if it takes longer."""
        with trio.move_on_after(self.settings.answer_seconds) as scope:
            yield
        if scope.cancelled_caught:
            seconds = self.settings.answer_seconds
            raise ApiError(503, f"the answer took more than {seconds:g} seconds", code="timeout")

    async def encode(self, text: str, *, with_ends: bool = True) -> list[int]:
        """Return the ids of a text. BadInput if it has none."""
        tokens = self.swarm.model.tokens
        return await aside(partial(tokens.encode, text, with_ends=with_ends), len(text))


async def aside(work: Callable[[], Made], characters: int) -> Made:
    """Do what takes long for long texts, in a thread if this one is."""
    if characters <= _SHORT_CHARACTERS:
        return work()
    return await in_thread(work)


def _is_own_name(host: str) -> bool:
    """Is a Host header absent, or one by which a machine calls itself?"""
    name = _PORT.sub("", host.strip()).strip("[]").lower()
    return name in ("", *OWN_NAMES)
