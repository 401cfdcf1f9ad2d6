"""`swarm generate`: a peer that asks."""

import sys
from typing import Annotated

import typer

from swarm import interrupts
from swarm.commands.options import Join, Json
from swarm.errors import BadInput
from swarm.settings import DEFAULT_TOKENS


def generate(
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="What the text begins with; - reads it from stdin."),
    ],
    join: Join = None,
    tokens: Annotated[
        int,
        typer.Option(
            "-n", "--tokens", envvar="SWARM_TOKENS", min=1, help="At most so many tokens."
        ),
    ] = DEFAULT_TOKENS,
    temperature: Annotated[
        float,
        typer.Option(
            envvar="SWARM_TEMPERATURE",
            help="How freely to choose: 0 always takes the likeliest token.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            envvar="SWARM_TOP_P",
            help="Choose among the likeliest tokens that together have this probability. "
            "Default: the model's own.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_TOP_K",
            help="Choose among so many of the likeliest tokens, 0 for no limit. "
            "Default: the model's own.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_SEED", help="The same seed, the same text. Default: another each time."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(envvar="SWARM_STOP", help="End before this text. May be repeated."),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            envvar="SWARM_PATIENCE",
            min=0,
            help="Seconds to look for servers of all blocks, at first and when one is lost.",
        ),
    ] = 30.0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            envvar="SWARM_CHAT",
            help="Ask the model: PROMPT is a user's message in its chat template.",
        ),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", envvar="SWARM_EXACT", help="Ask only servers with unquantized weights."
        ),
    ] = False,
    as_json: Json = False,
    stream_json: Annotated[
        bool,
        typer.Option(
            "--stream-json",
            envvar="SWARM_STREAM_JSON",
            help="Print one line of JSON per token, then that of --json.",
        ),
    ] = False,
) -> None:
    """Continue PROMPT with a model that a swarm runs.

    Without --join, the swarm of your running daemon (`swarm serve`) is asked. If none
    runs, a private swarm of three peers runs the demo model in this process.
    """
    from swarm.console import Console, print_answer, printer, readable_errors

    with readable_errors(is_json=as_json or stream_json):
        from swarm.prompt import PromptSettings

        settings = PromptSettings(
            prompt=_stdin_text() if prompt == "-" else prompt,
            most_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stops=tuple(stop or ()),
            route_seconds=patience,
            is_chat=chat,
            is_exact=exact,
        )
        from swarm.prompt import run_prompt

        with Console(is_json=as_json or stream_json) as console:
            made = interrupts.run(
                run_prompt, settings, join, console, printer(as_json, stream_json)
            )
        print_answer(made, as_json or stream_json)


def _stdin_text() -> str:
    """All of stdin. BadInput if it is no text."""
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""
        text.encode()  # in a C locale what is no text passes as lone surrogates
    except UnicodeError as error:
        raise BadInput("stdin is not text in UTF-8", next_step="convert it first") from error
    return text
