"""Options that several commands share."""

from typing import Annotated

import typer

Join = Annotated[
    str | None,
    typer.Option(
        "--join", envvar="SWARM_JOIN", help="The join token of the swarm.", metavar="TOKEN"
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="SWARM_JSON", help="Print JSON on stdout.")]
