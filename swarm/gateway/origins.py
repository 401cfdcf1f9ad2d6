"""Pages of other origins: which of them a browser may let ask, and read what is answered (CORS).

1. A page of an origin that is not allowed is told nothing; without any allowed this is not here.
"""

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders

from swarm.gateway.attending import App, Message, Receive, Scope, Send

_MOST_SECONDS = "600"  # a browser need not ask again


class Origins:
    """An application that pages of these origins may ask. "*": of any."""

    def __init__(self, app: App, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry one request out, or tell a browser that it may send it (a preflight)."""
        asked = Headers(scope=scope)
        origin = asked.get("origin", "")
        is_allowed = origin != "" and ("*" in self._allowed or origin.lower() in self._allowed)

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.add_vary_header("Origin")
                if is_allowed:
                    headers["access-control-allow-origin"] = origin
                    headers["access-control-expose-headers"] = "retry-after"
            await send(message)

        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in asked
        if not (is_allowed and is_preflight):
            await self._app(scope, receive, marked)
            return
        granted = {
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": asked.get("access-control-request-headers", ""),
            "access-control-max-age": _MOST_SECONDS,
            "content-length": "0",
        }
        if "access-control-request-private-network" in asked:
            granted["access-control-allow-private-network"] = "true"
        fields = [(name.encode(), value.encode("latin-1")) for name, value in granted.items()]
        await marked({"type": "http.response.start", "status": 200, "headers": fields})
        await marked({"type": "http.response.body", "body": b"", "more_body": False})
