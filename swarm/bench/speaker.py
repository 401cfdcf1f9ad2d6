"""A session that a bench times: what is done is what any client's session does.

1. End-of-sequence ids are tokens like others: a text is as long as asked.
2. Every wait ends: within the session's own deadlines.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import numpy as np
import trio

from swarm.bench.rows import TokenTimes
from swarm.bench.watch import Stamps, stamped, watched
from swarm.client import Client, open_client
from swarm.client_session import ClientSession
from swarm.control import ask_daemon
from swarm.errors import BadInput
from swarm.files import FileCache
from swarm.generate import CHUNK_TOKENS
from swarm.identity import new_identity
from swarm.invite import decode_invite
from swarm.messages import Output
from swarm.sampling import SamplingSettings, candidates_from, choose, wish_for
from swarm.settings import cache_home
from swarm.wire import Tensor

GREEDY = SamplingSettings()
WISH = wish_for(GREEDY, ())


@asynccontextmanager
async def open_bench_client(join: str | None) -> AsyncIterator[Client]:
    """Enter the swarm of the token, or of the own daemon, as a client whose streams are watched.

    BadInput if there is neither; else as `open_client`.
    """
    from swarm.host import open_host

    invite = decode_invite(join or str(ask_daemon("invite")["join"]))
    identity = new_identity()
    async with (
        open_host(identity, invite.secret, listen=None) as host,
        open_client(watched(host), identity, invite, FileCache(cache_home() / "files")) as client,
    ):
        yield client


@dataclass(slots=True)
class Speaker:
    """One session that decodes greedily, and when what happened."""

    session: ClientSession
    stamps: Stamps
    ids: list[int]
    times: list[TokenTimes] = field(default_factory=list)

    async def prefill(self) -> float:
        """Send the prompt in chunks as `generate` does; return the seconds to the first token.

        Raises what `ClientSession.next_output` raises, as `decode` does.
        """
        began = trio.current_time()
        prompt = list(self.ids)
        for start in range(0, len(prompt), CHUNK_TOKENS):
            chunk = prompt[start : start + CHUNK_TOKENS]
            is_last = start + len(chunk) == len(prompt)
            self.session.step(start, _payload(chunk), "last" if is_last else "none", WISH)
        await self._take()
        return trio.current_time() - began

    async def decode(self) -> Output:
        """Say one more token and note its times: they follow on those of the last `decode`."""
        began = self.times[-1].ended if self.times else trio.current_time()
        self.stamps.expect()
        self.session.step(len(self.ids) - 1, _payload(self.ids[-1:]), "last", WISH)
        output = await self._take()
        ended = trio.current_time()
        written = ended if self.stamps.written is None else self.stamps.written
        came = min(max(self.stamps.came, written), ended)
        self.times.append(
            TokenTimes(began=began, written=written, came=came, ended=ended, hops=output.times)
        )
        return output

    async def _take(self) -> Output:
        output = await self.session.next_output()
        (candidates,) = candidates_from(output.payload, WISH)
        self.ids.append(choose(candidates, GREEDY, len(self.ids), {}))
        return output


@asynccontextmanager
async def open_speaker(
    client: Client, prompt: Sequence[int], tokens: int, patience_seconds: float
) -> AsyncIterator[Speaker]:
    """Open a session for the prompt and so many tokens after it. One at a time in a task."""
    stamps = stamped()
    room = len(prompt) + tokens
    async with client.session(room, route_seconds=patience_seconds) as session:
        yield Speaker(session, stamps, list(prompt))


def random_ids(client: Client, random: Random, count: int) -> list[int]:
    """Return a prompt that no server can have met before."""
    return [random.randrange(client.model.card.vocabulary_size) for _ in range(count)]


def model_name(client: Client) -> str:
    """Return what people call the swarm's model: as its servers say, else as its files do."""
    named = (record.model_name for record in client.records() if record.model_name)
    return next(named, client.model.card.name)


def check_room(client: Client, tokens: int, options: str) -> None:
    """BadInput if no session of the model holds so many tokens."""
    context = client.model.card.context_length
    if tokens > context:
        raise BadInput(
            f"a test of {tokens} tokens is beyond the model's context of {context}",
            next_step=f"give smaller numbers to {options}",
        )


def _payload(ids: Sequence[int]) -> dict[str, Tensor]:
    return {"ids": Tensor("int32", (1, len(ids)), np.asarray(ids, "<i4").tobytes())}
