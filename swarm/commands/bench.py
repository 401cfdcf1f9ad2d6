"""`swarm bench`: how fast blocks and swarms are, and what they stand."""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm import interrupts
from swarm.commands.options import Device, Dtype, Join, Json, Memory, QuantName, Threads, model_name

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    help="Measure blocks and swarms: this machine's blocks (speed), a route through a running "
    "swarm (route), many users at once (users), what survives when servers die (chaos).",
)

_LEAST_WIDTH = 110  # a narrower terminal breaks lines, but no figure is cut short

Repetitions = Annotated[
    int,
    typer.Option(envvar="SWARM_REPETITIONS", min=1, help="How often to repeat each test."),
]
Tokens = Annotated[
    int, typer.Option(envvar="SWARM_BENCH_TOKENS", min=1, help="Decode so many tokens a test.")
]
Prompt = Annotated[
    int | None,
    typer.Option(
        envvar="SWARM_BENCH_PROMPT",
        min=1,
        help="Tokens of the prompt whose prefill is measured. Default: 512, or the whole context "
        "if that is shorter.",
    ),
]
Seed = Annotated[int, typer.Option(envvar="SWARM_SEED", help="The same seed, the same prompts.")]
Patience = Annotated[
    float,
    typer.Option(
        envvar="SWARM_PATIENCE",
        min=0,
        help="Seconds to look for servers of all blocks, at first and when one is lost.",
    ),
]


@app.command()
def speed(
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="SWARM_MODEL",
            metavar="MODEL",
            callback=model_name,
            help="A folder with config.json and safetensors shards, or a hub name. "
            "Without it: the small demo model.",
        ),
    ] = None,
    blocks: Annotated[
        str,
        typer.Option(
            envvar="SWARM_BLOCKS",
            help="Which to load: 8:16 (blocks 8 to 15), 12 (so many) or auto (what fits into "
            "memory).",
        ),
    ] = "auto",
    prompt: Prompt = None,
    tokens: Tokens = 128,
    users: Annotated[
        str,
        typer.Option(
            envvar="SWARM_BENCH_USERS",
            help="Sessions that decode in joint passes, like 1,4,16: a row for each.",
        ),
    ] = "1",
    repetitions: Repetitions = 5,
    dtype: Dtype = "auto",
    quant: QuantName = "auto",
    device: Device = "cpu",
    memory: Memory = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure this machine's blocks of MODEL by themselves, as `swarm serve` would load them.

    Prints pp512 (prefill) and tg128 (decode) in tokens per second ± standard deviation,
    as llama-bench does; with --users also sessions that decode together, all their tokens counted.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm import settings as checked
        from swarm.bench.rows import parse_counts

        serve = checked.ServeSettings(
            model=checked.parse_model(model) if model else None,
            blocks=checked.parse_blocks(blocks),
            dtype=checked.parse_dtype(dtype),
            quant=checked.parse_quant(quant),
            device=device,
            memory_bytes=checked.parse_bytes(memory) if memory else None,
            threads=threads,
        )
        counts = parse_counts(users, "--users")
        from swarm.bench.speed import SpeedSettings, rendered, run_speed

        settings = SpeedSettings(
            serve=serve,
            prompt_tokens=prompt,
            tokens=tokens,
            users=counts,
            repetitions=repetitions,
        )
        with Console(is_json=as_json) as console:
            report = interrupts.run(run_speed, settings, console)
        _print(report, as_json, rendered)


@app.command()
def route(
    join: Join = None,
    prompt: Prompt = None,
    tokens: Tokens = 128,
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    patience: Patience = 30.0,
    as_json: Json = False,
) -> None:
    """Measure a route through a running swarm, and say where a token's time goes.

    Without --join, the swarm of your running daemon. Prints pp512 and tg128 in tokens per second
    ± standard deviation, the route's hops, and per token: computing, waiting for a turn, links,
    frames, the client itself, and what is left.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm.bench.route import RouteSettings, rendered, run_route

        settings = RouteSettings(
            prompt_tokens=prompt,
            tokens=tokens,
            repetitions=repetitions,
            seed=seed,
            patience_seconds=patience,
        )
        with Console(is_json=as_json) as console:
            report = interrupts.run(run_route, settings, join, console)
        _print(report, as_json, rendered)


@app.command()
def users(
    join: Join = None,
    counts: Annotated[
        str,
        typer.Option("--users", envvar="SWARM_BENCH_USERS", help="How many at once: a row each."),
    ] = "1,4,16",
    prompts: Annotated[
        str,
        typer.Option(
            envvar="SWARM_BENCH_PROMPTS", help="Tokens of the prompts, spread over the users."
        ),
    ] = "5-200",
    tokens: Tokens = 64,
    repetitions: Repetitions = 5,
    seed: Seed = 0,
    patience: Patience = 30.0,
    as_json: Json = False,
) -> None:
    """Measure what a running swarm gives to several users at once.

    Without --join, the swarm of your running daemon. Prints the tokens per second of all users
    together, of each, how the slowest fares beside the median, and the time between two tokens.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm.bench.rows import parse_counts, parse_lengths

        many, lengths = parse_counts(counts, "--users"), parse_lengths(prompts, "--prompts")
        from swarm.bench.users import UsersSettings, rendered, run_users

        settings = UsersSettings(
            users=many,
            prompt_lengths=lengths,
            tokens=tokens,
            repetitions=repetitions,
            seed=seed,
            patience_seconds=patience,
        )
        with Console(is_json=as_json) as console:
            report = interrupts.run(run_users, settings, join, console)
        _print(report, as_json, rendered)


def _print(
    report: dict[str, Any],
    as_json: bool,
    rendered: Callable[[dict[str, Any]], "RenderableType"],
) -> None:
    """Print the report as one object, or for people."""
    if as_json:
        print(json.dumps(report), flush=True)
        return
    from rich.console import Console as Terminal

    terminal = Terminal(highlight=False)
    terminal.width = max(terminal.width, _LEAST_WIDTH)
    terminal.print(rendered(report))


@app.command()
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
        str,
        typer.Option(
            envvar="SWARM_KINDS",
            help="Some of close (it ends in order), kill (at once), stop (it hangs) and cut (its "
            "network fails).",
        ),
    ] = "close,kill,stop,cut",
    as_json: Json = False,
) -> None:
    """Hurt the servers of a swarm on loopback while it speaks, and compare every token.

    Exit code 1 if a token was lost or changed.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from swarm.chaos import rendered, run_chaos
        from swarm.chaos_plan import ChaosSettings, parse_kinds

        settings = ChaosSettings(
            kills=kills, tokens=tokens, seed=seed, replicas=replicas, kinds=parse_kinds(kinds)
        )
        report = interrupts.run(run_chaos, settings, Console(), is_hasty=False)
        _print(report, as_json, rendered)
        if not report["holds"]:
            sys.exit(1)
