"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Join = Annotated[
    str | None,
    typer.Option(
        "--join", envvar="SWARM_JOIN", help="The join token of the swarm.", metavar="TOKEN"
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="SWARM_JSON", help="Print JSON on stdout.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="SWARM_API_KEY",
        metavar="KEY",
        help="Who asks the API must show it. May be repeated. Default: nobody needs one.",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        envvar="SWARM_API_KEY_FILE",
        metavar="FILE",
        help="A file with such keys, one a line.",
    ),
]
