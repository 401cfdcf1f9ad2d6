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
Dtype = Annotated[
    str,
    typer.Option(
        envvar="SWARM_DTYPE", help="auto (the checkpoint's own), float32, bfloat16 or float16."
    ),
]
QuantName = Annotated[
    str,
    typer.Option(
        envvar="SWARM_QUANT",
        help="auto (only if the blocks would not fit otherwise), none, int8 or nf4.",
    ),
]
Device = Annotated[
    str, typer.Option(envvar="SWARM_DEVICE", help="Where to compute: cpu, cuda, cuda:1.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        envvar="SWARM_MEMORY", help="The most memory to use, like 8GB. Default: what is free."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(envvar="SWARM_THREADS", min=1, help="Threads to compute with. Default: all."),
]
