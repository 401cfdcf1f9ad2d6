"""`swarm doctor plan`: a swarm on paper."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from swarm.commands.options import Json
from swarm.errors import EXIT_UNCOVERED


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder with config.json, or that file.")
    ],
    peers: Annotated[
        Path,
        typer.Option(
            "--peers",
            envvar="SWARM_PEERS",
            help='A TOML file of [\\[peer]] entries, each with memory ("24GB") and, if known, '
            "reads (how much of it per second), rtt_ms (round trip), name, count (of such).",
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(
            envvar="SWARM_PLAN_TOKENS",
            min=1,
            help="Room for so many tokens of all sessions. Default: four of the model's "
            "contexts, of 32768 tokens at most.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(envvar="SWARM_DTYPE", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    quant: Annotated[str, typer.Option(envvar="SWARM_QUANT", help="none, int8 or nf4.")] = "none",
    as_json: Json = False,
) -> None:
    """Say which peer would hold what of MODEL, how fast it would be, and what is missing.

    No weights are read or fetched. The exit code is 3 if some block fits nowhere.
    """
    from swarm.console import readable_errors

    with readable_errors(is_json=as_json):
        from swarm.model import wanted_of
        from swarm.planning import read_machines, rendered, report_of
        from swarm.settings import parse_dtype, parse_quant

        machines = read_machines(peers)
        wanted = wanted_of(model, parse_dtype(dtype), parse_quant(quant), tokens)
        report = report_of(wanted, machines)
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            from rich.console import Console as Terminal

            Terminal(highlight=False).print(rendered(report))
        if not report["is_complete"]:
            sys.exit(EXIT_UNCOVERED)
