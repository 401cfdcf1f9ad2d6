"""What the handlers of all paths share: from prompts to ids, from an ask to what is sent."""

from collections.abc import Callable, Sequence
from typing import Any

from swarm.gateway.ask import Ask, Form, form_of
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import bad, checked
from swarm.gateway.replies import Writer
from swarm.gateway.requests import Request
from swarm.gateway.speaking import speaking
from swarm.gateway.streaming import collect, stream
from swarm.generate import Guide


async def prompts_of(
    desk: Desk, given: str | Sequence[str | int | list[int]], param: str, most: int = 0
) -> list[list[int]]:
    """The ids of each prompt. ApiError if they are neither texts nor ids, or more than `most`
    (by default as many as there may be answers).
    """
    if isinstance(given, str):
        return [await desk.encode(given)]
    if not given:
        raise bad("the prompt is empty", param)
    if all(isinstance(each, int) for each in given):
        return [[each for each in given if isinstance(each, int)]]
    most = most or desk.settings.most_choices
    checked(len(given) <= most, f"more than {most} prompts", param)
    prompts = []
    for each in given:
        if isinstance(each, int):
            raise bad("texts and ids are mixed", param)
        prompts.append(await desk.encode(each) if isinstance(each, str) else each)
    return prompts


async def guide_of(
    desk: Desk, request: Request, call: Form | None = None
) -> Callable[[], Guide] | None:
    """What keeps each answer to the form of the call that it must be, or to the one that the
    request wants. ApiError if nothing can.
    """
    form = call or form_of(request)
    if form is None:
        return None
    checked(not request.ignore_eos, "an answer of a given form ends by itself", "ignore_eos")
    checked(not request.min_tokens, "an answer of a given form ends by itself", "min_tokens")
    return await desk.grammars.compiled(*form)


async def answer(
    desk: Desk, exchange: Exchange, ask: Ask, writer: Writer, *, is_streamed: bool, **shape: Any
) -> None:
    """Generate all answers and send them, whole or as they come. ApiError if one fails."""
    settings, count = desk.settings, len(ask.choices)
    async with desk.room_for(count):
        with desk.time_for():
            async with speaking(desk.swarm, ask, desk.meter, settings.route_seconds) as events:
                if is_streamed:
                    seconds = settings.keep_alive_seconds
                    await stream(
                        exchange, events, count, writer, keep_alive_seconds=seconds, **shape
                    )
                else:
                    await exchange.reply(await collect(events, count, writer))
