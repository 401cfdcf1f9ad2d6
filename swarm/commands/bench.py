"""`swarm bench`: measure and break swarms of one's own."""

import json
import sys
from typing import Annotated

import typer

from swarm.commands.options import Json

app = typer.Typer(no_args_is_help=True, help="Measure and break swarms of one's own.")


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
