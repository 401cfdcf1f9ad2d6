"""The gateway as an ASGI application: paths to handlers, and nothing else."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from swarm.gateway.attending import App, Attended
from swarm.gateway.desk import Desk
from swarm.gateway.exchange import Endpoint, Exchange, Form, Handler
from swarm.gateway.faults import ApiError, anthropic_form, openai_form
from swarm.gateway.messages import CountRequest, Messages, MessagesRequest
from swarm.gateway.metrics import CONTENT_TYPE
from swarm.gateway.openai import OpenAi
from swarm.gateway.openapi import document
from swarm.gateway.origins import Origins
from swarm.gateway.requests import ChatRequest, CompletionRequest
from swarm.gateway.responses import Responses, ResponsesRequest
from swarm.gateway.sessions import Swarm
from swarm.gateway.settings import GatewaySettings
from swarm.gateway.texts import DetokenizeRequest, EmbeddingRequest, Texts, TokenizeRequest

BODIES: dict[str, type[Any]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
GETS = {
    "/v1/models": "The model that is served here.",
    "/health": "Whether every block is served.",
    "/metrics": "Figures for Prometheus.",
}


def application(swarm: Swarm, settings: GatewaySettings) -> App:
    """Return the application that answers for this swarm."""
    desk = Desk(swarm, settings)
    openai, responses = OpenAi(desk), Responses(desk)
    messages, texts = Messages(desk), Texts(desk)
    posts: dict[str, Handler] = {
        "/v1/completions": openai.completions,
        "/v1/chat/completions": openai.chat,
        "/v1/responses": responses.responses,
        "/v1/messages": messages.messages,
        "/v1/messages/count_tokens": messages.count,
        "/v1/embeddings": texts.embeddings,
        "/tokenize": texts.tokenize,
        "/detokenize": texts.detokenize,
    }

    async def health(exchange: Exchange) -> None:
        gaps = desk.uncovered()
        status = "ok" if not gaps else "uncovered"
        await exchange.reply({"status": status, "uncovered": gaps}, 503 if gaps else 200)

    async def metrics(exchange: Exchange) -> None:
        desk.check_key(exchange.request)
        await exchange.reply_bytes(desk.meter.text(), CONTENT_TYPE)

    async def described(exchange: Exchange) -> None:
        await exchange.reply(document(BODIES, GETS))

    gets: dict[str, Handler] = {
        "/v1/models": openai.models,
        "/v1/models/{name:path}": openai.model,
        "/health": health,
        "/metrics": metrics,
        "/openapi.json": described,
    }

    def route(method: str, path: str, handler: Handler) -> Route:
        form: Form = anthropic_form if path.startswith("/v1/messages") else openai_form
        return Route(path, Endpoint(handler, desk.meter, path, form), methods=[method])

    inner = Starlette(
        routes=[
            *(route("GET", path, handler) for path, handler in gets.items()),
            *(route("POST", path, handler) for path, handler in posts.items()),
        ],
        exception_handlers={HTTPException: _told},
    )
    inner.router.redirect_slashes = False
    app = Origins(inner, settings.origins) if settings.origins else inner
    return Attended(app, most_bytes=settings.most_body_bytes, within=settings.body_seconds)


async def _told(request: Request, error: Exception) -> JSONResponse:
    """What is no path of ours, or no method of it."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    sentence = f"there is no {request.method[:16]} {request.url.path[:128]} here"
    headers = getattr(error, "headers", None)
    return JSONResponse(openai_form(ApiError(status, sentence)), status, headers)
