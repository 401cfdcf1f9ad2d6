"""Answers carried out: one session for each, and what it says as events.

1. Leaving `speaking` ends every session it began, however it is left.
2. An answer ends with exactly one Ended or Failed, and no other event of it follows.
3. The channel holds no more events than there may be tokens: nobody waits to put one in.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from swarm.client_session import ClientSession
from swarm.errors import SwarmError
from swarm.gateway.ask import Ask
from swarm.gateway.metrics import Meter
from swarm.gateway.sessions import Swarm
from swarm.gateway.speech import Ended, Opened, Piece, Route, Speech
from swarm.generate import Generation, generate
from swarm.messages import HopTime
from swarm.sampling import Candidates
from swarm.tasks import open_tasks

LAST_TROUBLES = 4  # of a session that was given up: whose they were


@dataclass(frozen=True, slots=True)
class Failed:
    """An answer will not be whole."""

    index: int
    error: SwarmError
    spans: tuple[str, ...] = ()  # the blocks whose servers failed last


Event = Opened | Piece | Ended | Failed


@asynccontextmanager
async def speaking(
    swarm: Swarm, ask: Ask, meter: Meter, route_seconds: float
) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
    """Begin all answers; give the channel of their events."""
    bound = sum(choice.settings.most_tokens + 4 for choice in ask.choices)
    send, receive = trio.open_memory_channel[Event](bound)
    async with open_tasks() as nursery:
        for index in range(len(ask.choices)):
            nursery.start_soon(_speak, swarm, ask, index, send, meter, route_seconds)
        yield receive


async def _speak(
    swarm: Swarm,
    ask: Ask,
    index: int,
    out: trio.MemorySendChannel[Event],
    meter: Meter,
    route_seconds: float,
) -> None:
    prompt, settings = ask.choices[index].prompt, ask.choices[index].settings
    speech = Speech(index, swarm.model.tokens, ask)
    watch = _Watch(meter)

    def on_token(token: int) -> bool:
        watch.token()
        piece = speech.say(token)
        if piece.text or piece.told:
            out.send_nowait(piece)
        return speech.is_stopped

    def on_step(times: Sequence[HopTime], candidates: Sequence[Candidates]) -> None:
        meter.step(times)
        speech.hear(times, candidates)

    used: list[ClientSession] = []

    async def work(session: ClientSession) -> None:
        used.append(session)
        out.send_nowait(Opened(index, _route(swarm, session)))
        meter.prompt_tokens.inc(len(prompt))
        guide = ask.new_guide() if ask.new_guide is not None else None
        try:
            made = await generate(session, prompt, settings, on_token, on_step=on_step, guide=guide)
        finally:
            meter.failovers.inc(session.journal.failovers)
            meter.replayed.inc(session.journal.replayed_tokens)
        rest = speech.finish()
        if rest.text:
            out.send_nowait(rest)
        out.send_nowait(_ended(index, swarm, session, made, speech))
        watch.end(made)

    room = len(prompt) + settings.most_tokens
    with meter.running.track_inprogress():
        try:
            async with swarm.session(room, prompt=prompt, route_seconds=route_seconds) as session:
                await work(session)
        except SwarmError as error:
            if not watch.has_ended:
                meter.lost.inc()
                out.send_nowait(Failed(index, error, _failed_spans(used)))


def _ended(
    index: int, swarm: Swarm, session: ClientSession, made: Generation, speech: Speech
) -> Ended:
    return Ended(
        index=index,
        reason=made.finish_reason,
        tokens=len(made.token_ids),
        stop=speech.stop,
        route=_route(swarm, session),
        reused_tokens=made.reused_tokens,
        failovers=session.journal.failovers,
        replayed_tokens=session.journal.replayed_tokens,
    )


def _failed_spans(used: Sequence[ClientSession]) -> tuple[str, ...]:
    troubles = [trouble for session in used for trouble in session.journal.troubles]
    troubles = troubles[-LAST_TROUBLES:]
    return tuple(sorted({trouble.span for trouble in troubles if trouble.span}))


def _route(swarm: Swarm, session: ClientSession) -> Route:
    route = []
    for peer, span in session.route:
        record = swarm.record_of(peer)
        route.append({"peer": peer, "span": span, "name": record.name if record else ""})
    return tuple(route)


class _Watch:
    """When tokens come."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._began = trio.current_time()
        self._last: float | None = None
        self.has_ended = False

    def token(self) -> None:
        now = trio.current_time()
        if self._last is None:
            self._meter.first_token.observe(now - self._began)
        else:
            self._meter.next_token.observe(now - self._last)
        self._last = now
        self._meter.tokens.inc()

    def end(self, made: Generation) -> None:
        self.has_ended = True
        self._meter.reused.inc(made.reused_tokens)
        self._meter.whole.observe(trio.current_time() - self._began)
        self._meter.ended.labels("length" if made.finish_reason == "length" else "stop").inc()
