"""The command `swarm`: parses what was asked, calls the package, prints what came of it.

Heavy imports happen inside the commands: `--help`, `status` and errors stay quick.

1. Whatever goes wrong is one sentence and an exit code of the contract, a misspelt option too.
2. With --json stdout holds JSON, errors among it, and nothing else.
"""

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swarm.errors import EXIT_INTERRUPTED, EXIT_UNCOVERED, BadInput
from swarm.settings import DEFAULT_TOKENS

app = typer.Typer(
    name="swarm",
    help="Run large language models on machines that nobody owns together.\n\n"
    "Each server holds some blocks of one model; your text flows through a chain of them. "
    "Every server on the chain sees the text's hidden states, the first one its tokens, the last "
    "one the answer: ask only swarms you trust.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Typer brings its own copy of click since 0.26: this is UsageError in either.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

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
        typer.Option(envvar="SWARM_BLOCKS", help="Which to hold: 8:16, a number of them, or auto."),
    ] = "auto",
    join: Join = None,
    public: Annotated[
        bool,
        typer.Option(
            "--public", envvar="SWARM_PUBLIC", help="Found a swarm that everyone may enter."
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            envvar="SWARM_DTYPE", help="auto (the checkpoint's own), float32, bfloat16 or float16."
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(envvar="SWARM_DEVICE", help="Where to compute: cpu, cuda, cuda:1.")
    ] = "cpu",
    memory: Annotated[
        str | None,
        typer.Option(
            envvar="SWARM_MEMORY", help="The most memory to use, like 8GB. Default: what is free."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(envvar="SWARM_HOST", help="The address to listen on.")
    ] = "0.0.0.0",
    port: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_PORT",
            min=0,
            max=65535,
            help="The TCP port to listen on, 0 for any. Default: the one used before.",
        ),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SWARM_ANNOUNCE",
            help="Tell others this multiaddr too, like /ip4/203.0.113.5/tcp/4001.",
        ),
    ] = None,
    only_announced: Annotated[
        bool,
        typer.Option(
            "--only-announced",
            envvar="SWARM_ONLY_ANNOUNCED",
            help="Tell others the addresses of --announce alone.",
        ),
    ] = False,
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="SWARM_IDENTITY",
            help="The file of this peer's key, made if missing. Default: the first not in use.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(envvar="SWARM_NAME", help="What the peer map calls this peer.")
    ] = "",
    threads: Annotated[
        int | None,
        typer.Option(envvar="SWARM_THREADS", min=1, help="Threads to compute with. Default: all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold some blocks of MODEL and serve them until Ctrl-C.

    The first Ctrl-C finishes what runs, the second leaves at once.
    """
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
            is_only_announced=only_announced,
            identity=identity,
            name=checked.parse_name(name),
            threads=threads,
        )
        if join:
            from swarm.invite import decode_invite

            decode_invite(join)  # a damaged token is told before torch is loaded
        import trio

        from swarm.serve import serve as run_server

        with Console(is_json=as_json) as console:
            trio.run(run_server, settings, console)


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="What the text begins with; - reads it from stdin.")
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
            help="Choose among the likeliest that share this much. Default: the model's own.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_TOP_K",
            help="Choose among so many, 0 for no limit. Default: the model's own.",
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
            envvar="SWARM_PATIENCE", min=0, help="How many seconds to look for a route, each time."
        ),
    ] = 30.0,
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

    Without --join, the swarm of your running daemon is asked. If none runs,
    a private swarm of three peers runs the demo model in this process.
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
        )
        import trio

        from swarm.prompt import run_prompt

        with Console() as console:
            made = trio.run(run_prompt, settings, join, console, printer(as_json, stream_json))
        print_answer(made, as_json or stream_json)


@app.command()
def status(
    join: Join = None,
    as_json: Json = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", envvar="SWARM_WATCH", help="Show it again every two seconds, until Ctrl-C."
        ),
    ] = False,
) -> None:
    """Show the peer map: who holds which blocks, how fast, how far.

    The exit code is 3 if some block is served by nobody.
    """
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
                break
            time.sleep(2.0)
        if not found["healthy"]:
            sys.exit(EXIT_UNCOVERED)


@app.command()
def invite(as_json: Json = False) -> None:
    """Print a join token of the swarm that this user's daemon serves in."""
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        from swarm.control import ask_daemon

        token = ask_daemon("invite")["join"]
        print(json.dumps({"join": token}) if as_json else token, flush=True)


def _stdin_text() -> str:
    """All of stdin. BadInput if it is no text."""
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""
        text.encode()  # in a C locale what is no text passes as lone surrogates
    except UnicodeError as error:
        raise BadInput("stdin is not text in UTF-8", next_step="convert it first") from error
    return text


bench = typer.Typer(no_args_is_help=True, help="Measure and break swarms of one's own.")
app.add_typer(bench, name="bench")


@bench.command()
def chaos(
    kills: Annotated[
        int, typer.Option(envvar="SWARM_KILLS", min=1, help="How many blows to deal.")
    ] = 100,
    tokens: Annotated[
        int, typer.Option(envvar="SWARM_BENCH_TOKENS", min=1, help="Over at least so many tokens.")
    ] = 2000,
    seed: Annotated[
        int, typer.Option(envvar="SWARM_SEED", help="The same seed, the same blows.")
    ] = 0,
    replicas: Annotated[
        int, typer.Option(envvar="SWARM_REPLICAS", help="Servers of each span, 2 or more.")
    ] = 2,
    kinds: Annotated[
        str, typer.Option(envvar="SWARM_KINDS", help="Some of close, kill, stop and cut.")
    ] = "close,kill,stop,cut",
    as_json: Json = False,
) -> None:
    """Hurt the servers of a swarm on loopback while it speaks, and compare every token.

    Exit code 1 if a token was lost or changed.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        import trio

        from swarm.chaos import rendered, run_chaos
        from swarm.chaos_plan import ChaosSettings, parse_kinds

        settings = ChaosSettings(
            kills=kills, tokens=tokens, seed=seed, replicas=replicas, kinds=parse_kinds(kinds)
        )
        report = trio.run(run_chaos, settings, Console())
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            from rich.console import Console as Terminal

            Terminal(highlight=False).print(rendered(report))
        if not report["holds"]:
            sys.exit(1)


def _print_map(found: dict[str, Any], *, is_cleared: bool) -> None:
    from rich.console import Console as Terminal

    from swarm.status import rendered

    terminal = Terminal(highlight=False)
    if is_cleared:
        terminal.clear()
    terminal.print(rendered(found))


def main() -> None:
    """The entry point of the command."""
    from swarm.console import readable_errors

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may not fit the locale
    try:
        with readable_errors(is_json=bool({"--json", "--stream-json"}.intersection(sys.argv))):
            sys.exit(_called(sys.argv[1:] or ["--help"]))
    except SystemExit as ending:
        if ending.code == EXIT_INTERRUPTED:
            # A thread may still load weights or read from the hub: nobody waits for it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        raise


def _called(words: list[str]) -> int:
    """Run the command that the words name; return its exit code. BadInput for a wrong option."""
    try:
        code = app(args=words, prog_name="swarm", standalone_mode=False)
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        path = getattr(getattr(error, "ctx", None), "command_path", "swarm")
        raise BadInput(message.rstrip("."), next_step=f"`{path} --help` tells more") from error
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
