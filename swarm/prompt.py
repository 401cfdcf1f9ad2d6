"""`swarm generate`: from a prompt to text, over whatever swarm there is."""

import re
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from swarm.client import Client, open_client
from swarm.client_session import ClientSession
from swarm.console import Console
from swarm.control import find_daemon
from swarm.errors import BadInput
from swarm.files import FileCache
from swarm.generate import GenerateSettings, Generation, check_prompt, generate
from swarm.identity import new_identity
from swarm.invite import Invite, decode_invite
from swarm.model_card import GenerationDefaults
from swarm.sampling import SamplingSettings
from swarm.settings import DEFAULT_TOKENS, cache_home
from swarm.template import render_chat
from swarm.text import StopScanner, TextStream, Tokens

_MARK = re.compile(r"<[^<>\s'\"]{2,40}>|\[/?[A-Z_]{3,20}\]")  # as templates mark roles and turns

OnText = Callable[[int | None, str], None]
"""Called with each token id and the text that it completes, which may be empty; at the end with
None and the text that was held back, if there is any.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """What to say, and how to choose the words. None: as the model's own configuration says."""

    prompt: str
    most_tokens: int = DEFAULT_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    route_seconds: float = 30.0
    is_chat: bool = False  # the prompt is a message, by the model's chat template
    is_exact: bool = False  # only servers whose weights are not quantized

    def __post_init__(self) -> None:
        """Raise BadInput for what no model could do, before any swarm is asked."""
        StopScanner(self.stops)
        SamplingSettings(
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=0 if self.top_k is None else self.top_k,
        )


async def answer(client: Client, settings: PromptSettings, on_text: OnText) -> dict[str, Any]:
    """Generate and return the object of `swarm generate --json`.

    BadInput if the prompt does not fit, NoRoute if no route is found in time.
    """
    card, tokens = client.model.card, client.model.tokens
    prompt = _prompt_ids(tokens, settings)
    check_prompt(prompt, card)
    most = min(settings.most_tokens, card.context_length - len(prompt))
    began = trio.current_time()
    client.is_exact = settings.is_exact
    sampling = sampling_of(card.generation, settings)
    stops = (*settings.stops, *card.generation.stop_strings)
    speaker = _Speaker(TextStream(tokens, prompt), StopScanner(stops), on_text)
    patience = settings.route_seconds
    async with client.session(len(prompt) + most, prompt=prompt, route_seconds=patience) as session:
        opening_seconds = trio.current_time() - began
        made = await generate(
            session,
            prompt,
            GenerateSettings(
                most_tokens=most,
                end_ids=frozenset(card.end_of_sequence_ids),
                sampling=sampling,
                rules=card.generation.rules,
            ),
            speaker.say,
        )
        speaker.finish()
        return _report(client, session, made, speaker.text, opening_seconds)


def _prompt_ids(tokens: Tokens, settings: PromptSettings) -> list[int]:
    """The ids of the prompt, or of a chat that it begins. BadInput if there is no template."""
    if not settings.is_chat:
        return tokens.encode(settings.prompt)
    template = tokens.template_for()
    if template is None:
        raise BadInput("the model has no chat template", next_step="leave --chat out")
    message = {"role": "user", "content": settings.prompt}
    text = render_chat(template, [message], special_tokens=tokens.special_tokens)
    return tokens.encode(text, with_ends=False)


def advice_for(tokens: Tokens, settings: PromptSettings) -> str | None:
    """What to tell one whose words the model may not take for a question."""
    template = tokens.chat_template
    if settings.is_chat or template is None:
        return None
    if any(mark in settings.prompt for mark in _MARK.findall(template)):
        return None
    return "This model has a chat template: --chat asks it, without it the prompt is continued."


def sampling_of(defaults: GenerationDefaults, settings: PromptSettings) -> SamplingSettings:
    """The user's choice, completed by the model's own generation config."""
    return SamplingSettings(
        temperature=settings.temperature,
        top_p=settings.top_p if settings.top_p is not None else defaults.top_p or 1.0,
        top_k=settings.top_k if settings.top_k is not None else defaults.top_k or 0,
        min_p=defaults.min_p or 0.0,
        repetition_penalty=defaults.repetition_penalty or 1.0,
        seed=settings.seed if settings.seed is not None else secrets.randbits(32),
    )


class _Speaker:
    """Turns ids into text for `on_text`, up to a stop string."""

    def __init__(self, stream: TextStream, scanner: StopScanner, on_text: OnText) -> None:
        self._stream = stream
        self._scanner = scanner
        self._on_text = on_text
        self.text = ""

    def say(self, token: int) -> bool:
        """Take one id; True once a stop string has come."""
        self._tell(token, self._scanner.feed(self._stream.feed([token])))
        return self._scanner.matched is not None

    def finish(self) -> None:
        """Give what was held back."""
        if self._scanner.matched is None:
            rest = self._scanner.feed(self._stream.finish()) + self._scanner.finish()
            if rest:
                self._tell(None, rest)

    def _tell(self, token: int | None, text: str) -> None:
        self.text += text
        self._on_text(token, text)


def _report(
    client: Client, session: ClientSession, made: Generation, text: str, opening_seconds: float
) -> dict[str, Any]:
    count = len(made.token_ids)
    later = count - 1
    route = []
    for peer, span in session.route:
        record = client.record_of(peer)
        route.append({"peer": peer, "span": span, "name": record.name if record else ""})
    return {
        "text": text,
        "tokens": count,
        "token_ids": made.token_ids,
        "finish_reason": made.finish_reason,
        "seconds": opening_seconds + made.seconds,
        "ttft_seconds": opening_seconds + made.first_token_seconds,
        "tokens_per_second": later / made.decode_seconds if made.decode_seconds > 0 else None,
        "computed_seconds": made.computed_seconds,
        "route": route,
        "failovers": session.journal.failovers,
        "replayed_tokens": session.journal.replayed_tokens,
        "reused_tokens": made.reused_tokens,
        "draft": None,
    }


async def run_prompt(
    settings: PromptSettings, join: str | None, console: Console, on_text: OnText
) -> dict[str, Any]:
    """Find a swarm and answer: that of the token, of the own daemon, or a private one."""
    token = join or daemon_token()
    if token is not None:
        async with open_joined(decode_invite(token)) as client:
            console.advise(advice_for(client.model.tokens, settings))
            return await answer(client, settings, on_text)
    from swarm.private import open_private_swarm

    console.note(
        "No swarm of yours runs, so this is a private one: three peers on loopback with the demo "
        "model.\nStart a real one with `swarm serve MODEL`, or join one with --join TOKEN."
    )
    async with open_private_swarm() as client:
        return await answer(client, settings, on_text)


@asynccontextmanager
async def open_joined(invite: Invite) -> AsyncIterator[Client]:
    """Enter a swarm as a peer that only asks, under a fresh key."""
    from swarm.host import open_host

    identity = new_identity()
    async with open_host(identity, invite.secret, listen=None) as host:
        files = FileCache(cache_home() / "files")
        async with open_client(host, identity, invite, files) as client:
            yield client


def daemon_token() -> str | None:
    """A join token of this user's daemon; None if none runs. Unreachable if it does not answer."""
    found = find_daemon("invite")
    return str(found["join"]) if found is not None else None
