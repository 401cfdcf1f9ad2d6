"""Pages of other origins: what a browser may ask for them, and what it is told."""

from typing import Any

import pytest
import trio
from gateway_world import MODEL, Answer, ScriptedSwarm, application_of, ask

from swarm.errors import BadInput
from swarm.gateway.settings import read_origins

PAGE = "https://chat.example.org"
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def told(headers: dict[str, str], *, origins: Any = (PAGE,), **more: Any) -> Answer:
    async def main() -> Answer:
        bounds = {key: more.pop(key) for key in ("keys", "most_running") if key in more}
        app = application_of(ScriptedSwarm("Yes."), origins=origins, **bounds)
        return await ask(app, more.pop("path", CHAT), headers=headers, **more)

    return trio.run(main)


def granted(made: Answer) -> list[str]:
    return [name for name in made.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origins", [(PAGE,), ("http://localhost:3000", PAGE), ("*",)])
def test_a_browser_may_ask_for_a_page_of_an_allowed_origin(origins: tuple[str, ...]) -> None:
    made = told({"origin": PAGE, **PREFLIGHT}, origins=origins, method="OPTIONS", keys=("key",))
    assert made.status == 200
    assert made.headers["access-control-allow-origin"] == PAGE
    assert (
        made.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    )
    assert "POST" in made.headers["access-control-allow-methods"]
    assert made.headers["vary"] == "Origin"
    assert made.is_whole


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_allowed_page_may_read_answers_and_errors(is_streamed: bool) -> None:
    body = {**BODY, "stream": is_streamed}
    made = told({"origin": PAGE}, body=body)
    assert (made.status, made.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "retry-after" in made.headers["access-control-expose-headers"]
    for fields in ({"body": b"{"}, {"body": body, "keys": ("key",)}, {"path": "/nowhere"}):
        made = told({"origin": PAGE}, **fields)
        assert made.status in (400, 401, 404)
        assert made.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{PAGE}.evil.example", ""])
def test_pages_of_other_origins_are_told_nothing(origin: str) -> None:
    made = told({"origin": origin, **PREFLIGHT}, method="OPTIONS")
    assert (made.status, granted(made), made.headers["vary"]) == (405, [], "Origin")
    made = told({"origin": origin}, body=BODY)
    assert (granted(made), made.headers["vary"]) == ([], "Origin")


def test_programs_without_an_origin_are_answered_as_ever() -> None:
    made = told({}, body=BODY)
    assert (made.status, granted(made), made.headers["vary"]) == (200, [], "Origin")
    made = told({"origin": PAGE}, body=BODY, origins=())
    assert (made.status, granted(made), "vary" in made.headers) == (200, [], False)
    made = told({"origin": PAGE, **PREFLIGHT}, origins=(), method="OPTIONS")
    assert (made.status, granted(made)) == (405, [])


def test_an_allowed_origin_does_not_open_the_door_to_other_host_names() -> None:
    made = told({"origin": PAGE, "host": "evil.example"}, body=BODY)
    assert (made.status, made.json["error"]["code"]) == (403, "host_not_allowed")
    made = told({"origin": PAGE, "host": "127.0.0.1:8000"}, body=BODY)
    assert made.status == 200


def test_a_page_elsewhere_may_ask_for_an_address_of_this_machine() -> None:
    asking = {"origin": PAGE, **PREFLIGHT, "access-control-request-private-network": "true"}
    made = told(asking, method="OPTIONS")
    assert made.headers["access-control-allow-private-network"] == "true"


def test_origins_are_read_as_browsers_write_them() -> None:
    words = ("https://Chat.example.org/", "http://localhost:3000", "app://obsidian.md", "*")
    assert read_origins(words) == (PAGE, "http://localhost:3000", "app://obsidian.md", "*")
    for bad in ("chat.example.org", "https://x/y", "", "null", "https://", "https://a b"):
        with pytest.raises(BadInput, match="--allow-origin"):
            read_origins((bad,))
