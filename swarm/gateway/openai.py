"""The handlers of OpenAI's own paths: thin, since `ask`, `chat` and `replies` decide."""

import time
from typing import Any

from swarm.gateway.answering import answer, guide_of, prompts_of
from swarm.gateway.ask import ask_of
from swarm.gateway.chat import chat_ask
from swarm.gateway.chat_replies import ChatWriter
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import bad, checked, unsupported
from swarm.gateway.replies import CompletionWriter
from swarm.gateway.requests import ChatRequest, CompletionRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own


class OpenAi:
    """Models, completions and chats."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._since = int(time.time())

    async def models(self, exchange: Exchange) -> None:
        """GET /v1/models."""
        self._desk.check_key(exchange.request)
        await exchange.reply({"object": "list", "data": [self._model()]})

    async def model(self, exchange: Exchange) -> None:
        """GET /v1/models/{name}."""
        self._desk.check_key(exchange.request)
        self._desk.check_model(exchange.request.path_params["name"])
        await exchange.reply(self._model())

    async def completions(self, exchange: Exchange) -> None:
        """POST /v1/completions."""
        desk = self._desk
        desk.check_key(exchange.request)
        request = await exchange.read(CompletionRequest)
        desk.check_model(request.model)
        unsupported({"suffix": request.suffix})
        if request.best_of not in (None, request.n or 1):
            raise bad("best_of is not supported here", "best_of", "unsupported_parameter")
        checked(
            not (request.echo and request.logprobs is not None),
            "the log-probabilities of a prompt are not told",
            "echo",
        )
        prompts = await prompts_of(desk, request.prompt, "prompt")
        ask = ask_of(
            request,
            prompts,
            request.max_tokens or DEFAULT_COMPLETION_TOKENS,
            desk.swarm.model.card,
            desk.settings,
            top=request.logprobs,
            new_guide=await guide_of(desk, request),
        )
        decode = desk.swarm.model.tokens.decode
        echoes = [decode(choice.prompt) for choice in ask.choices] if request.echo else []
        writer = CompletionWriter(
            ask,
            request.model,
            desk.swarm.model.fingerprint,
            has_usage=request.has_usage,
            echoes=echoes,
        )
        await answer(desk, exchange, ask, writer, is_streamed=bool(request.stream))

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""
        desk = self._desk
        desk.check_key(exchange.request)
        request = await exchange.read(ChatRequest)
        desk.check_model(request.model)
        ask = await chat_ask(desk, request)
        fingerprint = desk.swarm.model.fingerprint
        writer = ChatWriter(ask, request.model, fingerprint, has_usage=request.has_usage)
        await answer(desk, exchange, ask, writer, is_streamed=bool(request.stream))

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._desk.model_name,
            "object": "model",
            "created": self._since,
            "owned_by": "swarm",
            "max_model_len": self._desk.swarm.model.card.context_length,
        }
