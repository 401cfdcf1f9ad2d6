"""Texts without an answer: their ids, and what the model makes of them.

1. An embedding is the mean over all positions of the hidden states behind the last block, before
   the final norm, scaled to length 1. Models trained to embed do better: this one was not.
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from swarm.gateway.answering import prompts_of
from swarm.gateway.ask import check_fits
from swarm.gateway.chat import Chat, chat_ids, functions_of, plain_messages
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Exchange
from swarm.gateway.faults import checked
from swarm.gateway.requests import ChatMessage, ModelName, TokenId, Tool
from swarm.generate import mean_hidden

MOST_INPUTS = 2048  # OpenAI's own


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/embeddings."""

    model: ModelName
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: of a text, or of a chat."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(max_length=4096)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=1 << 20)]


class Texts:
    """The handlers of embeddings and ids."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def embeddings(self, exchange: Exchange) -> None:
        """POST /v1/embeddings."""
        desk = self._desk
        desk.check_key(exchange.request)
        request = await exchange.read(EmbeddingRequest)
        desk.check_model(request.model)
        card = desk.swarm.model.card
        checked(
            request.dimensions in (None, card.hidden_size),
            f"embeddings have {card.hidden_size} dimensions here",
            "dimensions",
        )
        prompts = await prompts_of(desk, request.input, "input", MOST_INPUTS)
        for prompt in prompts:
            check_fits(prompt, card)
        async with desk.room_for(1):
            with desk.time_for():
                made = [await self._embedded(prompt) for prompt in prompts]
        count = sum(map(len, prompts))
        is_packed = request.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": at, "embedding": _told(vector, is_packed)}
            for at, vector in enumerate(made)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        await exchange.reply(
            {"object": "list", "data": data, "model": request.model, "usage": usage}
        )

    async def tokenize(self, exchange: Exchange) -> None:
        """POST /tokenize."""
        desk = self._desk
        desk.check_key(exchange.request)
        request = await exchange.read(TokenizeRequest)
        self._check_model(request.model)
        checked(
            (request.prompt is None) != (request.messages is None),
            "give either a prompt or messages",
            "prompt",
        )
        if request.prompt is not None:
            with_ends = request.add_special_tokens is not False
            ids = await desk.encode(request.prompt, with_ends=with_ends)
        else:
            chat = Chat(
                messages=plain_messages(request.messages or ()),
                tools=functions_of(request.tools),
                variables=request.chat_template_kwargs,
                is_asking=request.add_generation_prompt is not False,
                is_continued=bool(request.continue_final_message),
            )
            _, ids = await chat_ids(desk, chat)
        context = desk.swarm.model.card.context_length
        await exchange.reply({"count": len(ids), "max_model_len": context, "tokens": ids})

    async def detokenize(self, exchange: Exchange) -> None:
        """POST /detokenize."""
        self._desk.check_key(exchange.request)
        request = await exchange.read(DetokenizeRequest)
        self._check_model(request.model)
        text = self._desk.swarm.model.tokens.decode(request.tokens, skip_special=False)
        await exchange.reply({"prompt": text})

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            self._desk.check_model(name)

    async def _embedded(self, prompt: Sequence[int]) -> NDArray[np.float32]:
        desk = self._desk
        patience = desk.settings.route_seconds
        opening = desk.swarm.session(len(prompt), route_seconds=patience)
        async with opening as session:
            mean = await mean_hidden(session, prompt)
        desk.meter.prompt_tokens.inc(len(prompt))
        length = float(np.linalg.norm(mean))
        return mean / np.float32(length) if length > 0 else mean


def _told(vector: NDArray[np.float32], is_packed: bool) -> Any:
    if is_packed:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
