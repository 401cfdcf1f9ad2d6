"""`swarm generate --chat`: the prompt as a user's message, and who is told of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from gateway_world import ScriptedSwarm

import swarm.prompt
from swarm.console import Console
from swarm.errors import BadInput
from swarm.prompt import PromptSettings, run_prompt

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


def said(
    world: Any, monkeypatch: pytest.MonkeyPatch, *, is_json: bool = False, **settings: Any
) -> dict[str, Any]:
    @asynccontextmanager
    async def joined(_invite: object) -> AsyncIterator[Any]:
        yield world

    monkeypatch.setattr(swarm.prompt, "open_joined", joined)
    monkeypatch.setattr(swarm.prompt, "decode_invite", lambda token: token)

    async def run() -> dict[str, Any]:
        with Console(is_json=is_json) as console:
            asked = PromptSettings(**{"prompt": "Who?", "most_tokens": 9, **settings})
            return await run_prompt(asked, "token", console, lambda _token, _text: None)

    return trio.run(run)


def test_chat_asks_by_the_models_template_and_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = ScriptedSwarm("Me.", TEMPLATE)
    assert said(world, monkeypatch, is_chat=True)["text"] == "Me."
    assert world.prompts == ["<|user|>Who?<|assistant|>"]
    assert capsys.readouterr().err == ""


def test_chat_of_a_model_without_a_template_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no chat template"):
        said(ScriptedSwarm("Me."), monkeypatch, is_chat=True)


@pytest.mark.parametrize(
    ("template", "settings", "is_told"),
    [
        (TEMPLATE, {}, True),
        (TEMPLATE, {"is_json": True}, False),
        (TEMPLATE, {"prompt": "<|assistant|>Who?"}, False),
        ("{{ '[INST] ' + messages[0].content + ' [/INST]' }}", {"prompt": "[INST] Who?"}, False),
        ("{{ '[INST] ' + messages[0].content + ' [/INST]' }}", {"prompt": "[4] Who?"}, True),
        (None, {}, False),
    ],
    ids=str,
)
def test_who_asks_a_chat_model_without_its_template_is_told_of_it(
    template: str | None,
    settings: dict[str, Any],
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said(ScriptedSwarm("Me.", template), monkeypatch, **settings)["text"] == "Me."
    told = capsys.readouterr().err
    assert ("--chat" in told) is is_told
    assert is_told or not told
