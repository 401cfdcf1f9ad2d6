"""`swarm doctor`: finds out what works here.

1. Neither torch nor transformers is imported before a command needs them, and never into this
   process: families are tried in processes of their own.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

doctor = typer.Typer(no_args_is_help=True, help="Find out what works here.")

_TABLE = Path("docs/families.md")


@doctor.callback()
def _group() -> None:
    """Keep `families` a word of its own: typer would drop the name of an only command."""


@doctor.command()
def families(
    only: Annotated[
        list[str] | None,
        typer.Option(envvar="SWARM_FAMILIES_ONLY", help="Only this model type; may come again."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            envvar="SWARM_FAMILIES_TABLE",
            help="Write the table there. Default: docs/families.md, if all were tried and there "
            "is a folder docs.",
        ),
    ] = None,
    proven: Annotated[
        Path | None,
        typer.Option(
            envvar="SWARM_FAMILIES_PROVEN",
            help="Update there the list of proven types that goes with the package.",
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(envvar="SWARM_FAMILIES_SECONDS", min=1, help="The most for one family."),
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", envvar="SWARM_JSON", help="Print JSON on stdout.")
    ] = False,
) -> None:
    """Cut every causal language model of the installed transformers, and compare.

    A tiny random model of each is cut in three stacks. Exit code 1 if a type that the package
    takes for proven with this version is not.
    """
    from swarm.console import Console, readable_errors

    with readable_errors(is_json=as_json):
        from blocks.report import Family
        from swarm.commands.family_trials import FamilySettings, line_of, run_families

        settings = FamilySettings(
            only=tuple(only or ()),
            table=table or (_TABLE if not only and _TABLE.parent.is_dir() else None),
            proven=proven,
            limit_seconds=seconds,
        )

        def show(family: Family) -> None:
            print(json.dumps(family.as_json()) if as_json else line_of(family), flush=True)

        # the many processes share what cores there are; each computes with one thread
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with Console(is_json=as_json) as console:
            lost = run_families(settings, show, console.note)
        if lost:
            sys.exit(1)
