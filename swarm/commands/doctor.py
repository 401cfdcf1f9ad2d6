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

from swarm import interrupts
from swarm.commands.options import Json

doctor = typer.Typer(
    no_args_is_help=True, help="Find out which models work here, or on a list of machines."
)

_TABLE = Path("docs/families.md")


@doctor.callback()
def _group() -> None:
    """Keep `families` a word of its own: typer would drop the name of an only command."""


@doctor.command()
def families(
    only: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SWARM_FAMILIES_ONLY",
            help="Only this model type, named as in config.json. May be repeated.",
        ),
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
        typer.Option(envvar="SWARM_FAMILIES_SECONDS", min=1, help="The most seconds for one type."),
    ] = 60.0,
    as_json: Json = False,
) -> None:
    """Find out which types of models a swarm can run here, and what each of them offers.

    A tiny random model of each type that the installed transformers knows is cut in three and
    compared with the whole: some minutes. Exit code 1 if a type fails that should not.
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
        interrupted = interrupts.first(interrupts.interrupt, is_hasty=False)
        with Console(is_json=as_json) as console, interrupted:
            lost = run_families(settings, show, console.note)
        if lost:
            sys.exit(1)
