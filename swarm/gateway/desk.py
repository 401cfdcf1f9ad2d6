"""What every request passes: the key, the model's name, room for one more, the prompt's ids.

1. No more than `most_running` answers are being generated; whoever comes then is told when to come
   again, and waits for nothing.
"""

import hmac
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import trio
from starlette.requests import Request

from routing.coverage import uncovered
from swarm.gateway.ask import model_missing
from swarm.gateway.faults import RETRY_SECONDS, ApiError
from swarm.gateway.grammar import Grammars
from swarm.gateway.metrics import Meter
from swarm.gateway.sessions import Swarm
from swarm.gateway.settings import OWN_NAMES, GatewaySettings
from swarm.record import offer_of
from swarm.tasks import in_thread

# Shorter text is encoded in less time than a thread takes to begin.
_SHORT_CHARACTERS = 16_384

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

    @contextmanager
    def room_for(self, answers: int) -> Iterator[None]:
        """Hold room for so many answers. ApiError 429 if there is none."""
        most = self.settings.most_running
        if self._running + answers > most:
            raise ApiError(
                429,
                f"{self._running} of {most} answers are being generated: come again soon",
                code="rate_limit_exceeded",
                retry_seconds=RETRY_SECONDS,
            )
        self._running += answers
        try:
            yield
        finally:
            self._running -= answers

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
