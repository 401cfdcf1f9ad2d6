"""The command `swarm`: parses what was asked, calls the package, prints what came of it.

Heavy imports happen inside the commands: `--help`, `status` and errors stay quick.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.settings import DEFAULT_TOKENS

app = typer.Typer(
    name="swarm",
    help="Run large language models on machines that nobody owns together.\n\n"
    "Each server holds some blocks of one model; your text flows through a chain of them. "
    "Every server on the chain sees the text's hidden states, the first one its tokens, the last "
    "one the answer: ask only swarms you trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Join = Annotated[
    str | None,
    typer.Option(
        "--join", envvar="SWARM_JOIN", help="The join token of the swarm.", metavar="TOKEN"
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="SWARM_JSON", help="Print JSON on stdout.")]


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="SWARM_MODEL",
            help="A folder with config.json and safetensors shards, or a hub name. "
            "Without it: the swarm's model with --join, else the small demo model.",
        ),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(envvar="SWARM_BLOCKS", help="Which to hold: 8:16, a count, or auto."),
    ] = "auto",
    join: Join = None,
    public: Annotated[
        bool, typer.Option("--public", envvar="SWARM_PUBLIC", help="Let everyone in.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(envvar="SWARM_DTYPE", help="auto, float32, bfloat16 or float16."),
    ] = "auto",
    device: Annotated[str, typer.Option(envvar="SWARM_DEVICE", help="cpu, cuda, ...")] = "cpu",
    memory: Annotated[
        str | None,
        typer.Option(
            envvar="SWARM_MEMORY", help="The most to use, like 8GB. Default: what is free."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="SWARM_HOST", help="The address to listen on.")
    ] = "0.0.0.0",
    port: Annotated[
        int | None,
        typer.Option(envvar="SWARM_PORT", min=0, max=65535, help="Default: the one used before."),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SWARM_ANNOUNCE",
            help="Tell others this multiaddr too, like /ip4/203.0.113.5/tcp/4001.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(envvar="SWARM_IDENTITY", help="Key file. Default: the first one not in use."),
    ] = None,
    name: Annotated[
        str, typer.Option(envvar="SWARM_NAME", help="What others see in the peer map.")
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(envvar="SWARM_THREADS", min=1, help="Threads to compute with. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold some blocks of MODEL and serve them until Ctrl-C."""
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm import settings as checked

        settings = checked.ServeSettings(
            model=checked.parse_model(model) if model else None,
            blocks=checked.parse_blocks(blocks),
            join=join,
            is_public=public,
            dtype=checked.parse_dtype(dtype),
            device=device,
            memory_bytes=checked.parse_bytes(memory) if memory else None,
            listen=host,
            port=port,
            announce=tuple(announce or ()),
            identity=identity,
            name=name,
            threads=threads,
        )
        if join:
            from swarm.invite import decode_invite

            decode_invite(join)  # a damaged token is told before torch is loaded
        import trio

        from swarm.serve import serve as run_server

        trio.run(run_server, settings, Console(is_json=as_json))


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="What the text begins with; - reads it from stdin.")
    ],
    join: Join = None,
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", envvar="SWARM_TOKENS", min=1, help="At most so many.")
    ] = DEFAULT_TOKENS,
    temperature: Annotated[
        float, typer.Option(envvar="SWARM_TEMPERATURE", help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[float | None, typer.Option(envvar="SWARM_TOP_P")] = None,
    top_k: Annotated[int | None, typer.Option(envvar="SWARM_TOP_K")] = None,
    seed: Annotated[
        int | None, typer.Option(envvar="SWARM_SEED", help="The same seed, the same text.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(envvar="SWARM_STOP", help="End before this text.")
    ] = None,
    patience: Annotated[
        float,
        typer.Option(envvar="SWARM_PATIENCE", min=0, help="Seconds to look for a route."),
    ] = 30.0,
    as_json: Json = False,
    stream_json: Annotated[
        bool,
        typer.Option("--stream-json", envvar="SWARM_STREAM_JSON", help="One JSON line per token."),
    ] = False,
) -> None:
    """Continue PROMPT with a model that a swarm runs.

    Without --join the swarm of this user's running daemon is asked; if there is none, a private
    swarm of three peers runs the demo model in this process.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json or stream_json):
        from swarm.prompt import PromptSettings

        settings = PromptSettings(
            prompt=sys.stdin.read() if prompt == "-" else prompt,
            most_tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stops=tuple(stop or ()),
            route_seconds=patience,
        )
        import trio

        from swarm.prompt import run_prompt

        made = trio.run(run_prompt, settings, join, Console(), _printer(as_json, stream_json))
        _print_answer(made, as_json or stream_json)


@app.command()
def status(
    join: Join = None,
    as_json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show the peer map: who holds which blocks, how fast, how far."""
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        import time

        from swarm.status import find_status

        while True:
            found = find_status(join)
            if as_json:
                print(json.dumps(found), flush=True)
            else:
                _print_map(found, is_cleared=watch)
            if not watch:
                return
            time.sleep(2.0)


@app.command()
def invite(as_json: Json = False) -> None:
    """Print a join token of the swarm that this user's daemon serves in."""
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        from swarm.control import ask_daemon

        token = ask_daemon("invite")["join"]
        print(json.dumps({"join": token}) if as_json else token)


def _printer(as_json: bool, stream_json: bool) -> Any:
    """What to do with each token and its text."""

    def show(token: int, text: str) -> None:
        if stream_json:
            print(json.dumps({"token": token, "text": text}), flush=True)
        elif not as_json and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    return show


def _print_answer(made: dict[str, Any], is_json: bool) -> None:
    if is_json:
        print(json.dumps(made), flush=True)
    else:
        sys.stdout.write("\n")


def _print_map(found: dict[str, Any], *, is_cleared: bool) -> None:
    from rich.console import Console as Terminal

    from swarm.status import rendered

    terminal = Terminal(highlight=False)
    if is_cleared:
        terminal.clear()
    terminal.print(rendered(found))


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
